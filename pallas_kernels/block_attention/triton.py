"""Block attention in triton.language, through jax-triton: the forward pass and the cached form.

Two kernels. The first owns a tile of query tokens with all heads of one KV head: attention over block means, then the
blocks again for their importance, of which it keeps the best; importances are in memory for the tiles under way alone.
The second reads, for the same tile, each block that any of its tokens selected once, and masks the tokens that did not.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from pallas_kernels.block_attention.blocks import Layout, plain_layout, pool
from pallas_kernels.block_attention.plan import Readers, Union, block_bound, readers, union
from pallas_kernels.block_attention.triton_gather import gathered
from pallas_kernels.block_attention.triton_tiles import (
    PIECE,
    gathers,
    load_heads,
    load_keys,
    power_of_2,
    shared_constants,
    slots,
    store_heads,
    tile_rows,
    visible_means,
)
from pallas_kernels.dispatch import UnsupportedCase
from pallas_kernels.tiles import ceil_div, check_choice
from pallas_kernels.triton_call import check_installed, fold_batch, jit, tl, triton_call


class Residuals(NamedTuple):
    """lse: base 2, 0 where nothing is seen."""

    indices: Int32[Array, "B T K M"]
    lse_compressed: Float32[Array, "B T H"]
    lse_selected: Float32[Array, "B T H"]
    together: Union | None
    """For ``selected``; None where ``gathered`` has lists instead."""
    lists: Readers | None


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
def ranks(flags):
    """How many of each token's flags are set up to each, itself included."""
    count = flags.to(tl.int32)
    line = tl.sum(count, 0)
    return tl.cumsum(count, 0, reverse=True) + (tl.cumsum(line, 1) - line)[None, :, :]


@jit
def chosen(bits, wanted):
    """Which numbers of each token are the ``wanted`` [TOKENS] largest; of equal ones, the first.

    bits, in the form of ``columns``: those of numbers that are not negative, which order as integers do; -1 is no
    candidate. The largest bound that enough of them reach is found bit by bit: counts alone, where a sort would move
    every number.
    """
    bound = tl.zeros_like(wanted)
    for i in range(31):
        trial = bound | (1 << (30 - i))
        bound = tl.where(total(bits >= trial[None, :, None]) >= wanted, trial, bound)
    above, at = bits > bound[None, :, None], bits == bound[None, :, None]
    return above | (at & (ranks(at) <= (wanted - total(above))[None, :, None]))


@jit
def store_chosen(pointer, value, number, current, count, earlier, G: tl.constexpr, M: tl.constexpr,
                 SLOTS: tl.constexpr):  # fmt: skip
    """Writes each token's selected blocks, ascending, behind ``pointer`` [tokens]; -1 fills up.

    value: importances of the blocks ``number``, in the form of ``columns``, where ``earlier``: before the token's own
    block ``current``, which may be incomplete and so in no table; -1 is padding. ``count``: M, or 0 to write nothing.
    """
    forced = (number == 0) | (number == current[None, :, None] - 1)
    bits = tl.where(earlier, tl.where(forced, G * 1.0, value).to(tl.int32, bitcast=True), -1)
    # The token's own block has the most there is and the last number.
    most = tl.full(value.shape, G, tl.float32).to(tl.int32, bitcast=True)
    own = (current >= 0) & (total(bits == most) < M)
    take = chosen(bits, M - own.to(tl.int32))
    tl.store(pointer[None, :, None] + ranks(take) - 1, number, mask=take)
    taken = total(take)[:, None]
    slot = tl.arange(0, SLOTS)[None, :]
    last = tl.where((slot == taken) & own[:, None], current[:, None], -1)
    tl.store(pointer[:, None] + slot, last, mask=(slot >= taken) & (slot < count[:, None]))


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
    BLOCKS: tl.constexpr, SLOTS: tl.constexpr, N_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
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
            store_chosen(pointer, value, number, current, tl.where(exists, M, 0), earlier, G, M, SLOTS)
        tl.debug_barrier()  # and only then written again


