"""Window attention in triton.language: dk and dv, over tiles of keys, of retained keys, or of a cache's columns."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.tiles import ceil_div
from pallas_kernels.triton_call import jit, tl, triton_call
from pallas_kernels.window_attention.api import Case, Operands
from pallas_kernels.window_attention.triton_plan import Plan, plan_arguments
from pallas_kernels.window_attention.triton_tiles import (
    FAR,
    LN_2,
    launch,
    load_rows,
    own_tile,
    span_of,
)

# How many tiles of queries (of all the heads of a group) make another program for a tile of retained keys worth its
# sums, which are read again, and how many programs share a tile at most: measured on an H200.
STEPS = 128
PARTS = 8


@jit
def _add_queries(
    keys, values, position, low, span, q, do, terms, begin, head, t_first, masked, T, U, dk, dv,
    H: tl.constexpr, N: tl.constexpr, V: tl.constexpr, SCALE: tl.constexpr, SEGMENTS: tl.constexpr,
    QUERIES: tl.constexpr, N_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv with one more tile of queries of one head (of the batch row's), from t_first on to T."""
    t = t_first + tl.arange(0, QUERIES)
    row = t
    if masked:
        row = tl.minimum(t, T - 1)
    q_tile = load_rows(q + head * N, row, H * N, None, N, N_BLOCK, False)
    do_tile = load_rows(do + head * V, row, H * V, None, V, V_BLOCK, False)
    # Both terms of 64 queries are one load of a number for each of 128 threads. With fewer numbers than threads, Triton
    # would load them in the layout of the product: 32 copies of four bytes by every thread.
    n = tl.arange(0, 2 * QUERIES)
    pair = t_first + n // 2
    if masked:
        pair = tl.minimum(pair, T - 1)
    both = tl.load(terms + (head * T + pair) * 2 + n % 2)
    lse2, delta = tl.split(tl.reshape(both, (QUERIES, 2)))
    logits = tl.dot(keys, tl.trans(q_tile), input_precision=PRECISION)
    p = tl.exp2(logits * SCALE - lse2[None, :])
    if masked:
        i = U - T + t
        mask = (i[None, :] - low[:, None]).to(tl.uint32) < span[:, None]
        if SEGMENTS:
            begins = tl.load(begin + i, mask=t < T, other=FAR)
            mask = mask & (begins[None, :] <= position[:, None])
        p = tl.where(mask, p, 0.0)
    dv = tl.dot(p.to(do_tile.dtype), do_tile, dv, input_precision=PRECISION)
    dp = tl.dot(values, tl.trans(do_tile), input_precision=PRECISION)
    ds = p * (dp - delta[None, :])
    dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision=PRECISION)
    return dk, dv


