"""Window attention with retained columns in Pallas (Mosaic GPU) for Hopper: which cases does it take, and how?

The forward pass is ``pallas_forward``, the backward pass ``pallas_bwd``; other head sizes are padded with zeros.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp

from pallas_kernels.arguments import Arguments
from pallas_kernels.tiles import HOPPER, capability, check_shared_memory
from pallas_kernels.window_attention import pallas_dkv, pallas_dq, pallas_forward
from pallas_kernels.window_attention.api import Case, Gradients, Operands
from pallas_kernels.window_attention.pallas_bwd import differentiate
from pallas_kernels.window_attention.pallas_forward import TILES, call_forward
from pallas_kernels.window_attention.pallas_gather import gather_rows
from pallas_kernels.window_attention.pallas_plan import Known, pad_rows, plan_queries, survey_data

FOLD_VMAP = True
NAME = "window_attention"
SIZES = tuple(TILES)


def size_of(case: Case) -> int:
    """The head size that the kernels run at."""
    return min((size for size in SIZES if size >= max(case.N, case.V)), default=0)


def _pad(x: Any, size: int) -> Any:
    return x if x.shape[-1] == size else jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, size - x.shape[-1]),))


def _at_size(case: Case, operands: Operands) -> tuple[Case, Operands]:
    size = size_of(case)
    q, k, v, scores, expiry, columns, segment_ids = operands
    if columns is not None:
        columns = columns._replace(k=_pad(columns.k, size), v=_pad(columns.v, size))
    padded = Operands(_pad(q, size), _pad(k, size), _pad(v, size), scores, expiry, columns, segment_ids)
    return dataclasses.replace(case, N=size, V=size), padded


def forward(case: Case, operands: Operands, interpreted: bool = False) -> Any:
    """((o, lse), the list of retained keys, () without one)."""
    wide, padded = _at_size(case, operands)
    known = survey_data(wide, padded, gather=functools.partial(gather_rows, interpreted=interpreted))
    o, lse = _attend(wide, padded, known, interpreted)
    return (o[..., : case.V], lse), () if known.kept is None else known.kept


def _attend(case: Case, operands: Operands, known: Known, interpreted: bool) -> tuple[Any, Any]:
    tiles = TILES[case.N]
    plan = plan_queries(case, known, tiles.keys, tiles.warpgroups)
    q, k, v = (pad_rows(x) for x in operands[:3])
    o, lse = call_forward(case, tiles, q, k, v, known.list, plan, interpreted)
    return o[:, : case.T], lse[:, :, : case.T].swapaxes(1, 2)


def backward(
    case: Case, operands: Operands, o: Any, lse: Any, residuals: Any, do: Any, dlse: Any, interpreted: bool = False
) -> Gradients:
    """The gradients of every differentiable operand."""
    wide, padded = _at_size(case, operands)
    o, do = (_pad(x, wide.V) for x in (o, do))
    wide_gradients = differentiate(wide, padded, o, lse, residuals, do, dlse, interpreted)
    q, k, v, scores, columns_k, columns_v = wide_gradients

    def narrow(x: Any, size: int) -> Any:
        return None if x is None else x[..., :size]

    return Gradients(
        narrow(q, case.N),
        narrow(k, case.N),
        narrow(v, case.V),
        scores,
        narrow(columns_k, case.N),
        narrow(columns_v, case.V),
    )


def check(case: Any) -> None:
    """Raises UnsupportedCase where these kernels do not run the case."""
    check, other = Arguments(NAME), "use implementation='triton', 'xla' or None"
    check.require(isinstance(case, Case), f"implementation='pallas' has no decode step; {other}")
    check.choice("compute capability", capability(), (HOPPER,), other)
    check.choice("dtype", case.dtype, ("bfloat16", "float16"), other)
    size = size_of(case)
    check.require(size > 0, f"head sizes N={case.N}, V={case.V} are above {max(SIZES)}; {other}")
    scale = f"scale={case.scale}; implementation='pallas' needs a positive one"
    check.require(case.scale > 0, f"{scale}; negate q instead")
    wide = dataclasses.replace(case, N=size, V=size)
    for kernel in (pallas_forward, pallas_dq, pallas_dkv):
        check_shared_memory(NAME, kernel.shared_memory(wide, kernel.TILES[size]))