@jit
def _selected_kernel(
    q,
    k,
    v,
    start,
    position,
    first,
    bits,
    count,
    T,
    U,
    L,
    o,
    lse,
    H: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    N: tl.constexpr,
    V: tl.constexpr,
    S: tl.constexpr,
    SCALE: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    N_BLOCK: tl.constexpr,
    V_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    # The last tiles first: they have the most blocks to read.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    entry = (batch * K + head) * tl.num_programs(0) + tile
    first += entry * L
    bits += entry * L
    q += batch * T * (H * N)
    o += batch * T * (H * V)
    lse += batch * T * H
    k += (batch * U * K + head) * N
    v += (batch * U * K + head) * V

    token, query_head, exists = tile_rows(tile * TOKENS, T, head, TOKENS, HEADS, G)
    index = tl.load(start + batch * T + token, mask=token < T, other=0)
    index += tl.load(position + batch * T + token, mask=token < T, other=-1)
    queries = load_heads(q, token, query_head, exists, H, N, N_BLOCK)
    bit = token - tile * TOKENS

    acc = tl.zeros([TOKENS * HEADS, V_BLOCK], tl.float32)
    m = tl.full([TOKENS * HEADS], -1e30, tl.float32)
    l = tl.zeros([TOKENS * HEADS], tl.float32)
    for i in range(tl.load(count + entry)):
        key = tl.load(first + i) + tl.arange(0, S)
        member = (tl.load(bits + i) >> bit) & 1
        keys = load_keys(k, key, U, K, N, N_BLOCK)
        values = load_keys(v, key, U, K, V, V_BLOCK)
        mask = (member != 0)[:, None] & (key[None, :] <= index[:, None])
        acc, m, l = online(queries, keys, values, mask, acc, m, l, SCALE, PRECISION)
    finish(o, lse, acc, m, l, token, query_head, exists, H, V, V_BLOCK)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Block means read at a time, programs for the selection, warps and stages."""

    blocks: int = 64
    programs: int = 1056
    select_warps: int = 4
    select_stages: int = 2
    warps: int = 4
    stages: int = 3


TILES = Tiles()


def check(case: Any) -> None:
    """Raises UnsupportedCase where these kernels do not run the case."""
    check_installed("block_attention")
    fix = "use implementation='xla'"
    check_choice("block_attention", "block_size", case.block_size, (16, 32, 64), fix)

    def require(condition: bool, message: str) -> None:
        if not condition:
            raise UnsupportedCase(f"block_attention: {message}; {fix}")

    group = case.H // case.K
    require(group <= 64, f"{group} query heads per KV head; implementation='triton' takes at most 64")
    require(max(case.N, case.V) <= 128, f"head sizes N={case.N}, V={case.V}; implementation='triton' takes at most 128")
    require(slots(case) <= 32, f"block_counts={case.block_counts}; implementation='triton' takes at most 32")
    blocks = block_bound(case.U, case.block_size, case.segment_ids)
    require((blocks + 1) * case.U < 2**32, f"{case.U} tokens are too many for one sorted list of their blocks")
    numbers = max(case.T * case.H, case.U * case.K) * max(case.N, case.V)
    require(numbers < 2**31, f"one row of the batch holds {numbers} numbers, which are counted in 32 bits")


def forward(case: Any, q: Array, k: Array, v: Array, layout: Layout | None) -> tuple[tuple[Array, Array], Residuals]:
    """See ``api``."""
    return fold_batch(_forward, ("case",))(q, k, v, layout, case=case)


def attend(
    case: Any, q: Array, k: Array, v: Array, pooled_k: Array, pooled_v: Array, position: Int32[Array, "B T"]
) -> tuple[Array, Array]:
    """See ``api``."""
    return fold_batch(_attend, ("case",))(q, k, v, pooled_k, pooled_v, position, case=case)


def backward(*arguments: Any) -> Any:
    """See ``triton_bwd.backward``."""
    from pallas_kernels.block_attention.triton_bwd import backward as run

    return run(*arguments)


def step(*arguments: Any) -> Any:
    """See ``triton_step.step``."""
    from pallas_kernels.block_attention.triton_step import step as run

    return run(*arguments)


def _forward(q: Array, k: Array, v: Array, layout: Layout | None, *, case: Any) -> Any:
    case = dataclasses.replace(case, B=q.shape[0])
    pooled_k, pooled_v = pool(k, layout, case.block_size), pool(v, layout, case.block_size)
    return _both(case, q, k, v, pooled_k, pooled_v, layout or plain_layout(case.B, case.T, case.block_size))


def _attend(
    q: Array, k: Array, v: Array, pooled_k: Array, pooled_v: Array, position: Array, *, case: Any
) -> tuple[Array, Array]:
    case = dataclasses.replace(case, B=q.shape[0])
    zero = jnp.zeros_like(position)
    layout = Layout(zero, position, zero, jnp.zeros((case.B, 1), jnp.int32))
    return _both(case, q, k, v, pooled_k, pooled_v, layout)[0]


def _both(
    case: Any, q: Array, k: Array, v: Array, pooled_k: Array, pooled_v: Array, layout: Layout
) -> tuple[tuple[Array, Array], Residuals]:
    o_c, lse_c, indices = select(case, q, pooled_k, pooled_v, layout)
    if gathers(case):
        lists = readers(indices, layout, case.block_size, case.segment_ids, PIECE)
        o_s, lse_s = gathered(case, q, k, v, layout, indices, lists)
        return (o_c, o_s), Residuals(indices, lse_c, lse_s, None, lists)
    together = union(indices, layout, case.block_size, shared_constants(case)["TOKENS"])
    o_s, lse_s = selected(case, q, k, v, layout, together)
    return (o_c, o_s), Residuals(indices, lse_c, lse_s, together, None)


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
        num_warps=TILES.select_warps,
        num_stages=TILES.select_stages,
        C_BLOCK=C_BLOCK,
        PICK=TILES.select_warps,
        M=M,
        SLOTS=power_of_2(M, 2),
        BLOCKS=TILES.blocks,
        **constants,
    )
    return tuple(results)


def selected(
    case: Any, q: Array, k: Array, v: Array, layout: Layout, together: Union
) -> tuple[Array, Float32[Array, "B T H"]]:
    """The selected branch and its logsumexp."""
    return triton_call(
        _selected_kernel,
        *(q, k, v, layout.start, layout.position, together.first, together.bits, together.size),
        *(case.T, case.U, together.first.shape[-1]),
        out_shape=(
            jax.ShapeDtypeStruct((case.B, case.T, case.H, case.V), q.dtype),
            jax.ShapeDtypeStruct((case.B, case.T, case.H), jnp.float32),
        ),
        grid=(together.size.shape[-1], case.K, case.B),
        num_warps=TILES.warps,
        num_stages=TILES.stages,
        **shared_constants(case),
    )