@jit
def _intervals(
    c, c_first, group, b, h, counts, index, expiry, never, cache_position, cache_expiry, cache_survey, ends, U, window,
    K: tl.constexpr, C: tl.constexpr, SEGMENTS: tl.constexpr, KEYS: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Of the keys c: (count, row, position, low, high), and of their tile: (first, end, whole, whole_end).

    ``row``: where the key lies; ``position``: an index in its document; [low, high): the query indices that see it.
    Queries in [first, end) see some key of the tile, those in [whole, whole_end) every one that exists.
    """
    if KIND == "window":
        count = U
        row = c
        position = c
        low = c
        high = c + window
        i_first = c_first
        last = tl.minimum(c_first + KEYS, U) - 1
        i_end = tl.minimum(U, last + window)
        whole = last
        whole_end = tl.minimum(U, c_first + window)
        if SEGMENTS:
            end = tl.load(ends + b * U + c, mask=c < U, other=0)
            i_end = tl.minimum(i_end, tl.max(end, 0))
            whole_end = tl.minimum(whole_end, tl.load(ends + b * U + c_first))
    elif KIND == "retained":
        count = tl.load(counts + group * U + U - 1)
        row = tl.load(index + group * U + c, mask=c < count, other=0)
        position = row
        low = row + window
        high = tl.load(expiry + group * U + c, mask=c < count, other=0)
        i_first = tl.min(tl.where(c < count, low, FAR), 0)
        i_end = tl.minimum(U, tl.max(high, 0))
        whole = tl.max(tl.where(c < count, low, 0), 0)
        whole_end = tl.where(tl.load(never + group) != 0, U, 0)
        if SEGMENTS:
            end = tl.load(ends + b * U + row, mask=c < count, other=0)
            i_end = tl.minimum(i_end, tl.max(end, 0))
            whole_end = tl.minimum(whole_end, tl.min(tl.where(c < count, end, FAR), 0))
    else:
        count = tl.load(cache_survey + group * 3)
        row = c
        low = tl.load(cache_position + (b * C + c) * K + h, mask=c < count, other=0) + window
        high = tl.load(cache_expiry + (b * C + c) * K + h, mask=c < count, other=0)
        document = tl.load(cache_survey + group * 3 + 2)
        position = tl.zeros_like(c) + document
        i_first = tl.maximum(tl.min(tl.where(high > 0, low, FAR), 0), 0)
        i_end = tl.minimum(U, tl.max(high, 0))
        whole = tl.load(cache_survey + group * 3 + 1)
        whole_end = U
        if SEGMENTS:
            i_end = tl.minimum(i_end, tl.load(ends + b * U + document, mask=document < U, other=0))
    return count, row, position, low, high, i_first, i_end, whole, whole_end


@jit
def _parts(count, U, most, KEYS: tl.constexpr):
    """(tiles, parts) of a list of ``count`` retained keys: the queries of each tile go to as many programs.

    Few retained keys of a long row are few tiles, each with many queries. The parts of the gradients lie one behind the
    other in the list's own array, so there are as many as it has room for.
    """
    tiles = tl.cdiv(tl.maximum(count, 1), KEYS)
    return tiles, tl.minimum(tl.maximum(U // (tiles * KEYS), 1), most)


@jit
def _sum_parts(gradients, slot, stride, parts, listed, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """What the list holds for keys, zero for those that it does not list."""
    total = tl.zeros((slot.shape[0], BLOCK), tl.float32)
    # Two at a time, so that one's way through memory is the other's too.
    for first in range(0, tl.where(tl.max(listed.to(tl.int32), 0) > 0, parts, 0), 2):
        for part in tl.static_range(2):
            there = listed & (first + part < parts)
            total += load_rows(gradients, slot + (first + part) * stride, SIZE, there, SIZE, BLOCK, True)
    return total


@jit
def _share(n, part, parts):
    """(first, end) of a part's share of 0..n."""
    share = tl.cdiv(n, parts)
    return tl.minimum(part * share, n), tl.minimum(part * share + share, n)


@jit
def _following(other, tile, tiles, HEADS: tl.constexpr):
    """The (head of the group, tile) after another one. Divisions would be as long as a quarter of a tile's products."""
    tile += 1
    if HEADS > 1:
        last = tile == tiles
        other += tl.where(last, 1, 0)
        tile = tl.where(last, 0, tile)
    return other, tile


@jit
def _gradients(
    keys, values, position, low, high, i_first, i_end, whole, whole_end, part, parts, b, h,
    q, do, terms, begin, T, U, dk, dv,
    H: tl.constexpr, K: tl.constexpr, N: tl.constexpr, V: tl.constexpr, SCALE: tl.constexpr, SEGMENTS: tl.constexpr,
    QUERIES: tl.constexpr, N_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of a tile of keys: a part of what every head of the group adds, through the queries that see one."""
    # From query indices to query numbers t, in tiles: masked, whole from whole to whole_end, masked to the end.
    skip = U - T
    first = tl.maximum(i_first - skip, 0)
    end_t = tl.maximum(i_end - skip, first)
    before = tl.cdiv(tl.maximum(tl.minimum(whole - skip, end_t) - first, 0), QUERIES)
    whole = first + before * QUERIES
    whole_tiles = tl.maximum(tl.minimum(whole_end - skip, end_t) - whole, 0) // QUERIES
    whole_end = whole + whole_tiles * QUERIES
    masked_tiles = before + tl.cdiv(tl.maximum(end_t - whole_end, 0), QUERIES)
    span = span_of(low, tl.minimum(high, U))  # so that no query behind the last one is seen
    begin += b * U
    q += b * T * H * N
    do += b * T * H * V
    terms += b * T * H * 2
    # One loop over the heads of the group and their tiles: nested ones would spill registers.
    head = (h * (H // K)).to(tl.int32)
    start, end = _share((H // K) * masked_tiles, part, parts)
    other, tile = start // tl.maximum(masked_tiles, 1), start % tl.maximum(masked_tiles, 1)
    for _ in range(start, end):
        t_first = tl.where(tile < before, first + tile * QUERIES, whole_end + (tile - before) * QUERIES)
        dk, dv = _add_queries(
            keys, values, position, low, span, q, do, terms, begin, head + other, t_first, True,
            T, U, dk, dv, H, N, V, SCALE, SEGMENTS, QUERIES, N_BLOCK, V_BLOCK, PRECISION,
        )  # fmt: skip
        other, tile = _following(other, tile, masked_tiles, H // K)
    start, end = _share((H // K) * whole_tiles, part, parts)
    other, tile = start // tl.maximum(whole_tiles, 1), start % tl.maximum(whole_tiles, 1)
    for _ in range(start, end):
        dk, dv = _add_queries(
            keys, values, position, low, span, q, do, terms, begin, head + other,
            whole + tile * QUERIES, False,
            T, U, dk, dv, H, N, V, SCALE, SEGMENTS, QUERIES, N_BLOCK, V_BLOCK, PRECISION,
        )  # fmt: skip
        other, tile = _following(other, tile, whole_tiles, H // K)
    return dk * (SCALE * LN_2), dv


@jit
def _dkv_kernel(
    q, k, v,
    begin, counts, index, expiry, never, cache_k, cache_v, cache_position, cache_expiry, cache_survey,
    ends, do, terms, listed_dk, listed_dv, T, U, window, together, most, dk, dv, dscores,
    H: tl.constexpr, K: tl.constexpr, N: tl.constexpr, V: tl.constexpr, C: tl.constexpr, SCALE: tl.constexpr,
    SEGMENTS: tl.constexpr, RETAINED: tl.constexpr, EVEN: tl.constexpr, SCORES: tl.constexpr, KIND: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, N_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # KIND "window": all keys; "retained": the list, into its order; "cache": the columns of a cache.
    tile, group = own_tile(together)
    group = group.to(tl.int64)
    b = group // K
    h = group % K
    part = 0
    parts = 1
    if KIND == "retained":
        list_tiles, parts = _parts(tl.load(counts + group * U + U - 1), U, most, KEYS)
        part = tile % parts
        tile = tile // parts
    c_first = tile * KEYS
    c = c_first + tl.arange(0, KEYS)
    count, row, position, low, high, i_first, i_end, whole, whole_end = _intervals(
        c, c_first, group, b, h, counts, index, expiry, never, cache_position, cache_expiry, cache_survey, ends, U,
        window, K, C, SEGMENTS, KEYS, KIND,
    )  # fmt: skip
    # Every slot of a cache is written, those without a key as zero.
    if (c_first < count) | (KIND == "cache"):
        exists = c < count
        if KIND == "cache":
            keys_head = cache_k + b * C * K * N + h * N
            values_head = cache_v + b * C * K * V + h * V
        else:
            keys_head = k + b * U * K * N + h * N
            values_head = v + b * U * K * V + h * V
        keys = load_rows(keys_head, row, K * N, exists, N, N_BLOCK, True)
        values = load_rows(values_head, row, K * V, exists, V, V_BLOCK, True)
        dk_tile, dv_tile = _gradients(
            keys, values, position, low, high, i_first, i_end, whole, whole_end, part, parts, b, h,
            q, do, terms, begin, T, U,
            tl.zeros((KEYS, N_BLOCK), tl.float32), tl.zeros((KEYS, V_BLOCK), tl.float32),
            H, K, N, V, SCALE, SEGMENTS, QUERIES, N_BLOCK, V_BLOCK, PRECISION,
        )  # fmt: skip
        n = tl.arange(0, N_BLOCK)[None, :]
        m = tl.arange(0, V_BLOCK)[None, :]
        if KIND == "retained":
            slot = (group * U + part * list_tiles * KEYS + c)[:, None]
            tl.store(dk + slot * N + n, dk_tile, mask=exists[:, None] & (n < N))
            tl.store(dv + slot * V + m, dv_tile, mask=exists[:, None] & (m < V))
        elif KIND == "cache":
            slot = (b * C + c)[:, None]
            dk_tile = tl.where(exists[:, None], dk_tile, 0.0).to(dk.dtype.element_ty)
            dv_tile = tl.where(exists[:, None], dv_tile, 0.0).to(dv.dtype.element_ty)
            tl.store(dk + slot * (K * N) + h * N + n, dk_tile, mask=(c < C)[:, None] & (n < N))
            tl.store(dv + slot * (K * V) + h * V + m, dv_tile, mask=(c < C)[:, None] & (m < V))
        else:
            if RETAINED:
                place = tl.load(counts + group * U + c, mask=exists, other=0)
                listed = place > tl.load(counts + group * U + c - 1, mask=exists & (c > 0), other=0)
                list_tiles, parts = _parts(tl.load(counts + group * U + U - 1), U, most, KEYS)
                slot = group * U + place - 1
                stride = list_tiles * KEYS
                dk_tile += _sum_parts(listed_dk, slot, stride, parts, listed, N, N_BLOCK)
                dv_tile += _sum_parts(listed_dv, slot, stride, parts, listed, V, V_BLOCK)
            if SCORES:
                products = dv_tile * values.to(tl.float32)
                tl.store(dscores + (b * U + c) * K + h, tl.sum(products, 1), mask=exists)
            slot = (b * U + c)[:, None]
            tl.store(dk + slot * (K * N) + h * N + n, dk_tile.to(dk.dtype.element_ty), mask=exists[:, None] & (n < N))
            tl.store(dv + slot * (K * V) + h * V + m, dv_tile.to(dv.dtype.element_ty), mask=exists[:, None] & (m < V))


def call_dkv(
    case: Case,
    operands: Operands,
    plan: Plan,
    do: jax.Array,
    terms: jax.Array,
    lists: tuple[Any, ...],
    kind: str,
) -> tuple[jax.Array, ...]:
    """(dk, dv, dscores) of the keys, of the list of retained keys (float32, in its order), or of a cache's columns."""
    length = case.C if kind == "cache" else case.U
    together, launched = launch(case, "dkv", length)
    steps = ceil_div(case.T, launched["QUERIES"]) * (case.H // case.K)
    scores = kind == "window" and case.scores
    listed = kind == "retained"
    shapes = [(case.B, case.K, length, n) if listed else (case.B, length, case.K, n) for n in (case.N, case.V)]
    dtype = jnp.float32 if listed else operands.k.dtype
    return triton_call(
        _dkv_kernel,
        operands.q,
        operands.k,
        operands.v,
        *plan_arguments(operands, plan),
        plan.bounds.end if plan.bounds is not None else None,
        do,
        terms,
        *lists,
        case.T,
        case.U,
        case.width,
        together,
        min(PARTS, ceil_div(steps, STEPS)),
        out_shape=(
            jax.ShapeDtypeStruct(shapes[0], dtype),
            jax.ShapeDtypeStruct(shapes[1], dtype),
            jax.ShapeDtypeStruct((case.B, case.U, case.K) if scores else (1,), jnp.float32),
        ),
        SCORES=scores,
        KIND=kind,
        **launched,
    )
