"""Block attention in triton.language: one token per sequence over a cache that is updated in place, in two launches.

First: one program of each sequence and KV head selects, others share the block means and the window, and write the new
token and the mean of the block that it completes. Second: programs share the selected blocks; the one that comes last
in its row joins all parts under the gates. Which one that is decides nothing, as parts are joined in their order. So a
single sequence fills the GPU too.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from pallas_kernels.block_attention.blocks import BlockCache
from pallas_kernels.block_attention.triton import columns, online, store_chosen
from pallas_kernels.block_attention.triton_tiles import load_keys, power_of_2, shared_constants, slots
from pallas_kernels.tiles import ceil_div
from pallas_kernels.triton_call import fold_batch, jit, tl, triton_call


@jit
def _group(q, row, G: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The queries that read one KV head, of all the (sequence, KV head) rows the given one."""
    g, n = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    mask = (g < G)[:, None] & (n < SIZE)[None, :]
    return tl.load(q + (row * G + g)[:, None] * SIZE + n[None, :], mask=mask, other=0.0)


@jit
def _leave(sums, tops, weights, acc, m, l, part, G: tl.constexpr, V: tl.constexpr, V_BLOCK: tl.constexpr):
    """A part of a softmax: sums of values, the largest logit in base 2, and the sum of weights, of each query."""
    g, n = tl.arange(0, acc.shape[0]), tl.arange(0, V_BLOCK)
    place = part * G + g
    tl.store(tops + place, m, mask=g < G)
    tl.store(weights + place, l, mask=g < G)
    tl.store(sums + place[:, None] * V + n[None, :], acc, mask=(g < G)[:, None] & (n < V)[None, :])


