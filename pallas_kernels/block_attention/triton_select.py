"""Block attention in triton.language: the compressed branch, and which blocks each token selects.

A program owns a tile of query tokens with all heads of one KV head: attention over block means, then the blocks again
for their importance, of which it keeps the best. Importances are in memory for the tiles under way alone.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from pallas_kernels.block_attention.blocks import Layout
from pallas_kernels.block_attention.triton_tiles import (
    load_heads,
    load_keys,
    power_of_2,
    shared_constants,
    slots,
    store_heads,
    tile_rows,
    visible_means,
)
from pallas_kernels.tiles import ceil_div
from pallas_kernels.triton_call import jit, tl, triton_call


@jit
def online(q, keys, values, mask, acc, m, l, SCALE: tl.constexpr, PRECISION: tl.constexpr):
    """One step of a softmax in base 2. m starts finite, so a row that has seen nothing gives 0 and not NaN."""
    logits = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * SCALE
    logits = tl.where(mask, logits, float("-inf"))
    m_new = tl.maximum(m, tl.max(logits, 1))
    p = tl.exp2(logits - m_new[:, None])
    fade = tl.exp2(m - m_new)
    l = l * fade + tl.sum(p, 1)
    acc = tl.dot(p.to(values.dtype), values, acc * fade[:, None], input_precision=PRECISION)
    return acc, m_new, l


@jit
def finish(o, lse, acc, m, l, token, head, exists, H: tl.constexpr, V: tl.constexpr, V_BLOCK: tl.constexpr):
    """Writes the output and its logsumexp (0 where nothing was seen); returns the logsumexp."""
    seen = l > 0
    whole = tl.where(seen, l, 1.0)
    store_heads(o, acc / whole[:, None], token, head, exists, H, V, V_BLOCK)
    result = tl.where(seen, m + tl.log2(whole), 0.0)
    tl.store(lse + token * H + head, result, mask=exists)
    return result


@jit
def columns(COUNT: tl.constexpr, TOKENS: tl.constexpr):
    """The numbers 0 up to COUNT for each of TOKENS tokens, [32, TOKENS, COUNT / 32]; TOKENS is the number of warps.

    A token's numbers lie in one warp, so that no sum over them waits for another warp. That takes this order of axes,
    and lanes that count down: neighbours in memory would be given to one thread, and several tokens to a warp.
    """
    lane = tl.arange(0, 32) ^ 31
    number = tl.arange(0, COUNT // 32)[None, None, :] * 32 + lane[:, None, None]
    return number + tl.zeros([1, TOKENS, 1], tl.int32)


@jit
def total(flags):
    """How many of each token's flags, in the form of ``columns``, are set."""
    return tl.sum(tl.sum(flags.to(tl.int32), 2), 0)


@jit
def chosen(bits, number, wanted):
    """Which blocks of each token have the ``wanted`` [TOKENS] largest; of equal ones, the smaller number.

    bits and number, in the form of ``columns``: the bits of importances, which order as integers do, as they are not
    negative; -1 is no candidate. The largest bound that enough of them reach is found bit by bit: counts alone, where a
    sort would move every number.
    """
    bound = tl.zeros_like(wanted)
    for i in range(31):
        trial = bound | (1 << (30 - i))
        bound = tl.where(total(bits >= trial[None, :, None]) >= wanted, trial, bound)
    take = bits >= bound[None, :, None]
    if tl.max(total(take) - wanted, 0) > 0:  # more are equal than are wanted, which is rare
        above, at = bits > bound[None, :, None], bits == bound[None, :, None]
        left, end = wanted - total(above), tl.zeros_like(wanted)
        for i in range(24):
            trial = end | (1 << (23 - i))
            end = tl.where(total(at & (number < trial[None, :, None])) <= left, trial, end)
        take = above | (at & (number < end[None, :, None]))
    return take


