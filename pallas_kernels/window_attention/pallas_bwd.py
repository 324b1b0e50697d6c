"""The backward pass of window attention on Hopper (Pallas, Mosaic GPU), without atomics: a second run gives equal bits.

``pallas_dq`` goes over tiles of queries, ``pallas_dkv`` over tiles of keys: those of the call with their windows, and
those of the list (a cache's columns, then the retained keys). What the list holds for a key of the call is added to it
in float32 before the one rounding, and dscores = sum_n dv v comes from that sum: without a list, within the kernel.
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp

from pallas_kernels.window_attention import pallas_dkv, pallas_dq
from pallas_kernels.window_attention.api import Case, Gradients, Operands, row_delta
from pallas_kernels.window_attention.cases import LOG2_E
from pallas_kernels.window_attention.pallas_gather import gather_rows
from pallas_kernels.window_attention.pallas_plan import (
    Known,
    cached_slots,
    pad_rows,
    plan_queries,
    round_up,
    survey_data,
)


def differentiate(
    case: Case, operands: Operands, o: Any, lse: Any, residuals: Any, do: Any, dlse: Any, interpreted: bool = False
) -> Gradients:
    """The gradients of every differentiable operand; N = V is one of the sizes that the kernels have."""
    gather = functools.partial(gather_rows, interpreted=interpreted)
    known = survey_data(case, operands, residuals or None, gather=gather)
    dq_tiles, dkv_tiles = pallas_dq.TILES[case.N], pallas_dkv.TILES[case.N]
    q, k, v, do8 = (pad_rows(x) for x in (operands.q, operands.k, operands.v, do))
    rows = round_up(case.T, dq_tiles.warpgroups * 64) + dkv_tiles.queries
    lse2 = jnp.where(jnp.isneginf(lse), 1e30, lse * LOG2_E)
    delta = row_delta(o, lse, do, dlse)
    edge = ((0, 0), (0, 0), (0, rows - case.T))
    lse2, delta = (jnp.pad(x.swapaxes(1, 2), edge, constant_values=c) for x, c in ((lse2, 1e30), (delta, 0.0)))
    plan = plan_queries(case, known, dq_tiles.keys, dq_tiles.warpgroups)
    dq = pallas_dq.call_dq(case, dq_tiles, q, k, v, do8, lse2, delta, known.list, plan, interpreted)[:, : case.T]
    queries = pallas_dkv.QueryRows(q, do8, lse2, delta)
    low, high = _window_intervals(case, known, dkv_tiles.warpgroups * 64)
    keys = pallas_dkv.Keys(k, v, low, high)
    dtype, scores = (k.dtype, case.scores) if known.kept is None else (jnp.float32, False)
    dk, dv, *own_scores = pallas_dkv.call_dkv(case, dkv_tiles, keys, queries, False, dtype, scores, interpreted)
    dk, dv = dk[:, : case.U], dv[:, : case.U]
    columns: tuple[Any, ...] = (None, None)
    if known.list is not None:
        S = known.list.k.shape[2]
        keys = pallas_dkv.Keys(known.list.k, known.list.v, known.list.low[:, :, :S], known.list.high[:, :, :S])
        listed = pallas_dkv.call_dkv(case, dkv_tiles, keys, queries, True, jnp.float32, False, interpreted)
        if case.C:
            columns = tuple(x[:, :, : case.C].swapaxes(1, 2).astype(k.dtype) for x in listed)
        if known.kept is not None:
            dk, dv = (x + _spread(case, known, y) for x, y in zip((dk, dv), listed, strict=True))
    dscores = None
    if own_scores:
        dscores = own_scores[0][:, :, : case.U].swapaxes(1, 2)
    elif case.scores:
        dscores = jnp.sum(dv * operands.v.astype(jnp.float32), axis=-1)
    return Gradients(dq, dk.astype(k.dtype), dv.astype(v.dtype), dscores, *columns)


def _window_intervals(case: Case, known: Known, size: int) -> tuple[Any, Any]:
    """Per key of the call: the queries [low, high) that see it in their window; [B,1,U] up to whole tiles."""
    j = jnp.arange(round_up(case.U, size), dtype=jnp.int32)
    end = jnp.full((case.B, case.U), case.U, jnp.int32) if known.bounds is None else known.bounds.end
    end = jnp.pad(end, ((0, 0), (0, j.size - case.U)))
    high = jnp.minimum(end, j + case.width)
    return jnp.broadcast_to(j, high.shape)[:, None], high[:, None]


def _spread(case: Case, known: Known, listed: Any) -> Any:
    """[B,U,K,...] of the list's retained keys [B,K,S,...], zero for the others."""
    assert known.kept is not None
    counts = known.kept.counts
    before = jnp.pad(counts[:, :, :-1], ((0, 0), (0, 0), (1, 0)))
    slot = jnp.maximum(counts - 1, 0) + cached_slots(case)
    rows = jnp.take_along_axis(listed, slot[..., None], axis=2, mode="promise_in_bounds")
    return jnp.where((counts > before)[..., None], rows, 0.0).swapaxes(1, 2)
