"""Block attention in triton.language: one token per sequence over a cache that is updated in place, in four launches.

First: programs share the block means, each leaves its logits and its part of the compressed branch, and one writes the
mean of the block that the token completes; others share the window, and one writes the token. Second: one program of
each sequence and KV head selects. Third: programs share the selected blocks. Last: the parts are joined under the
gates. Several programs work for one sequence, so that a single sequence fills the GPU too; and each launch runs little
code, because the time of so short a one goes into fetching it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from pallas_kernels.batching import fold_batch
from pallas_kernels.block_attention.api import Case
from pallas_kernels.block_attention.blocks import BlockCache
from pallas_kernels.block_attention.triton_select import columns, online, store_chosen
from pallas_kernels.block_attention.triton_tiles import load_keys, shared_constants, slots
from pallas_kernels.tiles import ceil_div, power_of_2
from pallas_kernels.triton_call import jit, tl, triton_call


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
def _one_more(queries, key, value, acc, m, l, SCALE: tl.constexpr):
    """One more key [N] of a softmax with its value."""
    logit = tl.sum(queries.to(tl.float32) * key.to(tl.float32)[None, :], 1) * SCALE
    m_new = tl.maximum(m, logit)
    p, fade = tl.exp2(logit - m_new), tl.exp2(m - m_new)
    return acc * fade[:, None] + p[:, None] * value.to(tl.float32)[None, :], m_new, l * fade + p


@jit
def _means(
    queries, pooled_k, pooled_v, k, v, new_k, new_v, logits, sums, tops, weights, part, parts, row, t, old,
    C: tl.constexpr, EACH: tl.constexpr, TILE: tl.constexpr, K: tl.constexpr, G: tl.constexpr, N: tl.constexpr,
    V: tl.constexpr, S: tl.constexpr, SCALE: tl.constexpr, ROWS: tl.constexpr, N_BLOCK: tl.constexpr,
    V_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A part of the compressed branch, with its logits; writes the mean of the block that the token completes."""
    acc = tl.zeros([ROWS, V_BLOCK], tl.float32)
    m = tl.full([ROWS], -1e30, tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    first, g = part * EACH, tl.arange(0, ROWS)
    for start in range(first, tl.minimum(first + EACH, old), TILE):
        entry = start + tl.arange(0, TILE)
        keys = load_keys(pooled_k, entry, old, K, N, N_BLOCK).to(queries.dtype)
        values = load_keys(pooled_v, entry, old, K, V, V_BLOCK).to(queries.dtype)
        products = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * SCALE
        products = tl.where((entry < old)[None, :], products, float("-inf"))
        tl.store(logits + g[:, None] * C + entry[None, :], products, mask=(g < G)[:, None] & (entry < old)[None, :])
        m_new = tl.maximum(m, tl.max(products, 1))
        p, fade = tl.exp2(products - m_new[:, None]), tl.exp2(m - m_new)
        l = l * fade + tl.sum(p, 1)
        acc = tl.dot(p.to(values.dtype), values, acc * fade[:, None], input_precision=PRECISION)
        m = m_new
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
def _look_kernel(
    q, new_k, new_v, length, active, k_in, v_in, pooled_k_in, pooled_v_in, U, k, v, pooled_k, pooled_v, position,
    logits, c_sums, c_tops, c_weights, w_sums, w_tops, w_weights, C: tl.constexpr, MEANS: tl.constexpr,
    MEANS_EACH: tl.constexpr, WINDOWS: tl.constexpr, WINDOWS_EACH: tl.constexpr, WINDOW: tl.constexpr,
    TILE: tl.constexpr, ACTIVE: tl.constexpr, K: tl.constexpr, G: tl.constexpr, N: tl.constexpr, V: tl.constexpr,
    S: tl.constexpr, SCALE: tl.constexpr, ROWS: tl.constexpr, N_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    # Written in place: the pointers that end in _in are those of the outputs.
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
    if part < MEANS:
        _means(
            queries, pooled_k, pooled_v, k, v, new_k, new_v, logits + row * (G * C), c_sums, c_tops, c_weights, part,
            MEANS, row, t, old, C, MEANS_EACH, TILE, K, G, N, V, S, SCALE, ROWS, N_BLOCK, V_BLOCK, PRECISION,
        )  # fmt: skip
    else:
        _window(
            queries, k, v, new_k, new_v, w_sums, w_tops, w_weights, part - MEANS, WINDOWS, row, t, WINDOW,
            WINDOWS_EACH, TILE, K, G, N, V, SCALE, ROWS, N_BLOCK, V_BLOCK, PRECISION,
        )  # fmt: skip


@jit
def _choose_kernel(
    logits, tops, weights, position, selected, scratch, C: tl.constexpr, C_BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    MEANS: tl.constexpr, MEANS_BLOCK: tl.constexpr, SAME: tl.constexpr, LANES: tl.constexpr, M: tl.constexpr,
    G: tl.constexpr, S: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Writes the numbers of the selected blocks, ascending; -1 fills up."""
    row = tl.program_id(0).to(tl.int64)
    t = tl.load(position + row)
    current = tl.where(t >= 0, t // S, -1)
    logits += row * (G * C)
    tops += row * (MEANS * G)
    weights += row * (MEANS * G)
    selected += row * M
    scratch += row * C
    g, part = tl.arange(0, ROWS), tl.arange(0, MEANS_BLOCK)
    held = (part < MEANS)[:, None] & (g < G)[None, :]
    top = tl.load(tops + part[:, None] * G + g[None, :], mask=held, other=-1e30)
    highest = tl.max(top, 0)
    weight = tl.load(weights + part[:, None] * G + g[None, :], mask=held, other=0.0)
    whole = tl.sum(weight * tl.exp2(top - highest[None, :]), 0)
    log_sum = tl.where(g < G, highest + tl.log2(tl.where(whole > 0, whole, 1.0)), 0.0)
    for start in range(0, current, CHUNK):
        number = start + tl.arange(0, CHUNK)
        mask = (g < G)[:, None] & (number < tl.minimum(current, C))[None, :]
        value = tl.load(logits + g[:, None] * C + number[None, :], mask=mask, other=float("-inf"))
        importance = tl.minimum(tl.sum(tl.exp2(value - log_sum[:, None]), 0), G * 1.0)
        tl.store(scratch + number, importance, mask=number < C)
    tl.debug_barrier()  # what other threads left in scratch is read
    number = columns(C_BLOCK, SAME, LANES)
    current = current + tl.zeros([SAME], tl.int32)
    candidate = number <= current[None, :, None]
    value = tl.load(scratch + number, mask=candidate & (number < C), other=0.0)
    pointer = selected + tl.zeros([SAME], tl.int32)
    store_chosen(pointer, value, number, current, tl.zeros_like(current) + M, candidate, G, M, True)


@jit
def _selected_kernel(
    q, k, v, selected, position, U, sums, tops, weights, M: tl.constexpr, SHARE: tl.constexpr, WIDTH: tl.constexpr,
    K: tl.constexpr, G: tl.constexpr, N: tl.constexpr, V: tl.constexpr, S: tl.constexpr, SCALE: tl.constexpr,
    ROWS: tl.constexpr, N_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
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
    _leave(sums, tops, weights, acc, m, l, row * tl.num_programs(0) + part, G, V, V_BLOCK)


@jit
def _joined(sums, tops, weights, row, g, COUNT: tl.constexpr, BLOCK: tl.constexpr, G: tl.constexpr, V: tl.constexpr,
            V_BLOCK: tl.constexpr):  # fmt: skip
    """The softmax of one query, of which there are COUNT parts; 0 where nothing was seen."""
    part, n = tl.arange(0, BLOCK), tl.arange(0, V_BLOCK)
    place = (row * COUNT + part) * G + g
    top = tl.load(tops + place, mask=part < COUNT, other=-1e30)
    weight = tl.load(weights + place, mask=part < COUNT, other=0.0)
    mask = (part < COUNT)[:, None] & (n < V)[None, :]
    value = tl.load(sums + place[:, None] * V + n[None, :], mask=mask, other=0.0)
    fade = tl.exp2(top - tl.max(top, 0))
    whole = tl.sum(fade * weight, 0)
    return tl.sum(fade[:, None] * value, 0) / tl.where(whole > 0, whole, 1.0)


@jit
def _join_kernel(
    gates, length, active, c_sums, c_tops, c_weights, w_sums, w_tops, w_weights, s_sums, s_tops, s_weights, o,
    new_length, MEANS: tl.constexpr, WINDOWS: tl.constexpr, SELECTORS: tl.constexpr, MEANS_BLOCK: tl.constexpr,
    WINDOWS_BLOCK: tl.constexpr, SELECTORS_BLOCK: tl.constexpr, H: tl.constexpr, G: tl.constexpr, V: tl.constexpr,
    V_BLOCK: tl.constexpr, ACTIVE: tl.constexpr,
):  # fmt: skip
    query = tl.program_id(0).to(tl.int64)
    row, g = query // G, query % G
    c = _joined(c_sums, c_tops, c_weights, row, g, MEANS, MEANS_BLOCK, G, V, V_BLOCK)
    s = _joined(s_sums, s_tops, s_weights, row, g, SELECTORS, SELECTORS_BLOCK, G, V, V_BLOCK)
    w = _joined(w_sums, w_tops, w_weights, row, g, WINDOWS, WINDOWS_BLOCK, G, V, V_BLOCK)
    gate = gates + query * 3
    result = tl.load(gate).to(tl.float32) * c + tl.load(gate + 1).to(tl.float32) * s
    result += tl.load(gate + 2).to(tl.float32) * w
    n = tl.arange(0, V_BLOCK)
    tl.store(o + query * V + n, result.to(o.dtype.element_ty), mask=n < V)
    if query % H == 0:
        more = 1
        if ACTIVE:
            more = tl.load(active + query // H)
        tl.store(new_length + query // H, tl.load(length + query // H) + more)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tokens or means that a program reads at a time, the most parts of a branch, logits read at a time, threads that
    select together (others do the same again), warps."""

    tile: int = 128
    parts: int = 16
    chunk: int = 512
    lanes: int = 128
    warps: int = 4
    join_warps: int = 1


TILES = Tiles()


def step(
    case: Case, q: Array, k: Array, v: Array, gates: Array, cache: BlockCache, active: Int32[Array, "B"] | None,
    window: int,
) -> tuple[Array, BlockCache]:  # fmt: skip
    """See ``api``."""
    return fold_batch(_step, ("case", "window"))(q, k, v, gates, cache, active, case=case, window=window)


def _shares(count: int, tile: int) -> tuple[int, int]:
    """(parts, how many each takes): as few tiles each as keeps the parts within their limit."""
    each = ceil_div(ceil_div(count, TILES.parts), tile) * tile
    return ceil_div(count, each), each


def _constants(case: Case) -> dict[str, Any]:
    constants = {name: shared_constants(case)[name] for name in ("K", "G", "N", "V", "S", "SCALE", "PRECISION")}
    rows, widths = power_of_2(constants["G"], 16), (power_of_2(case.N, 16), power_of_2(case.V, 16))
    return {**constants, "ROWS": rows, "N_BLOCK": widths[0], "V_BLOCK": widths[1]}


def _like(*arrays: Array) -> tuple[jax.ShapeDtypeStruct, ...]:
    return tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays)


def _parts(case: Case, count: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """What ``count`` programs for each KV head leave to be joined: weighted sums, maxima and sums of weights."""
    shape = (case.B, case.K, count, case.H // case.K)
    return tuple(jax.ShapeDtypeStruct(s, jnp.float32) for s in ((*shape, case.V), shape, shape))


def _step(
    q: Array, k: Array, v: Array, gates: Array, cache: BlockCache, active: Array | None, *, case: Case, window: int
) -> tuple[Array, BlockCache]:
    case = dataclasses.replace(case, B=q.shape[0])
    C, M, window = cache.pooled_k.shape[1], slots(case), min(window, case.U)
    constants = _constants(case)
    tile = max(TILES.tile if case.dtype != "float32" else 32, case.block_size)
    counts, eaches = zip(_shares(C, tile), _shares(window, tile), _shares(M, tile // case.block_size), strict=True)
    sizes = dict(zip(("MEANS", "WINDOWS", "SELECTORS"), counts, strict=True))
    blocks = {f"{name}_BLOCK": power_of_2(count) for name, count in sizes.items()}
    C_BLOCK = power_of_2(ceil_div(case.U, case.block_size), TILES.lanes)
    joins: dict[str, Any] = {**sizes, **blocks, **{name: constants[name] for name in ("G", "V", "V_BLOCK")}}
    row = (case.B, case.K)
    position, chosen_blocks = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in (row, (*row, M)))
    k_all, v_all, pooled_k, pooled_v, position, logits, *parts = triton_call(
        _look_kernel,
        *(q, k, v, cache.length, active, *cache[:4], case.U),
        out_shape=(
            *(*_like(*cache[:4]), position, jax.ShapeDtypeStruct((case.B, case.H, C), jnp.float32)),
            *(*_parts(case, counts[0]), *_parts(case, counts[1])),
        ),
        grid=(case.B * case.K, counts[0] + counts[1]),
        num_warps=TILES.warps,
        input_output_aliases={5: 0, 6: 1, 7: 2, 8: 3},
        C=C,
        MEANS=counts[0],
        MEANS_EACH=eaches[0],
        WINDOWS=counts[1],
        WINDOWS_EACH=eaches[1],
        WINDOW=window,
        TILE=tile,
        ACTIVE=active is not None,
        **constants,
    )
    selected, _ = triton_call(
        _choose_kernel,
        *(logits, *parts[1:3], position),
        out_shape=(chosen_blocks, jax.ShapeDtypeStruct((*row, C), jnp.float32)),
        grid=(case.B * case.K,),
        num_warps=TILES.warps,
        C=C,
        C_BLOCK=C_BLOCK,
        CHUNK=min(C_BLOCK, max(32, TILES.chunk * 16 // constants["ROWS"])),
        SAME=32 * TILES.warps // TILES.lanes,
        LANES=TILES.lanes,
        M=M,
        **{name: joins[name] for name in ("MEANS", "MEANS_BLOCK")},
        **{name: constants[name] for name in ("G", "S", "ROWS")},
    )
    looks = triton_call(
        _selected_kernel,
        *(q, k_all, v_all, selected, position, case.U),
        out_shape=_parts(case, counts[2]),
        grid=(counts[2], case.K, case.B),
        num_warps=TILES.warps,
        M=M,
        SHARE=eaches[2],
        WIDTH=tile // case.block_size,
        **constants,
    )
    o, length = triton_call(
        _join_kernel,
        *(gates, cache.length, active, *parts, *looks),
        out_shape=(jax.ShapeDtypeStruct((case.B, 1, case.H, case.V), q.dtype), *_like(cache.length)),
        grid=(case.B * case.H,),
        num_warps=TILES.join_warps,
        H=case.H,
        ACTIVE=active is not None,
        **joins,
    )
    return o, BlockCache(k_all, v_all, pooled_k, pooled_v, length)
