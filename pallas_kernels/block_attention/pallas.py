"""Block attention on Hopper: compressed branch and selection in Pallas (``pallas_select``), the rest in Triton."""

from __future__ import annotations

import functools
from typing import Any

import jax

from pallas_kernels.arguments import Arguments
from pallas_kernels.block_attention import triton
from pallas_kernels.block_attention.blocks import table_size
from pallas_kernels.block_attention.pallas_select import COLUMNS, columns_of, select, shared_memory
from pallas_kernels.tiles import check_choice, check_shared_memory

NAME = "block_attention"

forward = functools.partial(triton.forward, select=select)
attend = functools.partial(triton.attend, select=select)
backward = triton.backward


def check(case: Any) -> None:
    """Raises UnsupportedCase where these kernels do not run the case."""
    triton.check(case)
    other = "use implementation='triton', 'xla' or None"
    require = Arguments("block_attention: pallas").require
    if jax.default_backend() == "gpu":
        capability = str(getattr(jax.devices()[0], "compute_capability", "unknown"))
        check_choice(NAME, "compute capability", capability, ("9.0",), other)
    check_choice(NAME, "dtype", case.dtype, ("bfloat16", "float16"), other)
    require(case.T > 1, f"there is no decode step; {other}")
    C = table_size(case.U, case.block_size)
    require(columns_of(C) > 0, f"{C} blocks; there must be at most {max(COLUMNS)}: {other}")
    check_shared_memory(NAME, shared_memory(case.N, case.V, columns_of(C)))
