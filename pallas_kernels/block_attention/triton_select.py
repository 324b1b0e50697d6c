"""Block attention in triton.language: the compressed branch, and which blocks each token selects.

A program owns a tile of query tokens with all heads of one KV head: attention over block means, then the blocks again
for their importance, of which it keeps the best. Importances are in memory for the tiles under way alone.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from pallas_kernels.block_attention.api import Case
from pallas_kernels.block_attention.blocks import Layout, table_size
from pallas_kernels.block_attention.triton_tiles import (
    load_heads,
    load_keys,
    shared_constants,
    slots,
    store_heads,
    tile_rows,
    visible_means,
)
from pallas_kernels.tiles import ceil_div, power_of_2
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
def columns(COUNT: tl.constexpr, TOKENS: tl.constexpr, LANES: tl.constexpr):
    """The numbers below COUNT for each of TOKENS tokens, [LANES, TOKENS, COUNT / LANES]: LANES threads hold a token's.

    With 32 threads to LANES x TOKENS / warps, a token's numbers lie in one warp, and no sum over them waits for another
    warp. That takes this order of axes, and numbers that count down: the compiler would give neighbours in memory to
    one thread, and spread a token over more threads.
    """
    lane, row = tl.arange(0, LANES), tl.arange(0, COUNT // LANES)
    number = (COUNT - 1) - (lane[:, None, None] * (COUNT // LANES) + row[None, None, :])
    return number + tl.zeros([1, TOKENS, 1], tl.int32)


@jit
def total(flags):
    """How many of each token's flags, in the form of ``columns``, are set."""
    return tl.sum(tl.sum(flags.to(tl.int32), 2), 0)


@jit
def _next_bit(bits, bound, reach, unit, wanted: tl.constexpr):
    trial = bound | unit
    count = total(bits >= trial[None, :, None])
    keep = count >= wanted
    return tl.where(keep, trial, bound), tl.where(keep, count, reach)


@jit
def _next_two_bits(bits, bound, reach, unit, wanted: tl.constexpr):
    """Two bits with one sum over threads: three counts side by side in one integer."""
    WIDE: tl.constexpr = bits.shape[0] * bits.shape[2] >= 1024
    DTYPE: tl.constexpr = tl.int64 if WIDE else tl.int32
    FIELD: tl.constexpr = 21 if WIDE else 10
    MASK: tl.constexpr = (1 << FIELD) - 1
    one, two, three = bound | unit, bound | (unit * 2), bound | (unit * 3)
    count = (bits >= one[None, :, None]).to(DTYPE) + ((bits >= two[None, :, None]).to(DTYPE) << FIELD)
    count = tl.sum(tl.sum(count + ((bits >= three[None, :, None]).to(DTYPE) << (2 * FIELD)), 2), 0)
    n1, n2, n3 = (
        (count & MASK).to(tl.int32),
        ((count >> FIELD) & MASK).to(tl.int32),
        (count >> (2 * FIELD)).to(tl.int32),
    )
    bound = tl.where(n3 >= wanted, three, tl.where(n2 >= wanted, two, tl.where(n1 >= wanted, one, bound)))
    reach = tl.where(n3 >= wanted, n3, tl.where(n2 >= wanted, n2, tl.where(n1 >= wanted, n1, reach)))
    return bound, reach


@jit
def largest_bound(bits, wanted: tl.constexpr, ALONE: tl.constexpr):
    """(bound, reach) for each token: ``reach`` of its bits are at least ``bound``, as many as wanted if they can be.

    The bound's bits are found from the highest down, until no token has too many: most need half of them. More than are
    wanted reach it where some are equal, fewer where there are no more. ALONE: nothing else runs on the multiprocessor,
    so that rounds cost what their waits do, and half as many with three comparisons each are faster.
    """
    PAIRS: tl.constexpr = ALONE or (bits.shape[2] <= 4 and bits.shape[0] * bits.shape[2] < 1024)
    bound = tl.zeros([bits.shape[1]], tl.int32)
    bound, reach = _next_bit(bits, bound, total(bits >= 0), 1 << 30, wanted)
    unit = 1 << 29
    if PAIRS:
        unit = 1 << 28
    while (unit > 0) & (tl.max(reach, 0) > wanted):
        for _ in tl.static_range(3):
            if PAIRS:
                bound, reach = _next_two_bits(bits, bound, reach, unit, wanted)
                unit = unit >> 2
            else:
                bound, reach = _next_bit(bits, bound, reach, unit, wanted)
                unit = unit >> 1
    return bound, reach