@jit
def _token(new, like, row, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """The new token's key or value as the cache holds it."""
    n = tl.arange(0, BLOCK)
    return tl.load(new + row * SIZE + n, mask=n < SIZE, other=0.0).to(like.dtype.element_ty)


@jit
def _mean(cache, token, t, S: tl.constexpr, K: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """The mean of the block that token t completes, as the cache holds it; its last row may not be written yet."""
    s, n = tl.arange(0, S), tl.arange(0, BLOCK)
    old = (s < S - 1)[:, None] & (n < SIZE)[None, :]
    rows = tl.load(cache + (t - (S - 1) + s)[:, None] * (K * SIZE) + n[None, :], mask=old, other=0.0)
    return ((tl.sum(rows.to(tl.float32), 0) + token.to(tl.float32)) * (1.0 / S)).to(token.dtype)


@jit
def _one_more(queries, key, value, exists, acc, m, l, SCALE: tl.constexpr):
    """One more key [N] of a softmax with its value, if it exists."""
    logit = tl.sum(queries.to(tl.float32) * key.to(tl.float32)[None, :], 1) * SCALE
    logit = tl.where(exists, logit, float("-inf"))
    m_new = tl.maximum(m, logit)
    p, fade = tl.exp2(logit - m_new), tl.exp2(m - m_new)
    return acc * fade[:, None] + p[:, None] * value.to(tl.float32)[None, :], m_new, l * fade + p


@jit
def _mean_logits(queries, pooled_k, entry, old, K: tl.constexpr, N: tl.constexpr, SCALE: tl.constexpr,
                 N_BLOCK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """[blocks, queries], in base 2, of the ``old`` blocks in the cache."""
    keys = load_keys(pooled_k, entry, old, K, N, N_BLOCK).to(queries.dtype)
    logits = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * SCALE
    return tl.where((entry < old)[:, None], logits, float("-inf"))


@jit
def _select(
    queries, pooled_k, old, completes, mean, current, selected, scratch, C_BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    WARPS: tl.constexpr, M: tl.constexpr, SLOTS: tl.constexpr, K: tl.constexpr, G: tl.constexpr, N: tl.constexpr,
    SCALE: tl.constexpr, ROWS: tl.constexpr, N_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes the numbers of the selected blocks, ascending; -1 fills up."""
    part, g = tl.arange(0, CHUNK), tl.arange(0, ROWS)
    none = tl.zeros([ROWS, 1], tl.float32)
    m, l = tl.full([ROWS], -1e30, tl.float32), tl.zeros([ROWS], tl.float32)
    _, m, l = _one_more(queries, mean, tl.zeros([1], tl.float32), completes, none, m, l, SCALE)
    for start in range(0, old, CHUNK):
        logits = _mean_logits(queries, pooled_k, start + part, old, K, N, SCALE, N_BLOCK, PRECISION)
        m_new = tl.maximum(m, tl.max(logits, 0))
        l = l * tl.exp2(m - m_new) + tl.sum(tl.exp2(logits - m_new[None, :]), 0)
        m = m_new
    log_sum = tl.where(g < G, m + tl.log2(tl.where(l > 0, l, 1.0)), float("inf"))
    for start in range(0, old, CHUNK):
        logits = _mean_logits(queries, pooled_k, start + part, old, K, N, SCALE, N_BLOCK, PRECISION)
        importance = tl.minimum(tl.sum(tl.exp2(logits - log_sum[None, :]), 1), G * 1.0)
        tl.store(scratch + start + part, importance, mask=start + part < old)
    tl.debug_barrier()  # what other threads left in scratch is read
    # Every warp finds the same.
    number = columns(C_BLOCK, WARPS)
    current = current + tl.zeros([WARPS], tl.int32)
    value = tl.load(scratch + number, mask=number < old, other=0.0)
    pointer = selected + tl.zeros([WARPS], tl.int32)
    store_chosen(
        pointer, value, number, current, tl.zeros_like(current) + M, number < current[None, :, None], G, M, SLOTS
    )


@jit
def _look_kernel(
    q, new_k, new_v, length, active, k_in, v_in, pooled_k_in, pooled_v_in, U, k, v, pooled_k, pooled_v, selected,
    arrived, position, scratch, sums, tops, weights, C: tl.constexpr, C_BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    M: tl.constexpr, SLOTS: tl.constexpr, MEANS: tl.constexpr, MEANS_EACH: tl.constexpr, WINDOWS: tl.constexpr,
    WARPS: tl.constexpr, WINDOW_EACH: tl.constexpr, WINDOW: tl.constexpr, TILE: tl.constexpr, ACTIVE: tl.constexpr,
    K: tl.constexpr, G: tl.constexpr, N: tl.constexpr, V: tl.constexpr, S: tl.constexpr, SCALE: tl.constexpr,
    ROWS: tl.constexpr, N_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # The cache is written in place: the pointers that end in _in are those of the outputs.
    part, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = batch * K + head
    t = tl.load(length + batch)
    real = t < U
    if ACTIVE:
        real = real & (tl.load(active + batch) != 0)
    t = tl.where(real, t, -1)
    old = tl.minimum(tl.maximum(t, 0) // S, C)
    completes = (t >= 0) & ((t + 1) % S == 0) & (old < C)
    k += batch * U * (K * N) + head * N
    v += batch * U * (K * V) + head * V
    pooled_k += batch * C * (K * N) + head * N
    pooled_v += batch * C * (K * V) + head * V
    queries = _group(q, row, G, N, ROWS, N_BLOCK)
    token_k = _token(new_k, k, row, N, N_BLOCK)
    n, w = tl.arange(0, N_BLOCK), tl.arange(0, V_BLOCK)
    mean_k = tl.zeros([N_BLOCK], token_k.dtype)
    if (part <= MEANS) & completes:
        mean_k = _mean(k, token_k, t, S, K, N, N_BLOCK)
    if part == 0:
        tl.store(arrived + row, 0)
        tl.store(position + row, t)
        _select(
            queries, pooled_k, old, completes, mean_k, tl.where(real, t // S, -1), selected + row * M,
            scratch + row * C, C_BLOCK, CHUNK, WARPS, M, SLOTS, K, G, N, SCALE, ROWS, N_BLOCK, PRECISION,
        )  # fmt: skip
    else:
        acc = tl.zeros([ROWS, V_BLOCK], tl.float32)
        m = tl.full([ROWS], -1e30, tl.float32)
        l = tl.zeros([ROWS], tl.float32)
        token_v = _token(new_v, v, row, V, V_BLOCK)
        line = tl.arange(0, TILE)
        if part <= MEANS:
            first = (part - 1) * MEANS_EACH
            for start in range(first, tl.minimum(first + MEANS_EACH, old), TILE):
                keys = load_keys(pooled_k, start + line, old, K, N, N_BLOCK).to(queries.dtype)
                values = load_keys(pooled_v, start + line, old, K, V, V_BLOCK).to(queries.dtype)
                acc, m, l = online(queries, keys, values, (start + line < old)[None, :], acc, m, l, SCALE, PRECISION)
            if completes & (old >= first) & (old < first + MEANS_EACH):
                mean_v = _mean(v, token_v, t, S, K, V, V_BLOCK)
                acc, m, l = _one_more(queries, mean_k, mean_v, True, acc, m, l, SCALE)
                tl.store(pooled_k + old * (K * N) + n, mean_k, mask=n < N)
                tl.store(pooled_v + old * (K * V) + w, mean_v, mask=w < V)
        else:
            first = tl.maximum(t + 1 - WINDOW, 0) + (part - 1 - MEANS) * WINDOW_EACH
            for start in range(first, tl.minimum(first + WINDOW_EACH, t), TILE):
                keys = load_keys(k, start + line, t, K, N, N_BLOCK).to(queries.dtype)
                values = load_keys(v, start + line, t, K, V, V_BLOCK).to(queries.dtype)
                acc, m, l = online(queries, keys, values, (start + line < t)[None, :], acc, m, l, SCALE, PRECISION)
            if (t >= first) & (t < first + WINDOW_EACH):
                acc, m, l = _one_more(queries, token_k, token_v, True, acc, m, l, SCALE)
                tl.store(k + t * (K * N) + n, token_k, mask=n < N)
                tl.store(v + t * (K * V) + w, token_v, mask=w < V)
        _leave(sums, tops, weights, acc, m, l, row * (MEANS + WINDOWS) + part - 1, G, V, V_BLOCK)


@jit
def _joined(sums, tops, weights, first, g, COUNT: tl.constexpr, BLOCK: tl.constexpr, G: tl.constexpr,
            V: tl.constexpr, V_BLOCK: tl.constexpr):  # fmt: skip
    """The softmax of queries g whose COUNT parts begin with ``first``; 0 where nothing was seen."""
    part, n = tl.arange(0, BLOCK), tl.arange(0, V_BLOCK)
    place = (first + part)[:, None] * G + g[None, :]
    held = (part < COUNT)[:, None] & (g < G)[None, :]
    # Not from the first-level cache, which does not see what other programs write.
    top = tl.load(tops + place, mask=held, other=-1e30, cache_modifier=".cg")
    weight = tl.load(weights + place, mask=held, other=0.0, cache_modifier=".cg")
    mask = held[:, :, None] & (n < V)[None, None, :]
    value = tl.load(sums + place[:, :, None] * V + n[None, None, :], mask=mask, other=0.0, cache_modifier=".cg")
    fade = tl.exp2(top - tl.max(top, 0)[None, :])
    total = tl.sum(fade * weight, 0)
    return tl.sum(fade[:, :, None] * value, 0) / tl.where(total > 0, total, 1.0)[:, None]


@jit
def _selected_kernel(
    q, k, v, gates, selected, position, look_sums, look_tops, look_weights, arrived_in, U, o, sums, tops,
    weights, arrived, M: tl.constexpr, MEANS: tl.constexpr, WINDOWS: tl.constexpr, SELECTORS: tl.constexpr,
    SHARE: tl.constexpr, WIDTH: tl.constexpr, JOINED: tl.constexpr, MEANS_BLOCK: tl.constexpr,
    WINDOWS_BLOCK: tl.constexpr, SELECTORS_BLOCK: tl.constexpr, K: tl.constexpr, G: tl.constexpr, N: tl.constexpr,
    V: tl.constexpr, S: tl.constexpr, SCALE: tl.constexpr, ROWS: tl.constexpr, N_BLOCK: tl.constexpr,
    V_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    part, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = batch * K + head
    t = tl.load(position + row)
    k += batch * U * (K * N) + head * N
    v += batch * U * (K * V) + head * V
    queries = _group(q, row, G, N, ROWS, N_BLOCK)
    acc = tl.zeros([ROWS, V_BLOCK], tl.float32)
    m = tl.full([ROWS], -1e30, tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    line = tl.arange(0, WIDTH * S)
    for at in range(part * SHARE, part * SHARE + SHARE, WIDTH):
        slot = at + line // S
        number = tl.load(selected + row * M + slot, mask=(slot < M) & (slot < part * SHARE + SHARE), other=-1)
        token = tl.where(number < 0, U, number * S + line % S)
        keys = load_keys(k, token, t + 1, K, N, N_BLOCK).to(queries.dtype)
        values = load_keys(v, token, t + 1, K, V, V_BLOCK).to(queries.dtype)
        acc, m, l = online(queries, keys, values, (token <= t)[None, :], acc, m, l, SCALE, PRECISION)
    _leave(sums, tops, weights, acc, m, l, row * SELECTORS + part, G, V, V_BLOCK)
    tl.debug_barrier()  # the whole part is written before its program counts as arrived
    if tl.atomic_add(arrived + row, 1, sem="acq_rel") == SELECTORS - 1:
        LOOKS: tl.constexpr = MEANS + WINDOWS
        for start in range(0, G, JOINED):
            g = start + tl.arange(0, JOINED)
            gate = gates + (row * G + g) * 3
            looks = row * LOOKS
            c = _joined(look_sums, look_tops, look_weights, looks, g, MEANS, MEANS_BLOCK, G, V, V_BLOCK)
            w = _joined(look_sums, look_tops, look_weights, looks + MEANS, g, WINDOWS, WINDOWS_BLOCK, G, V, V_BLOCK)
            s = _joined(sums, tops, weights, row * SELECTORS, g, SELECTORS, SELECTORS_BLOCK, G, V, V_BLOCK)
            result = tl.load(gate, mask=g < G, other=0.0).to(tl.float32)[:, None] * c
            result += tl.load(gate + 1, mask=g < G, other=0.0).to(tl.float32)[:, None] * s
            result += tl.load(gate + 2, mask=g < G, other=0.0).to(tl.float32)[:, None] * w
            n = tl.arange(0, V_BLOCK)
            place = o + (row * G + g)[:, None] * V + n[None, :]
            tl.store(place, result.to(o.dtype.element_ty), mask=(g < G)[:, None] & (n < V)[None, :])


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tokens or means that a program reads at a time, the most parts of a look, warps and stages."""

    tile: int = 128
    parts: int = 16
    look_warps: int = 8
    look_stages: int = 3
    warps: int = 4


TILES = Tiles()


def step(
    case: Any, q: Array, k: Array, v: Array, gates: Array, cache: BlockCache, active: Int32[Array, "B"] | None,
    window: int,
) -> tuple[Array, BlockCache]:  # fmt: skip
    """See ``api``."""
    return fold_batch(_step, ("case", "window"))(q, k, v, gates, cache, active, case=case, window=window)


def _shares(count: int, tile: int) -> tuple[int, int]:
    """(parts, how many each takes): as few tiles each as keeps the parts within their limit."""
    each = ceil_div(ceil_div(count, TILES.parts), tile) * tile
    return ceil_div(count, each), each


def _step(
    q: Array, k: Array, v: Array, gates: Array, cache: BlockCache, active: Array | None, *, case: Any, window: int
) -> tuple[Array, BlockCache]:
    B, (U, C, M, window) = q.shape[0], (case.U, cache.pooled_k.shape[1], slots(case), min(window, case.U))
    constants = {name: shared_constants(case)[name] for name in ("K", "G", "N", "V", "S", "SCALE", "PRECISION")}
    constants |= dict(ROWS=power_of_2(constants["G"], 16), N_BLOCK=power_of_2(case.N, 16), M=M)
    constants |= dict(V_BLOCK=power_of_2(case.V, 16))
    tile = max(TILES.tile if case.dtype != "float32" else 32, case.block_size)
    (means, means_each), (windows, window_each) = _shares(C, tile), _shares(window, tile)
    width = tile // case.block_size
    selectors, share = _shares(M, width)

    def parts(count: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        shape = (B, case.K, count, constants["G"])
        return tuple(jax.ShapeDtypeStruct(s, jnp.float32) for s in ((*shape, case.V), shape, shape))

    C_BLOCK = power_of_2(C, 32)
    rows = jax.ShapeDtypeStruct((B, case.K), jnp.int32)
    *held, selected, arrived, position, _, look_sums, look_tops, look_weights = triton_call(
        _look_kernel,
        *(q, k, v, cache.length, active, *cache[:4], U),
        out_shape=(
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in cache[:4]),
            *(jax.ShapeDtypeStruct((B, case.K, M), jnp.int32), rows, rows),
            jax.ShapeDtypeStruct((B, case.K, C), jnp.float32),
            *parts(means + windows),
        ),
        grid=(1 + means + windows, case.K, B),
        num_warps=TILES.look_warps,
        num_stages=TILES.look_stages,
        input_output_aliases={5 + i: i for i in range(4)},
        C=C,
        C_BLOCK=C_BLOCK,
        CHUNK=min(C_BLOCK, tile),
        WARPS=TILES.look_warps,
        SLOTS=power_of_2(M, 2),
        MEANS=means,
        MEANS_EACH=means_each,
        WINDOWS=windows,
        WINDOW_EACH=window_each,
        WINDOW=window,
        TILE=tile,
        ACTIVE=active is not None,
        **constants,
    )
    counts = dict(MEANS=means, WINDOWS=windows, SELECTORS=selectors)
    blocks = {f"{name}_BLOCK": power_of_2(count) for name, count in counts.items()}
    most = max(blocks.values()) * constants["V_BLOCK"]
    joins: dict[str, Any] = {**counts, **blocks, "JOINED": max(1, min(constants["ROWS"], 8192 // most))}
    o, *_ = triton_call(
        _selected_kernel,
        *(q, held[0], held[1], gates, selected, position, look_sums, look_tops, look_weights, arrived, U),
        out_shape=(
            jax.ShapeDtypeStruct((B, 1, case.H, case.V), q.dtype),
            *parts(selectors),
            rows,
        ),
        grid=(selectors, case.K, B),
        num_warps=TILES.warps,
        input_output_aliases={9: 4},
        SHARE=share,
        WIDTH=width,
        **joins,
        **constants,
    )
    k_all, v_all, pooled_k, pooled_v = held
    length = cache.length + (1 if active is None else active)
    return o, BlockCache(k_all, v_all, pooled_k, pooled_v, length)
