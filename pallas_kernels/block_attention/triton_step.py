"""Block attention in triton.language: one token per sequence over a cache that is updated in place, in two launches.

First, three kinds of programs that need nothing of each other: one of each sequence and KV head selects its blocks,
from the means of all; others share the means for the compressed branch, and one of them writes the mean of the block
that the token completes; others share the window, and one of them writes the token. Second: programs share the selected
blocks, and the last of a KV head to be done joins all parts under the gates. Several programs work for one sequence, so
that a single sequence fills the GPU too.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from pallas_kernels.block_attention.blocks import BlockCache
from pallas_kernels.block_attention.triton_select import columns, online, store_chosen
from pallas_kernels.block_attention.triton_tiles import load_keys, power_of_2, shared_constants, slots
from pallas_kernels.tiles import ceil_div
from pallas_kernels.triton_call import fold_batch, jit, tl, triton_call


@jit
def _position(length, active, batch, U, ACTIVE: tl.constexpr):
    """Where the sequence's new token goes; -1 where it has none, or no room for it."""
    t = tl.load(length + batch)
    real = t < U
    if ACTIVE:
        real = real & (tl.load(active + batch) != 0)
    return tl.where(real, t, -1)


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
def _one_logit(queries, key, m, SCALE: tl.constexpr):
    """One more key [N] of a softmax: (the largest logit, the key's weight, what fades the rest)."""
    logit = tl.sum(queries.to(tl.float32) * key.to(tl.float32)[None, :], 1) * SCALE
    m_new = tl.maximum(m, logit)
    return m_new, tl.exp2(logit - m_new), tl.exp2(m - m_new)


@jit
def _one_more(queries, key, value, acc, m, l, SCALE: tl.constexpr):
    m_new, p, fade = _one_logit(queries, key, m, SCALE)
    return acc * fade[:, None] + p[:, None] * value.to(tl.float32)[None, :], m_new, l * fade + p


