"""What must the passes of window attention in triton.language know of the data before they start?

The bounds of documents, the list of retained keys of every KV head, made by a kernel, and how full a cache is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from pallas_kernels.tiles import power_of_2
from pallas_kernels.triton_call import jit, tl, triton_call
from pallas_kernels.window_attention.api import Case, Operands
from pallas_kernels.window_attention.columns import DocumentBounds, Retained, query_bounds, survey
from pallas_kernels.window_attention.triton_tiles import FAR


@jit
def _list_kernel(
    expiry, begin, U, window, counts, listed, listed_expiry, never,
    K: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # One KV head of one row; the number of keys listed so far is carried along.
    group = tl.program_id(0).to(tl.int64)
    b = group // K
    h = group % K
    count = 0
    forever = 1
    for first in range(0, U, BLOCK):
        j = first + tl.arange(0, BLOCK)
        until = tl.load(expiry + (b * U + j) * K + h, mask=j < U, other=0)
        kept = (j < U - window) & (until > j + window)
        if SEGMENTS:
            # The first query beyond the window must still belong to the key's document.
            kept = kept & (tl.load(begin + b * U + j + window, mask=j < U - window, other=FAR) <= j)
        place = count + tl.cumsum(kept.to(tl.int32), 0)
        tl.store(counts + group * U + j, place, mask=j < U)
        tl.store(listed + group * U + place - 1, j, mask=kept)
        tl.store(listed_expiry + group * U + place - 1, until, mask=kept)
        count += tl.sum(kept.to(tl.int32), 0)
        forever = tl.minimum(forever, tl.min((~kept | (until >= U)).to(tl.int32), 0))
    tl.store(never + group, forever)


def list_retained(case: Case, expiry: Any, begin: Any) -> Retained:
    """What ``columns.retained`` gives, in one launch."""
    rows = jax.ShapeDtypeStruct((case.B, case.K, case.U), jnp.int32)
    result = triton_call(
        _list_kernel,
        expiry,
        begin,
        case.U,
        case.width,
        out_shape=(rows, rows, rows, jax.ShapeDtypeStruct((case.B, case.K), jnp.int32)),
        grid=(case.B * case.K,),
        num_warps=8,
        K=case.K,
        SEGMENTS=begin is not None,
        BLOCK=min(4096, power_of_2(case.U, 128)),
    )
    return Retained(*result)


class Plan(NamedTuple):
    """What the passes must know of the data; None where it has no use."""

    bounds: DocumentBounds | None
    retained: Retained | None
    survey: Int32[Array, "B K 3"] | None


def make_plan(case: Case, operands: Operands) -> Plan:
    bounds = query_bounds(operands.segment_ids) if operands.segment_ids is not None else None
    begin = bounds.begin if bounds is not None else None
    kept = None
    if operands.expiry is not None and case.width < case.U:
        kept = list_retained(case, operands.expiry, begin)
    cache = survey(operands.columns, case.width, case.U, begin) if operands.columns is not None else None
    return Plan(bounds, kept, cache)


def plan_arguments(operands: Operands, plan: Plan) -> tuple[Any, ...]:
    """The kernels' arguments from begin to cache_survey, in their order."""
    kept = plan.retained or Retained(None, None, None, None)  # type: ignore[arg-type]
    columns = operands.columns if operands.columns is not None else (None,) * 4
    begin = plan.bounds.begin if plan.bounds is not None else None
    return begin, *kept, *columns, plan.survey