@jit
def store_chosen(pointer, value, number, current, count, earlier, G: tl.constexpr, M: tl.constexpr):
    """Writes each token's selected blocks, ascending, behind ``pointer`` [TOKENS]; -1 fills up.

    value: importances of the blocks ``number``, in the form of ``columns``, where ``earlier``: before the token's own
    block ``current``, which may be incomplete and so in no table; -1 is padding. ``count``: M, or 0 to write nothing.
    """
    forced = (number == 0) | (number == current[None, :, None] - 1)
    bits = tl.where(earlier, tl.where(forced, G * 1.0, value).to(tl.int32, bitcast=True), -1)
    # The token's own block has the most there is and the last number.
    most = tl.full(value.shape, G, tl.float32).to(tl.int32, bitcast=True)
    own = (current >= 0) & (total(bits == most) < M)
    take = chosen(bits, number, M - own.to(tl.int32))
    last = tl.full(current.shape, -1, tl.int32)
    for i in range(M):
        behind = tl.where(take & (number > last[None, :, None]), number, 0x7FFFFFFF)
        following = tl.min(tl.min(behind, 2), 0)
        found = tl.where(following < 0x7FFFFFFF, following, tl.where(own & (last < current), current, -1))
        tl.store(pointer + i, found, mask=i < count)
        last = tl.where(found < 0, 0x7FFFFFFE, found)