@jit
def _means(
    queries, pooled_k, pooled_v, k, v, new_k, new_v, sums, tops, weights, part, parts, row, t, old,
    C: tl.constexpr, EACH: tl.constexpr, TILE: tl.constexpr, K: tl.constexpr, G: tl.constexpr, N: tl.constexpr,
    V: tl.constexpr, S: tl.constexpr, SCALE: tl.constexpr, ROWS: tl.constexpr, N_BLOCK: tl.constexpr,
    V_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A part of the compressed branch; writes the mean of the block that the token completes."""
    acc = tl.zeros([ROWS, V_BLOCK], tl.float32)
    m = tl.full([ROWS], -1e30, tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    first = part * EACH
    for start in range(first, tl.minimum(first + EACH, old), TILE):
        entry = start + tl.arange(0, TILE)
        keys = load_keys(pooled_k, entry, old, K, N, N_BLOCK).to(queries.dtype)
        values = load_keys(pooled_v, entry, old, K, V, V_BLOCK).to(queries.dtype)
        acc, m, l = online(queries, keys, values, (entry < old)[None, :], acc, m, l, SCALE, PRECISION)
    if (t >= 0) & ((t + 1) % S == 0) & (old < C) & (old >= first) & (old < first + EACH):
        n, w = tl.arange(0, N_BLOCK), tl.arange(0, V_BLOCK)
        mean_k = _mean(k, _token(new_k, k, row, N, N_BLOCK), t, S, K, N, N_BLOCK)
        mean_v = _mean(v, _token(new_v, v, row, V, V_BLOCK), t, S, K, V, V_BLOCK)
        tl.store(pooled_k + old * (K * N) + n, mean_k, mask=n < N)
        tl.store(pooled_v + old * (K * V) + w, mean_v, mask=w < V)
        acc, m, l = _one_more(queries, mean_k, mean_v, acc, m, l, SCALE)
    _leave(sums, tops, weights, acc, m, l, row * parts + part, G, V, V_BLOCK)


@jit
def _window(
    queries, k, v, new_k, new_v, sums, tops, weights, part, parts, row, t, WINDOW: tl.constexpr, EACH: tl.constexpr,
    TILE: tl.constexpr, K: tl.constexpr, G: tl.constexpr, N: tl.constexpr, V: tl.constexpr, SCALE: tl.constexpr,
    ROWS: tl.constexpr, N_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A part of the window branch; writes the token."""
    acc = tl.zeros([ROWS, V_BLOCK], tl.float32)
    m = tl.full([ROWS], -1e30, tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    first = tl.maximum(t + 1 - WINDOW, 0) + part * EACH
    for start in range(first, tl.minimum(first + EACH, t), TILE):
        token = start + tl.arange(0, TILE)
        keys = load_keys(k, token, t, K, N, N_BLOCK).to(queries.dtype)
        values = load_keys(v, token, t, K, V, V_BLOCK).to(queries.dtype)
        acc, m, l = online(queries, keys, values, (token < t)[None, :], acc, m, l, SCALE, PRECISION)
    if (t >= first) & (t < first + EACH):
        token_k, token_v = _token(new_k, k, row, N, N_BLOCK), _token(new_v, v, row, V, V_BLOCK)
        n, w = tl.arange(0, N_BLOCK), tl.arange(0, V_BLOCK)
        acc, m, l = _one_more(queries, token_k, token_v, acc, m, l, SCALE)
        tl.store(k + t * (K * N) + n, token_k, mask=n < N)
        tl.store(v + t * (K * V) + w, token_v, mask=w < V)
    _leave(sums, tops, weights, acc, m, l, row * parts + part, G, V, V_BLOCK)


@jit
def _select(
    queries, pooled_k, k, new_k, selected, scratch, row, t, old, C: tl.constexpr, C_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr, AHEAD: tl.constexpr, SAME: tl.constexpr, LANES: tl.constexpr, M: tl.constexpr,
    K: tl.constexpr, G: tl.constexpr, N: tl.constexpr, S: tl.constexpr, SCALE: tl.constexpr, ROWS: tl.constexpr,
    N_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes the numbers of the selected blocks, ascending; -1 fills up. The keys are read twice: for the logsumexp of
    each query, and for the importances that it scales."""
    g = tl.arange(0, ROWS)
    # Each place of a chunk has a softmax of its own: threads wait for one another once, behind the loop.
    tops = tl.full([ROWS, CHUNK], -1e30, tl.float32)
    weights = tl.zeros([ROWS, CHUNK], tl.float32)
    for start in tl.range(0, old, CHUNK, num_stages=AHEAD):
        number = start + tl.arange(0, CHUNK)
        keys = load_keys(pooled_k, number, old, K, N, N_BLOCK).to(queries.dtype)
        logits = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * SCALE
        logits = tl.where((number < old)[None, :], logits, float("-inf"))
        higher = tl.maximum(tops, logits)
        weights = weights * tl.exp2(tops - higher) + tl.exp2(logits - higher)
        tops = higher
    m = tl.max(tops, 1)
    l = tl.sum(weights * tl.exp2(tops - m[:, None]), 1)
    if (t >= 0) & ((t + 1) % S == 0) & (old < C):
        mean_k = _mean(k, _token(new_k, k, row, N, N_BLOCK), t, S, K, N, N_BLOCK)
        m_new, p, fade = _one_logit(queries, mean_k, m, SCALE)
        m, l = m_new, l * fade + p
    log_sum = m + tl.log2(tl.where(l > 0, l, 1.0))
    for start in tl.range(0, old, CHUNK, num_stages=AHEAD):
        number = start + tl.arange(0, CHUNK)
        keys = load_keys(pooled_k, number, old, K, N, N_BLOCK).to(queries.dtype)
        logits = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * SCALE
        p = tl.where((g < G)[:, None], tl.exp2(logits - log_sum[:, None]), 0.0)
        tl.store(scratch + number, tl.minimum(tl.sum(p, 0), G * 1.0), mask=number < old)
    tl.debug_barrier()  # what other threads left in scratch is read
    number = columns(C_BLOCK, SAME, LANES)
    current = tl.where(t >= 0, t // S, -1) + tl.zeros([SAME], tl.int32)
    candidate = number <= current[None, :, None]
    value = tl.load(scratch + number, mask=number < old, other=0.0)
    pointer = selected + tl.zeros([SAME], tl.int32)
    store_chosen(pointer, value, number, current, tl.zeros_like(current) + M, candidate, G, M)


@jit
def _look_kernel(
    q, new_k, new_v, length, active, k_in, v_in, pooled_k_in, pooled_v_in, U, k, v, pooled_k, pooled_v, selected,
    position, arrived, scratch, c_sums, c_tops, c_weights, w_sums, w_tops, w_weights, C: tl.constexpr,
    C_BLOCK: tl.constexpr, CHUNK: tl.constexpr, AHEAD: tl.constexpr, MEANS: tl.constexpr, MEANS_EACH: tl.constexpr,
    WINDOWS: tl.constexpr, WINDOWS_EACH: tl.constexpr, WINDOW: tl.constexpr, SAME: tl.constexpr, LANES: tl.constexpr,
    M: tl.constexpr, TILE: tl.constexpr, ACTIVE: tl.constexpr, K: tl.constexpr, G: tl.constexpr, N: tl.constexpr,
    V: tl.constexpr, S: tl.constexpr, SCALE: tl.constexpr, ROWS: tl.constexpr, N_BLOCK: tl.constexpr,
    V_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Written in place: the pointers that end in _in are those of the outputs. The programs that select come first.
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, head = row // K, row % K
    t = _position(length, active, batch, U, ACTIVE)
    old = tl.minimum(tl.maximum(t, 0) // S, C)
    k += batch * U * (K * N) + head * N
    v += batch * U * (K * V) + head * V
    pooled_k += batch * C * (K * N) + head * N
    pooled_v += batch * C * (K * V) + head * V
    queries = _group(q, row, G, N, ROWS, N_BLOCK)
    if part == 0:
        tl.store(position + row, t)
        tl.store(arrived + row, 0)
        _select(
            queries, pooled_k, k, new_k, selected + row * M, scratch + row * C, row, t, old, C, C_BLOCK, CHUNK, AHEAD,
            SAME, LANES, M, K, G, N, S, SCALE, ROWS, N_BLOCK, PRECISION,
        )  # fmt: skip
    elif part <= MEANS:
        _means(
            queries, pooled_k, pooled_v, k, v, new_k, new_v, c_sums, c_tops, c_weights, part - 1, MEANS, row, t, old,
            C, MEANS_EACH, TILE, K, G, N, V, S, SCALE, ROWS, N_BLOCK, V_BLOCK, PRECISION,
        )  # fmt: skip
    else:
        _window(
            queries, k, v, new_k, new_v, w_sums, w_tops, w_weights, part - 1 - MEANS, WINDOWS, row, t, WINDOW,
            WINDOWS_EACH, TILE, K, G, N, V, SCALE, ROWS, N_BLOCK, V_BLOCK, PRECISION,
        )  # fmt: skip


@jit
def _joined(sums, tops, weights, row, COUNT: tl.constexpr, G: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr,
            V_BLOCK: tl.constexpr):  # fmt: skip
    """The softmax of a group's queries, of which there are COUNT parts; 0 where nothing was seen."""
    g, n = tl.arange(0, ROWS), tl.arange(0, V_BLOCK)
    mask = (g < G)[:, None] & (n < V)[None, :]
    acc = tl.zeros([ROWS, V_BLOCK], tl.float32)
    m = tl.full([ROWS], -1e30, tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    for part in tl.static_range(COUNT):
        place = (row * COUNT + part) * G + g
        top = tl.load(tops + place, mask=g < G, other=-1e30)
        weight = tl.load(weights + place, mask=g < G, other=0.0)
        value = tl.load(sums + place[:, None] * V + n[None, :], mask=mask, other=0.0)
        m_new = tl.maximum(m, top)
        fade, share = tl.exp2(m - m_new), tl.exp2(top - m_new)
        acc, l, m = acc * fade[:, None] + value * share[:, None], l * fade + weight * share, m_new
    return acc / tl.where(l > 0, l, 1.0)[:, None]


@jit
def _selected_kernel(
    q, gates, length, active, k, v, selected, position, arrived_in, c_sums, c_tops, c_weights, w_sums, w_tops,
    w_weights, U, arrived, s_sums, s_tops, s_weights, o, new_length, M: tl.constexpr, MEANS: tl.constexpr,
    WINDOWS: tl.constexpr, SELECTORS: tl.constexpr, SHARE: tl.constexpr, WIDTH: tl.constexpr, ACTIVE: tl.constexpr,
    K: tl.constexpr, G: tl.constexpr, N: tl.constexpr, V: tl.constexpr, S: tl.constexpr, SCALE: tl.constexpr,
    ROWS: tl.constexpr, N_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, head = row // K, row % K
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
    _leave(s_sums, s_tops, s_weights, acc, m, l, row * SELECTORS + part, G, V, V_BLOCK)
    tl.debug_barrier()  # all threads have left their results before the program counts as done
    if tl.atomic_add(arrived + row, 1, sem="acq_rel") == SELECTORS - 1:
        tl.debug_barrier()
        g, n = tl.arange(0, ROWS), tl.arange(0, V_BLOCK)
        gate = gates + (row * G + g) * 3
        result = _joined(c_sums, c_tops, c_weights, row, MEANS, G, V, ROWS, V_BLOCK)
        result *= tl.load(gate, mask=g < G, other=0.0).to(tl.float32)[:, None]
        others = _joined(w_sums, w_tops, w_weights, row, WINDOWS, G, V, ROWS, V_BLOCK)
        result += tl.load(gate + 2, mask=g < G, other=0.0).to(tl.float32)[:, None] * others
        others = _joined(s_sums, s_tops, s_weights, row, SELECTORS, G, V, ROWS, V_BLOCK)
        result += tl.load(gate + 1, mask=g < G, other=0.0).to(tl.float32)[:, None] * others
        mask = (g < G)[:, None] & (n < V)[None, :]
        tl.store(o + (row * G + g)[:, None] * V + n[None, :], result.to(o.dtype.element_ty), mask=mask)
        if head == 0:
            more = 1
            if ACTIVE:
                more = tl.load(active + batch)
            tl.store(new_length + batch, tl.load(length + batch) + more)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tokens or means that a program reads at a time, the most parts of a branch, means that a selecting program reads
    at a time and loads ahead, threads that select together (others do the same again), warps of each launch."""

    tile: int = 128
    parts: int = 16
    chunk: int = 128
    ahead: int = 4
    lanes: int = 128
    warps: int = 4
    selected_warps: int = 4


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


def _constants(case: Any) -> dict[str, Any]:
    constants = {name: shared_constants(case)[name] for name in ("K", "G", "N", "V", "S", "SCALE", "PRECISION")}
    rows, widths = power_of_2(constants["G"], 16), (power_of_2(case.N, 16), power_of_2(case.V, 16))
    return {**constants, "ROWS": rows, "N_BLOCK": widths[0], "V_BLOCK": widths[1]}


def _parts(case: Any, count: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """What ``count`` programs for each KV head leave to be joined: weighted sums, maxima and sums of weights."""
    shape = (case.B, case.K, count, case.H // case.K)
    return tuple(jax.ShapeDtypeStruct(s, jnp.float32) for s in ((*shape, case.V), shape, shape))


def _step(
    q: Array, k: Array, v: Array, gates: Array, cache: BlockCache, active: Array | None, *, case: Any, window: int
) -> tuple[Array, BlockCache]:
    case = dataclasses.replace(case, B=q.shape[0])
    C, M, window = cache.pooled_k.shape[1], slots(case), min(window, case.U)
    constants = _constants(case)
    tile = max(TILES.tile if case.dtype != "float32" else 32, case.block_size)
    counts, eaches = zip(_shares(C, tile), _shares(window, tile), _shares(M, tile // case.block_size), strict=True)
    joined = dict(zip(("MEANS", "WINDOWS"), counts, strict=False), ACTIVE=active is not None)
    C_BLOCK = power_of_2(ceil_div(case.U, case.block_size), TILES.lanes)
    row = (case.B, case.K)
    numbers = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((*row, M), row, row)]
    k_all, v_all, pooled_k, pooled_v, selected, position, arrived, _, *parts = triton_call(
        _look_kernel,
        *(q, k, v, cache.length, active, *cache[:4], case.U),
        out_shape=(
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in cache[:4]),
            *(*numbers, jax.ShapeDtypeStruct((*row, C), jnp.float32)),
            *(*_parts(case, counts[0]), *_parts(case, counts[1])),
        ),
        grid=(case.B * case.K, 1 + counts[0] + counts[1]),
        num_warps=TILES.warps,
        input_output_aliases={5: 0, 6: 1, 7: 2, 8: 3},
        C=C,
        C_BLOCK=C_BLOCK,
        CHUNK=min(max(16, TILES.chunk if case.dtype != "float32" else 32), power_of_2(C, 16)),
        AHEAD=TILES.ahead,
        MEANS_EACH=eaches[0],
        WINDOWS_EACH=eaches[1],
        WINDOW=window,
        SAME=32 * TILES.warps // TILES.lanes,
        LANES=TILES.lanes,
        M=M,
        TILE=tile,
        **joined,
        **constants,
    )
    _, *_, o, length = triton_call(
        _selected_kernel,
        *(q, gates, cache.length, active, k_all, v_all, selected, position, arrived, *parts, case.U),
        out_shape=(
            *(numbers[2], *_parts(case, counts[2])),
            *(jax.ShapeDtypeStruct((case.B, 1, case.H, case.V), q.dtype), cache.length),
        ),
        grid=(case.B * case.K, counts[2]),
        num_warps=TILES.selected_warps,
        input_output_aliases={8: 0},
        M=M,
        SELECTORS=counts[2],
        SHARE=eaches[2],
        WIDTH=tile // case.block_size,
        **joined,
        **constants,
    )
    return o, BlockCache(k_all, v_all, pooled_k, pooled_v, length)
