"""Window attention in triton.language: the backward pass, without atomics, so that a second run gives the same bits.

    p_tj = exp(scale q_t . k_j - lse_t)                dv_j = sum_t p_tj do_t
    ds_tj = p_tj (do_t . v_j - delta_t)                dq_t = scale sum_j ds_tj k_j,   dk_j = scale sum_t ds_tj q_t

Three kernels. ``dq`` goes over the tiles of queries as the forward pass does, and writes delta and lse for the others.
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
from pallas_kernels.window_attention.triton import (
    cache_tiles,
    load_rows,
    options,
    plan_arguments,
    query_begins,
    retained_tiles,
    tiles_for,
    visible,
    window_of,
    window_tiles,
)


@jit
def _dq_step(
    q, do, keys, values, mask, lse2, delta, dq, SCALE: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr
):
    logits = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
    p = tl.exp2(logits * SCALE - lse2[:, None])
    if MASKED:
        p = tl.where(mask, p, 0.0)
    dp = tl.dot(do, tl.trans(values), input_precision=PRECISION)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(keys.dtype), keys, dq, input_precision=PRECISION)


@jit
def _dq_kernel(
    q,
    k,
    v,
    begin,
    counts,
    index,
    expiry,
    never,
    cache_k,
    cache_v,
    cache_position,
    cache_expiry,
    cache_survey,
    o,
    lse,
    do,
    dlse,
    T,
    U,
    window,
    dq,
    delta_rows,
    lse2_rows,
    H: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    SCALE: tl.constexpr,
    SEGMENTS: tl.constexpr,
    RETAINED: tl.constexpr,
    LSE_GRADIENT: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    N_BLOCK: tl.constexpr,
    V_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    row = tl.program_id(1)
    b = (row // H).to(tl.int64)
    head = row % H
    h = head // (H // K)
    group = b * K + h
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
    tl.store(delta_rows + (b * H + head) * T + t, delta, mask=t < T)
    tl.store(lse2_rows + (b * H + head) * T + t, lse2, mask=t < T)

    begins, begin_low, begin_high = query_begins(begin + b * U, i, U, SEGMENTS)
    acc = tl.zeros((QUERIES, N_BLOCK), tl.float32)
    lane = tl.arange(0, KEYS)
    k_head = k + b * U * K * N + h * N
    v_head = v + b * U * K * V + h * V
    first, whole, whole_end, end = window_tiles(i_first, i_last, begin_low, begin_high, window, KEYS)
    for j_first in range(whole, whole_end, KEYS):
        j = j_first + lane
        keys = load_rows(k_head, j, K * N, j < U, N, N_BLOCK, False)
        values = load_rows(v_head, j, K * V, j < U, V, V_BLOCK, False)
        acc = _dq_step(q_tile, do_tile, keys, values, None, lse2, delta, acc, SCALE, False, PRECISION)
    before = (whole - first) // KEYS
    for n in range(0, before + tl.cdiv(end - whole_end, KEYS)):
        j = tl.where(n < before, first + n * KEYS, whole_end + (n - before) * KEYS) + lane
        keys = load_rows(k_head, j, K * N, j < U, N, N_BLOCK, True)
        values = load_rows(v_head, j, K * V, j < U, V, V_BLOCK, True)
        mask = visible(i, begins, j, j, j + window, SEGMENTS)
        acc = _dq_step(q_tile, do_tile, keys, values, mask, lse2, delta, acc, SCALE, True, PRECISION)

    if RETAINED:
        first, whole_end, end = retained_tiles(
            counts + group * U, never + group, U, i_first, i_last, begin_low, begin_high, window, KEYS
        )
        for c_first in range(first, whole_end, KEYS):
            j = tl.load(index + group * U + c_first + lane)
            keys = load_rows(k_head, j, K * N, j < U, N, N_BLOCK, False)
            values = load_rows(v_head, j, K * V, j < U, V, V_BLOCK, False)
            acc = _dq_step(q_tile, do_tile, keys, values, None, lse2, delta, acc, SCALE, False, PRECISION)
        for c_first in range(whole_end, end, KEYS):
            c = c_first + lane
            j = tl.load(index + group * U + c, mask=c < end, other=0)
            high = tl.load(expiry + group * U + c, mask=c < end, other=0)
            keys = load_rows(k_head, j, K * N, c < end, N, N_BLOCK, True)
            values = load_rows(v_head, j, K * V, c < end, V, V_BLOCK, True)
            mask = visible(i, begins, j, j + window, high, SEGMENTS)
            acc = _dq_step(q_tile, do_tile, keys, values, mask, lse2, delta, acc, SCALE, True, PRECISION)

    if C > 0:
        whole_end, end, document = cache_tiles(cache_survey + group * 3, i_first, begin_low, begin_high, KEYS)
        k_head = cache_k + b * C * K * N + h * N
        v_head = cache_v + b * C * K * V + h * V
        for c_first in range(0, end, KEYS):
            c = c_first + lane
            low = tl.load(cache_position + (b * C + c) * K + h, mask=c < end, other=0) + window
            high = tl.load(cache_expiry + (b * C + c) * K + h, mask=c < end, other=0)
            keys = load_rows(k_head, c, K * N, c < end, N, N_BLOCK, True)
            values = load_rows(v_head, c, K * V, c < end, V, V_BLOCK, True)
            mask = visible(i, begins, tl.zeros_like(low) + document, low, high, SEGMENTS)
            acc = _dq_step(q_tile, do_tile, keys, values, mask, lse2, delta, acc, SCALE, True, PRECISION)

    n = tl.arange(0, N_BLOCK)
    dq_rows = dq + b * T * H * N + head * N + t[:, None] * (H * N) + n[None, :]
    acc = acc * (SCALE * 0.6931471805599453)
    tl.store(dq_rows, acc.to(dq.dtype.element_ty), mask=(t < T)[:, None] & (n < N)[None, :])


@jit
def _dkv_tile(
    keys,
    values,
    position,
    low,
    high,
    q_head,
    do_head,
    delta_row,
    lse2_row,
    begin,
    t_first,
    T,
    U,
    dk,
    dv,
    H: tl.constexpr,
    N: tl.constexpr,
    V: tl.constexpr,
    SCALE: tl.constexpr,
    SEGMENTS: tl.constexpr,
    QUERIES: tl.constexpr,
    N_BLOCK: tl.constexpr,
    V_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """dk and dv with one more tile of queries of one head, from t_first on."""
    t = t_first + tl.arange(0, QUERIES)
    q_tile = load_rows(q_head, t, H * N, t < T, N, N_BLOCK, MASKED)
    do_tile = load_rows(do_head, t, H * V, t < T, V, V_BLOCK, MASKED)
    if MASKED:
        lse2 = tl.load(lse2_row + t, mask=t < T, other=1e30)
        delta = tl.load(delta_row + t, mask=t < T, other=0.0)
    else:
        lse2 = tl.load(lse2_row + t)
        delta = tl.load(delta_row + t)
    logits = tl.dot(keys, tl.trans(q_tile), input_precision=PRECISION)
    p = tl.exp2(logits * SCALE - lse2[None, :])
    if MASKED:
        i = U - T + t
        mask = (i[None, :] >= low[:, None]) & (i[None, :] < high[:, None]) & (t < T)[None, :]
        if SEGMENTS:
            begins = tl.load(begin + i, mask=t < T, other=2**30)
            mask = mask & (begins[None, :] <= position[:, None])
        p = tl.where(mask, p, 0.0)
    dv = tl.dot(p.to(do_tile.dtype), do_tile, dv, input_precision=PRECISION)
    dp = tl.dot(values, tl.trans(do_tile), input_precision=PRECISION)
    ds = p * (dp - delta[None, :])
    dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision=PRECISION)
    return dk, dv


@jit
def _dkv_kernel(
    q,
    k,
    v,
    begin,
    counts,
    index,
    expiry,
    never,
    cache_k,
    cache_v,
    cache_position,
    cache_expiry,
    cache_survey,
    ends,
    do,
    delta_rows,
    lse2_rows,
    listed_dk,
    listed_dv,
    T,
    U,
    window,
    dk,
    dv,
    dscores,
    H: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    SCALE: tl.constexpr,
    SEGMENTS: tl.constexpr,
    RETAINED: tl.constexpr,
    SCORES: tl.constexpr,
    KIND: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    N_BLOCK: tl.constexpr,
    V_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # KIND "window": all keys; "retained": the list, into listed order; "cache": the columns of a cache.
    group = tl.program_id(1).to(tl.int64)
    b = group // K
    h = group % K
    c = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    c_first = tl.program_id(0) * KEYS
    # Per row: the interval of query indices that see the key, and a position by which its document is known; for the
    # tile: the lowest and highest query of any, and the interval of those that see every key that exists.
    if KIND == "window":
        count = U
        exists = c < U
        row = c
        position = c
        low = c
        high = c + window
        i_first = c_first
        last = tl.minimum(c_first + KEYS, U)
        i_end = tl.minimum(U, last - 1 + window)
        whole = last - 1
        whole_end = tl.minimum(U, c_first + window)
        if SEGMENTS:
            end = tl.load(ends + b * U + c, mask=exists, other=0)
            i_end = tl.minimum(i_end, tl.max(end, 0))
            whole_end = tl.minimum(whole_end, tl.load(ends + b * U + c_first))
        keys_head = k + b * U * K * N + h * N
        values_head = v + b * U * K * V + h * V
    elif KIND == "retained":
        count = tl.load(counts + group * U + U - 1)
        exists = c < count
        row = tl.load(index + group * U + c, mask=exists, other=0)
        position = row
        low = row + window
        high = tl.load(expiry + group * U + c, mask=exists, other=0)
        i_first = tl.min(tl.where(exists, low, 2**30), 0)
        i_end = tl.minimum(U, tl.max(high, 0))
        whole = tl.max(tl.where(exists, low, 0), 0)
        whole_end = tl.where(tl.load(never + group) != 0, U, 0)
        if SEGMENTS:
            end = tl.load(ends + b * U + row, mask=exists, other=0)
            i_end = tl.minimum(i_end, tl.max(end, 0))
            whole_end = tl.minimum(whole_end, tl.min(tl.where(exists, end, 2**30), 0))
        keys_head = k + b * U * K * N + h * N
        values_head = v + b * U * K * V + h * V
    else:
        count = tl.load(cache_survey + group * 3)
        exists = c < count
        row = c
        low = tl.load(cache_position + (b * C + c) * K + h, mask=exists, other=0) + window
        high = tl.load(cache_expiry + (b * C + c) * K + h, mask=exists, other=0)
        document = tl.load(cache_survey + group * 3 + 2)
        position = tl.zeros_like(c) + document
        i_first = tl.maximum(tl.min(tl.where(high > 0, low, 2**30), 0), 0)
        i_end = tl.minimum(U, tl.max(high, 0))
        whole = tl.load(cache_survey + group * 3 + 1)
        whole_end = U
        if SEGMENTS:
            end = tl.load(ends + b * U + document, mask=document < U, other=0)
            i_end = tl.minimum(i_end, end)
            whole_end = tl.minimum(whole_end, end)
        keys_head = cache_k + b * C * K * N + h * N
        values_head = cache_v + b * C * K * V + h * V
    dk_tile = tl.zeros((KEYS, N_BLOCK), tl.float32)
    dv_tile = tl.zeros((KEYS, V_BLOCK), tl.float32)
    if (c_first < count) | (KIND == "cache"):
        keys = load_rows(keys_head, row, K * N, exists, N, N_BLOCK, True)
        values = load_rows(values_head, row, K * V, exists, V, V_BLOCK, True)
        # From query indices to query numbers t, in tiles: masked, whole from whole to whole_end, masked to the end.
        skip = U - T
        first = tl.maximum(i_first - skip, 0)
        end_t = tl.maximum(i_end - skip, first)
        before = tl.cdiv(tl.maximum(tl.minimum(whole - skip, end_t) - first, 0), QUERIES)
        whole = first + before * QUERIES
        whole_tiles = tl.maximum(tl.minimum(whole_end - skip, end_t) - whole, 0) // QUERIES
        whole_end = whole + whole_tiles * QUERIES
        masked_tiles = before + tl.cdiv(tl.maximum(end_t - whole_end, 0), QUERIES)
        begin_row = begin + b * U
        for g in range(0, H // K):
            head = h * (H // K) + g
            q_head = q + b * T * H * N + head * N
            do_head = do + b * T * H * V + head * V
            delta_row = delta_rows + (b * H + head) * T
            lse2_row = lse2_rows + (b * H + head) * T
            for n in range(0, masked_tiles):
                t_first = tl.where(n < before, first + n * QUERIES, whole_end + (n - before) * QUERIES)
                dk_tile, dv_tile = _dkv_tile(
                    keys, values, position, low, high, q_head, do_head, delta_row, lse2_row, begin_row, t_first, T, U,
                    dk_tile, dv_tile, H, N, V, SCALE, SEGMENTS, QUERIES, N_BLOCK, V_BLOCK, PRECISION, True,
                )  # fmt: skip
            for n in range(0, whole_tiles):
                t_first = whole + n * QUERIES
                dk_tile, dv_tile = _dkv_tile(
                    keys, values, position, low, high, q_head, do_head, delta_row, lse2_row, begin_row, t_first, T, U,
                    dk_tile, dv_tile, H, N, V, SCALE, SEGMENTS, QUERIES, N_BLOCK, V_BLOCK, PRECISION, False,
                )  # fmt: skip
        dk_tile = dk_tile * (SCALE * 0.6931471805599453)
        n = tl.arange(0, N_BLOCK)[None, :]
        n_exists = exists[:, None] & (n < N)
        v_column = tl.arange(0, V_BLOCK)[None, :]
        v_exists = exists[:, None] & (v_column < V)
        if KIND == "retained":
            slot = (group * U + c)[:, None]
            tl.store(dk + slot * N + n, dk_tile, mask=n_exists)
            tl.store(dv + slot * V + v_column, dv_tile, mask=v_exists)
        else:
            if KIND == "window" and RETAINED:
                counts_row = counts + group * U
                place = tl.load(counts_row + c, mask=exists, other=0)
                listed = place > tl.load(counts_row + c - 1, mask=exists & (c > 0), other=0)
                slot = (group * U + place - 1)[:, None]
                dk_tile += tl.load(listed_dk + slot * N + n, mask=listed[:, None] & n_exists, other=0.0)
                dv_tile += tl.load(listed_dv + slot * V + v_column, mask=listed[:, None] & v_exists, other=0.0)
            if SCORES:
                tl.store(dscores + (b * U + c) * K + h, tl.sum(dv_tile * values.to(tl.float32), 1), mask=exists)
            if KIND == "window":
                slot = (b * U + c)[:, None]
            else:
                # Every slot is written, those without a key as zero.
                slot = (b * C + c)[:, None]
                dk_tile = tl.where(exists[:, None], dk_tile, 0.0)
                dv_tile = tl.where(exists[:, None], dv_tile, 0.0)
                n_exists = (c < C)[:, None] & (n < N)
                v_exists = (c < C)[:, None] & (v_column < V)
            tl.store(dk + slot * (K * N) + h * N + n, dk_tile.to(dk.dtype.element_ty), mask=n_exists)
            tl.store(dv + slot * (K * V) + h * V + v_column, dv_tile.to(dv.dtype.element_ty), mask=v_exists)


def backward(
    case: Case,
    operands: Operands,
    o: jax.Array,
    lse: jax.Array,
    plan: dict[str, Any],
    do: jax.Array,
    dlse: jax.Array | None,
) -> Gradients:
    """The gradients of every differentiable operand."""
    dq, delta, lse2 = _call_dq(case, operands, o, lse, plan, do, dlse)
    lists = (None, None)
    if plan["retained"] is not None:
        lists = _call_dkv(case, operands, plan, do, delta, lse2, lists, "retained")[:2]
    dk, dv, dscores = _call_dkv(case, operands, plan, do, delta, lse2, lists, "window")
    columns = (None, None)
    if case.C:
        columns = _call_dkv(case, operands, plan, do, delta, lse2, (None, None), "cache")[:2]
    return Gradients(dq, dk, dv, dscores if case.scores else None, *columns)


def _call_dq(
    case: Case, operands: Operands, o: jax.Array, lse: jax.Array, plan: dict[str, Any], do: jax.Array, dlse: Any
) -> tuple[jax.Array, ...]:
    """(dq, delta [B,H,T], lse in powers of two [B,H,T])."""
    tiles = tiles_for(case, "dq")
    rows = jax.ShapeDtypeStruct((case.B, case.H, case.T), jnp.float32)
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
        window_of(case),
        out_shape=(jax.ShapeDtypeStruct(operands.q.shape, operands.q.dtype), rows, rows),
        grid=(-(-case.T // tiles.queries), case.B * case.H),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        LSE_GRADIENT=dlse is not None,
        **options(case, tiles),
    )


def _call_dkv(
    case: Case,
    operands: Operands,
    plan: dict[str, Any],
    do: jax.Array,
    delta: jax.Array,
    lse2: jax.Array,
    lists: tuple[Any, Any],
    kind: str,
) -> tuple[jax.Array, ...]:
    """(dk, dv, dscores) of the keys, of the list of retained keys (float32, in its order), or of a cache's columns."""
    tiles = tiles_for(case, "dkv")
    scores = kind == "window" and case.scores
    dtype = jnp.float32 if kind == "retained" else operands.k.dtype
    if kind == "retained":
        shapes = [(case.B, case.K, case.U, size) for size in (case.N, case.V)]
    else:
        shapes = [(case.B, case.C if kind == "cache" else case.U, case.K, size) for size in (case.N, case.V)]
    return triton_call(
        _dkv_kernel,
        operands.q,
        operands.k,
        operands.v,
        *plan_arguments(operands, plan),
        plan["bounds"].end if plan["bounds"] is not None else None,
        do,
        delta,
        lse2,
        *lists,
        case.T,
        case.U,
        window_of(case),
        out_shape=(
            jax.ShapeDtypeStruct(shapes[0], dtype),
            jax.ShapeDtypeStruct(shapes[1], dtype),
            jax.ShapeDtypeStruct((case.B, case.U, case.K) if scores else (1,), jnp.float32),
        ),
        grid=(-(-shapes[0][2 if kind == "retained" else 1] // tiles.keys), case.B * case.K),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        SCORES=scores,
        KIND=kind,
        **options(case, tiles),
    )