@jit
def importances(
    queries, keys, log_sum, mask, TOKENS: tl.constexpr, HEADS: tl.constexpr, G: tl.constexpr, SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The weight of each block summed over the query group, [TOKENS, blocks], at most G."""
    logits = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * SCALE
    p = tl.exp2(tl.where(mask, logits - log_sum[:, None], float("-inf")))
    total = tl.sum(tl.reshape(p, [TOKENS, HEADS, keys.shape[0]]), 1)
    return tl.minimum(total, tl.full([TOKENS, keys.shape[0]], G, tl.float32))


@jit
def _look(
    q, pooled_k, pooled_v, position, base, first_token, T, C, head, o, lse, scratch, H: tl.constexpr, K: tl.constexpr,
    G: tl.constexpr, N: tl.constexpr, V: tl.constexpr, S: tl.constexpr, SCALE: tl.constexpr, TOKENS: tl.constexpr,
    HEADS: tl.constexpr, BLOCKS: tl.constexpr, N_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The compressed branch of a tile of tokens; leaves the importance of each visible block in scratch [TOKENS, C]."""
    token, query_head, exists = tile_rows(first_token, T, head, TOKENS, HEADS, G)
    row_base, row_end, lowest, highest = visible_means(position, base, token, T, C, S, BLOCKS)
    queries = load_heads(q, token, query_head, exists, H, N, N_BLOCK)
    acc = tl.zeros([TOKENS * HEADS, V_BLOCK], tl.float32)
    m = tl.full([TOKENS * HEADS], -1e30, tl.float32)
    l = tl.zeros([TOKENS * HEADS], tl.float32)
    for start in range(lowest, highest, BLOCKS):
        entry = start + tl.arange(0, BLOCKS)
        keys = load_keys(pooled_k, entry, C, K, N, N_BLOCK)
        values = load_keys(pooled_v, entry, C, K, V, V_BLOCK)
        mask = (entry[None, :] >= row_base[:, None]) & (entry[None, :] < row_end[:, None])
        acc, m, l = online(queries, keys, values, mask, acc, m, l, SCALE, PRECISION)
    log_sum = finish(o, lse, acc, m, l, token, query_head, exists, H, V, V_BLOCK)
    line = tl.arange(0, TOKENS)[:, None]
    for start in range(lowest, highest, BLOCKS):
        entry = start + tl.arange(0, BLOCKS)
        keys = load_keys(pooled_k, entry, C, K, N, N_BLOCK)
        mask = (entry[None, :] >= row_base[:, None]) & (entry[None, :] < row_end[:, None]) & exists[:, None]
        importance = importances(queries, keys, log_sum, mask, TOKENS, HEADS, G, SCALE, PRECISION)
        tl.store(scratch + line * C + entry[None, :], importance, mask=(entry < C)[None, :])


@jit
def _select_kernel(
    q, pooled_k, pooled_v, position, base, T, C, tiles, o, lse, indices, scratch, C_BLOCK: tl.constexpr,
    PICK: tl.constexpr, H: tl.constexpr, K: tl.constexpr, G: tl.constexpr, N: tl.constexpr, V: tl.constexpr,
    S: tl.constexpr, M: tl.constexpr, SCALE: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
    BLOCKS: tl.constexpr, N_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # A program takes one tile after another, so that the scratch for importances does not grow with the tokens.
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    q += batch * T * (H * N)
    o += batch * T * (H * V)
    lse += batch * T * H
    indices += batch * T * (K * M)
    position += batch * T
    base += batch * T
    pooled_k += (batch * C * K + head) * N
    pooled_v += (batch * C * K + head) * V
    scratch += ((batch * K + head) * tl.num_programs(0) + tl.program_id(0)) * TOKENS * C
    line = tl.arange(0, PICK)
    entry = columns(C_BLOCK, PICK)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        _look(
            q, pooled_k, pooled_v, position, base, tile * TOKENS, T, C, head, o, lse, scratch, H, K, G, N, V, S, SCALE,
            TOKENS, HEADS, BLOCKS, N_BLOCK, V_BLOCK, PRECISION,
        )  # fmt: skip
        tl.debug_barrier()  # what other threads left in scratch is read below
        for row in range(0, TOKENS, PICK):
            t = tile * TOKENS + row + line
            exists = (t < T) & (row + line < TOKENS)
            number = entry - tl.load(base + t, mask=exists, other=0)[None, :, None]
            at = tl.load(position + t, mask=exists, other=-1)
            current = tl.where(at >= 0, at // S, -1)
            earlier = (number >= 0) & (number < current[None, :, None])
            value = tl.load(scratch + (row + line)[None, :, None] * C + entry, mask=earlier & (entry < C), other=0.0)
            pointer = indices + (t * K + head) * M
            store_chosen(pointer, value, number, current, tl.where(exists, M, 0), earlier, G, M)
        tl.debug_barrier()  # and only then written again


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Block means read at a time, programs, warps and stages."""

    blocks: int = 64
    programs: int = 1056
    warps: int = 4
    stages: int = 2


TILES = Tiles()


def select(
    case: Any, q: Array, pooled_k: Array, pooled_v: Array, layout: Layout
) -> tuple[Array, Float32[Array, "B T H"], Int32[Array, "B T K M"]]:
    """The compressed branch, its logsumexp, and the selected block numbers (ascending, -1 fills up)."""
    M, C = slots(case), pooled_k.shape[1]
    constants = shared_constants(case)
    tiles = ceil_div(case.T, constants["TOKENS"])
    programs = min(tiles, ceil_div(TILES.programs, case.B * case.K))
    C_BLOCK = power_of_2(C, 32)
    *results, _ = triton_call(
        _select_kernel,
        *(q, pooled_k, pooled_v, layout.position, layout.base, case.T, C, tiles),
        out_shape=(
            jax.ShapeDtypeStruct((case.B, case.T, case.H, case.V), q.dtype),
            jax.ShapeDtypeStruct((case.B, case.T, case.H), jnp.float32),
            jax.ShapeDtypeStruct((case.B, case.T, case.K, M), jnp.int32),
            jax.ShapeDtypeStruct((case.B, case.K, programs, constants["TOKENS"], C), jnp.float32),
        ),
        grid=(programs, case.K, case.B),
        num_warps=TILES.warps,
        num_stages=TILES.stages,
        C_BLOCK=C_BLOCK,
        PICK=TILES.warps,
        M=M,
        BLOCKS=TILES.blocks,
        **constants,
    )
    return tuple(results)