@jit
def chosen(bits, number, wanted: tl.constexpr, ALONE: tl.constexpr):
    """Which blocks of each token have the ``wanted`` largest; of equal ones, the smaller number.

    bits and number, in the form of ``columns``: the bits of importances, which order as integers do, as they are not
    negative; -1 is no candidate. Counts alone, where a sort would move every number.
    """
    bound, reach = largest_bound(bits, wanted, ALONE)
    take = bits >= bound[None, :, None]
    if tl.max(reach, 0) > wanted:  # more are equal than are wanted, which is rare
        above, at = bits > bound[None, :, None], bits == bound[None, :, None]
        left, end = wanted - total(above), tl.zeros_like(bound)
        for i in range(24):
            trial = end | (1 << (23 - i))
            end = tl.where(total(at & (number < trial[None, :, None])) <= left, trial, end)
        take = above | (at & (number < end[None, :, None]))
    return take


@jit
def store_chosen(
    pointer, value, number, current, count, candidate, G: tl.constexpr, M: tl.constexpr, ALONE: tl.constexpr = False
):
    """Writes each token's selected blocks, ascending, behind ``pointer`` [TOKENS]; -1 fills up.

    value: importances of the blocks ``number``, in the form of ``columns``, where ``candidate``: up to the token's own
    block ``current`` [TOKENS]. ``count``: M, or 0 to write nothing. ALONE: see ``largest_bound``.
    """
    forced = (number == 0) | (number >= current[None, :, None] - 1)
    bits = tl.where(candidate, tl.where(forced, G * 1.0, value).to(tl.int32, bitcast=True), -1)
    take = chosen(bits, number, M, ALONE)
    # As many blocks are taken before a block as behind it in its thread and in the threads behind: numbers count down.
    taken = take.to(tl.int32)
    held = tl.sum(taken, 2)[:, :, None]
    slot = tl.cumsum(held, 0, reverse=True) - held + tl.cumsum(taken, 2, reverse=True) - taken
    # The others fill up what is left of the M places, in their order.
    LAST: tl.constexpr = taken.shape[0] * taken.shape[2] - 1
    lane, row = tl.arange(0, taken.shape[0]), tl.arange(0, taken.shape[2])
    before = LAST - (lane[:, None, None] * taken.shape[2] + row[None, None, :])
    place = tl.where(take, slot, tl.sum(held, 0)[None, :, :] + before - slot)
    tl.store(pointer[None, :, None] + place, tl.where(take, number, -1), mask=place < count[None, :, None])


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
def _pick(
    importance, indices, position, base, t, line, exists, entry, head, C, K: tl.constexpr, G: tl.constexpr,
    S: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Selects the blocks of tokens t [PICK], to whose importances a pointer each leads; writes lines of indices."""
    number = entry - tl.load(base + t, mask=exists, other=0)[None, :, None]
    at = tl.load(position + t, mask=exists, other=-1)
    current = tl.where(at >= 0, at // S, -1)
    candidate = (number >= 0) & (number <= current[None, :, None])
    value = tl.load(importance[None, :, None] + entry, mask=candidate & (entry < C), other=0.0)
    pointer = indices + (line * K + head) * M
    store_chosen(pointer, value, number, current, tl.where(exists, M, 0), candidate, G, M)


@jit
def _select_kernel(
    q, pooled_k, pooled_v, position, base, T, C, tiles, o, lse, indices, scratch, C_BLOCK: tl.constexpr,
    PICK: tl.constexpr, LANES: tl.constexpr, H: tl.constexpr, K: tl.constexpr, G: tl.constexpr, N: tl.constexpr,
    V: tl.constexpr, S: tl.constexpr, M: tl.constexpr, SCALE: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
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
    entry = columns(C_BLOCK, PICK, LANES)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        _look(
            q, pooled_k, pooled_v, position, base, tile * TOKENS, T, C, head, o, lse, scratch, H, K, G, N, V, S, SCALE,
            TOKENS, HEADS, BLOCKS, N_BLOCK, V_BLOCK, PRECISION,
        )  # fmt: skip
        tl.debug_barrier()  # what other threads left in scratch is read below
        for row in range(0, TOKENS, PICK):
            t = tile * TOKENS + row + line
            exists = (t < T) & (row + line < TOKENS)
            _pick(scratch + (row + line) * C, indices, position, base, t, t, exists, entry, head, C, K, G, S, M)
        tl.debug_barrier()  # and only then written again


@jit
def _pick_kernel(
    importance, position, base, first, T, TOKENS, C, indices, C_BLOCK: tl.constexpr, PICK: tl.constexpr,
    LANES: tl.constexpr, K: tl.constexpr, G: tl.constexpr, S: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    line = tl.program_id(0) * PICK + tl.arange(0, PICK)
    t = tl.load(first) + line
    exists = (line < TOKENS) & (t < T)
    importance += ((batch * K + head) * TOKENS + line) * C
    indices += batch * TOKENS * (K * M)
    entry = columns(C_BLOCK, PICK, LANES)
    _pick(importance, indices, position + batch * T, base + batch * T, t, line, exists, entry, head, C, K, G, S, M)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Block means read at a time, programs, numbers that a thread holds in selecting as long as ``lanes`` threads to a
    token are enough, warps and stages."""

    blocks: int = 32
    programs: int = 1056
    held: int = 8
    lanes: int = 128
    warps: int = 4
    stages: int = 2


TILES = Tiles()
MANY = Tiles(lanes=32)  # for tiles of 8 tokens and more
PICKING = Tiles(lanes=32)  # where importances are in memory


def select(
    case: Case, q: Array, pooled_k: Array, pooled_v: Array, layout: Layout
) -> tuple[Array, Float32[Array, "B T H"], Int32[Array, "B T K M"]]:
    """The compressed branch, its logsumexp, and the selected block numbers (ascending, -1 fills up)."""
    M, C = slots(case), pooled_k.shape[1]
    constants = shared_constants(case)
    TOKENS = constants["TOKENS"]
    chosen_tiles = MANY if TOKENS >= 8 else TILES
    tiles = ceil_div(case.T, TOKENS)
    programs = min(tiles, ceil_div(chosen_tiles.programs, case.B * case.K))
    C_BLOCK = _columns_block(case)
    shared = min(32, power_of_2(32 * chosen_tiles.warps // TOKENS))
    lanes = max(shared, min(chosen_tiles.lanes, C_BLOCK // chosen_tiles.held))
    *results, _ = triton_call(
        _select_kernel,
        *(q, pooled_k, pooled_v, layout.position, layout.base, case.T, C, tiles),
        out_shape=(
            jax.ShapeDtypeStruct((case.B, case.T, case.H, case.V), q.dtype),
            jax.ShapeDtypeStruct((case.B, case.T, case.H), jnp.float32),
            jax.ShapeDtypeStruct((case.B, case.T, case.K, M), jnp.int32),
            jax.ShapeDtypeStruct((case.B, case.K, programs, TOKENS, C), jnp.float32),
        ),
        grid=(programs, case.K, case.B),
        num_warps=chosen_tiles.warps,
        num_stages=chosen_tiles.stages,
        C_BLOCK=C_BLOCK,
        PICK=32 * chosen_tiles.warps // lanes,
        LANES=lanes,
        M=M,
        BLOCKS=chosen_tiles.blocks,
        **constants,
    )
    return tuple(results)


def pick(
    case: Case, importance: Float32[Array, "B K tokens C"], layout: Layout, first: Int32[Array, "1"]
) -> Int32[Array, "B tokens K M"]:
    """The selected blocks of the tokens from ``first`` on, whose importances are known; undefined behind the last."""
    tokens, C = importance.shape[2:]
    lanes = PICKING.lanes
    width = 32 * PICKING.warps // lanes
    return triton_call(
        _pick_kernel,
        *(importance, layout.position, layout.base, first, case.T, tokens, C),
        out_shape=jax.ShapeDtypeStruct((case.B, tokens, case.K, slots(case)), jnp.int32),
        grid=(ceil_div(tokens, width), case.K, case.B),
        num_warps=PICKING.warps,
        C_BLOCK=_columns_block(case),
        PICK=width,
        LANES=lanes,
        K=case.K,
        G=case.H // case.K,
        S=case.block_size,
        M=slots(case),
    )


def _columns_block(case: Case) -> int:
    # A token's own block may be incomplete, and so in no table; where documents are packed it counts behind its base.
    C = table_size(case.U, case.block_size)
    return power_of_2(C + 1 if case.segment_ids or case.U % case.block_size else C, 32)
