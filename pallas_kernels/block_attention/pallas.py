"""Block attention on Hopper: compressed branch and selection in Pallas (``pallas_select``), the rest in Triton."""

from __future__ import annotations

import functools

from jaxtyping import Array

from pallas_kernels.arguments import Arguments
from pallas_kernels.block_attention import pallas_long, pallas_select, triton
from pallas_kernels.block_attention.api import Case
from pallas_kernels.block_attention.blocks import Layout, table_size
from pallas_kernels.block_attention.pallas_select import ROWS, columns_of, shared_memory
from pallas_kernels.tiles import HOPPER, capability, check_shared_memory

NAME = "block_attention"


def select(case: Case, q: Array, pooled_k: Array, pooled_v: Array, layout: Layout) -> tuple[Array, Array, Array]:
    """As ``triton_select.select``."""
    form = pallas_select if columns_of(pooled_k.shape[1]) else pallas_long
    return form.select(case, q, pooled_k, pooled_v, layout)


forward = functools.partial(triton.forward, select=select)
attend = functools.partial(triton.attend, select=select)
backward = triton.backward


def check(case: Case) -> None:
    """Raises UnsupportedCase where these kernels do not run the case."""
    triton.check(case)
    check, other = Arguments(NAME), "use implementation='triton', 'xla' or None"
    check.choice("compute capability", capability(), (HOPPER,), other)
    check.choice("dtype", case.dtype, ("bfloat16", "float16"), other)
    check.require(case.T >= ROWS, f"T={case.T}; implementation='pallas' needs at least {ROWS} tokens: {other}")
    scale = f"scale={case.scale}; implementation='pallas' needs a positive one"
    check.require(case.scale > 0, f"{scale}; negate q instead")
    if columns := columns_of(table_size(case.U, case.block_size)):
        check_shared_memory(NAME, shared_memory(case.N, case.V, columns))
