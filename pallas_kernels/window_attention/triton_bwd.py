"""Window attention in triton.language: the backward pass, without atomics, so that a second run gives the same bits.

    p_tj = exp(scale q_t . k_j - lse_t)                dv_j = sum_t p_tj do_t
    ds_tj = p_tj (do_t . v_j - delta_t)                dq_t = scale sum_j ds_tj k_j,   dk_j = scale sum_t ds_tj q_t

Three kernels. ``dq`` goes over the tiles of queries as the forward pass does, and writes lse and delta for the others.
``dkv`` goes over tiles of keys, each through the queries that see it: once over the list of retained keys (into float32
lists) and the columns of a cache, and once over all keys with their windows, which adds what the list holds for a key,
rounds once, and takes dscores = sum_n dv v from the sum.

The products are arranged so that no result of a product is transposed before it enters another one: Triton up to 3.7
miscompiles that on Hopper.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.triton_call import jit, tl, triton_call
from pallas_kernels.window_attention.api import Case, Gradients, Operands
from pallas_kernels.window_attention.triton_dkv import call_dkv
from pallas_kernels.window_attention.triton_plan import Plan, plan_arguments
from pallas_kernels.window_attention.triton_tiles import (
    LN_2,
    launch,
    load_rows,
    own_tile,
    query_begins,
    stream,
)


@jit
def _dq_kernel(
    q, k, v,
    begin, counts, index, expiry, never, cache_k, cache_v, cache_position, cache_expiry, cache_survey,
    o, lse, do, dlse, T, U, window, together, dq, terms,
    H: tl.constexpr, K: tl.constexpr, N: tl.constexpr, V: tl.constexpr, C: tl.constexpr, SCALE: tl.constexpr,
    SEGMENTS: tl.constexpr, RETAINED: tl.constexpr, EVEN: tl.constexpr, LSE_GRADIENT: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, N_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, row = own_tile(together)
    tile = tl.cdiv(T, QUERIES) - 1 - tile
    b = (row // H).to(tl.int64)
    head = row % H
    h = head // (H // K)
    t = tile * QUERIES + tl.arange(0, QUERIES)
    i = U - T + t
    i_first = U - T + tile * QUERIES
    i_last = tl.minimum(i_first + QUERIES, U) - 1
    q_tile = load_rows(q + b * T * H * N + head * N, t, H * N, t < T, N, N_BLOCK, True)
    o_tile = load_rows(o + b * T * H * V + head * V, t, H * V, t < T, V, V_BLOCK, True)
    do_tile = load_rows(do + b * T * H * V + head * V, t, H * V, t < T, V, V_BLOCK, True)
    log_sum = tl.load(lse + (b * T + t) * H + head, mask=t < T, other=float("-inf"))
    delta = tl.sum(o_tile.to(tl.float32) * do_tile.to(tl.float32), 1)
    seen = log_sum > float("-inf")
    if LSE_GRADIENT:
        delta -= tl.load(dlse + (b * T + t) * H + head, mask=t < T, other=0.0)
    delta = tl.where(seen, delta, 0.0)
    # In powers of two; a query that saw nothing gets a number that makes every p of it zero.
    lse2 = tl.where(seen, log_sum * 1.4426950408889634, 1e30)
    pair = terms + ((b * H + head) * T + t) * 2
    tl.store(pair, lse2, mask=t < T)
    tl.store(pair + 1, delta, mask=t < T)

    begins, begin_low, begin_high = query_begins(begin + b * U, i, U, SEGMENTS)
    acc = tl.zeros((QUERIES, N_BLOCK), tl.float32)
    acc, lse2, delta = stream(
        q_tile, do_tile, acc, lse2, delta, i, begins, begin_low, begin_high, i_first, i_last, b, h,
        k, v, counts, index, expiry, never, cache_k, cache_v, cache_position, cache_expiry, cache_survey, U, window,
        K, N, V, C, SCALE, SEGMENTS, RETAINED, EVEN, KEYS, N_BLOCK, V_BLOCK, PRECISION, True,
    )  # fmt: skip
    n = tl.arange(0, N_BLOCK)
    dq_rows = dq + b * T * H * N + head * N + t[:, None] * (H * N) + n[None, :]
    acc = acc * (SCALE * LN_2)
    tl.store(dq_rows, acc.to(dq.dtype.element_ty), mask=(t < T)[:, None] & (n < N)[None, :])


def backward(
    case: Case,
    operands: Operands,
    o: jax.Array,
    lse: jax.Array,
    plan: Plan,
    do: jax.Array,
    dlse: jax.Array | None,
) -> Gradients:
    """The gradients of every differentiable operand."""
    dq, terms = _call_dq(case, operands, o, lse, plan, do, dlse)
    lists: tuple[Any, ...] = (None, None)
    if plan.retained is not None:
        lists = call_dkv(case, operands, plan, do, terms, lists, "retained")[:2]
    dk, dv, dscores = call_dkv(case, operands, plan, do, terms, lists, "window")
    columns: tuple[Any, ...] = (None, None)
    if case.C:
        columns = call_dkv(case, operands, plan, do, terms, (None, None), "cache")[:2]
    return Gradients(dq, dk, dv, dscores if case.scores else None, *columns)


def _call_dq(
    case: Case, operands: Operands, o: jax.Array, lse: jax.Array, plan: Plan, do: jax.Array, dlse: Any
) -> tuple[jax.Array, ...]:
    """(dq, terms [B,H,T,2]: lse in powers of two, and delta)."""
    together, launched = launch(case, "dq", case.T)
    terms = jax.ShapeDtypeStruct((case.B, case.H, case.T, 2), jnp.float32)
    return triton_call(
        _dq_kernel,
        operands.q,
        operands.k,
        operands.v,
        *plan_arguments(operands, plan),
        o,
        lse,
        do,
        dlse,
        case.T,
        case.U,
        case.width,
        together,
        out_shape=(jax.ShapeDtypeStruct(operands.q.shape, operands.q.dtype), terms),
        LSE_GRADIENT=dlse is not None,
        **launched,
    )
