"""Which blocks does a tile of queries read together, and which queries read a block: the selection turned into lists.

Plain jax.numpy on small integer arrays, for the kernels. A block is named by the index of its first token, which is
unique in its row, or by its ordinal: the number of blocks that begin before it in the row, incomplete ones included.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from pallas_kernels.block_attention.blocks import Layout
from pallas_kernels.tiles import ceil_div

NOTHING = 2**31 - 1


class Union(NamedTuple):
    """The distinct blocks that any token of a tile selected, ascending: first tokens, and a bit per token that did."""

    first: Int32[Array, "B K I L"]
    bits: Int32[Array, "B K I L"]
    size: Int32[Array, "B K I"]


class Readers(NamedTuple):
    """For each block the tokens that selected it, cut into pieces of a limited number of tokens.

    Piece j of a row and head is the entries ``entry[begin[j] : end[j]]`` and belongs to the block that begins at
    ``first[j]``. The pieces of block i are ``pieces[i]`` up to ``pieces[i + 1]``. An entry is token M + slot, where the
    token has the block in slot ``slot`` of its M selected blocks.
    """

    entry: Int32[Array, "B K E"]
    first: Int32[Array, "B K P"]
    begin: Int32[Array, "B K P"]
    end: Int32[Array, "B K P"]
    pieces: Int32[Array, "B K I"]


def union(indices: Int32[Array, "B T K M"], layout: Layout, block_size: int, tile: int) -> Union:
    """Tiles of ``tile`` <= 31 tokens from the start of each row."""
    B, T, K, M = indices.shape
    first = layout.start[:, :, None, None] + indices * block_size
    first = jnp.where(indices >= 0, first, NOTHING)
    if T == 1:  # one token's blocks are distinct, and -1 fills up behind them
        first = first.transpose(0, 2, 1, 3)
        chosen = first != NOTHING
        return Union(first, chosen.astype(jnp.int32), jnp.sum(chosen, axis=-1, dtype=jnp.int32))
    tiles = ceil_div(T, tile)
    first = jnp.pad(first, ((0, 0), (0, tiles * tile - T), (0, 0), (0, 0)), constant_values=NOTHING)
    first = first.reshape(B, tiles, tile, K, M).transpose(0, 3, 1, 2, 4)
    ordered = jnp.sort(first.reshape(B, K, tiles, tile * M), axis=-1)
    before = jnp.concatenate([jnp.full_like(ordered[..., :1], -1), ordered[..., :-1]], axis=-1)
    distinct = jnp.sort(jnp.where(ordered == before, NOTHING, ordered), axis=-1)
    member = jnp.any(first[:, :, :, None] == distinct[..., None, None], axis=-1)
    bits = jnp.sum(member.astype(jnp.int32) << jnp.arange(tile, dtype=jnp.int32), axis=-1, dtype=jnp.int32)
    return Union(distinct, bits, jnp.sum(distinct != NOTHING, axis=-1, dtype=jnp.int32))


def block_bound(T: int, block_size: int, packed: bool) -> int:
    """The most blocks that can begin in a row: where documents are packed, each token may be one."""
    return T if packed else ceil_div(T, block_size)


def ordinals(layout: Layout, block_size: int, packed: bool) -> Int32[Array, "B T"]:
    """The ordinal of each token's block; -1 for padding."""
    if not packed:
        return layout.position // block_size
    begins = (layout.position >= 0) & (layout.position % block_size == 0)
    return jnp.where(layout.position >= 0, jnp.cumsum(begins, axis=1, dtype=jnp.int32) - 1, -1)


def readers(
    indices: Int32[Array, "B T K M"], layout: Layout, block_size: int, packed: bool, most_tokens: int
) -> Readers:
    """Lists in pieces of at most ``most_tokens`` tokens."""
    B, T, K, M = indices.shape
    blocks = block_bound(T, block_size, packed)
    ordinal = ordinals(layout, block_size, packed)
    own = ordinal - layout.position // block_size  # the ordinal of the document's block 0
    block = jnp.where(indices >= 0, own[:, :, None, None] + indices, blocks)
    block, entry = _by_block(block.transpose(0, 2, 1, 3).reshape(B * K, T * M), blocks)
    block, entry = block.reshape(B, K, T * M), entry.reshape(B, K, T * M)
    size = jnp.sum(indices >= 0, axis=(1, 3), dtype=jnp.int32)
    offset = _offsets(block, size, blocks)
    count = offset[..., 1:] - offset[..., :-1]
    ends = jnp.cumsum(-(-count // most_tokens), axis=-1, dtype=jnp.int32)
    pieces = jnp.concatenate([jnp.zeros_like(ends[..., :1]), ends], axis=-1)
    P = blocks + T * M // most_tokens
    piece = jnp.broadcast_to(jnp.arange(P, dtype=jnp.int32), (B, K, P))
    # A block is written at its first piece; the pieces behind are its own until the next block's first.
    begins = jnp.where(count > 0, pieces[..., :-1], P)
    block = (
        jnp.zeros((B, K, P), jnp.int32)
        .at[(*_rows(B, K), begins)]
        .set(jnp.broadcast_to(jnp.arange(blocks, dtype=jnp.int32), (B, K, blocks)), mode="drop")
    )
    block = jax.lax.cummax(block, axis=2)
    number = piece - jnp.take_along_axis(pieces, block, axis=-1)
    begin = jnp.take_along_axis(offset, block, axis=-1) + number * most_tokens
    end = jnp.minimum(begin + most_tokens, jnp.take_along_axis(offset, block + 1, axis=-1))
    end = jnp.where(piece < ends[..., -1:], end, begin)
    if packed:
        rows = jnp.arange(B, dtype=jnp.int32)[:, None]
        at = jnp.where((layout.position >= 0) & (layout.position % block_size == 0), ordinal, blocks)
        index = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
        firsts = jnp.zeros((B, blocks), jnp.int32).at[rows, at].set(index, mode="drop")
        first = jnp.take_along_axis(jnp.broadcast_to(firsts[:, None], (B, K, blocks)), block, axis=-1)
    else:
        first = block * block_size
    return Readers(entry, first, begin, end, pieces)


def _by_block(block: Int32[Array, "R E"], blocks: int) -> tuple[Int32[Array, "R E"], Int32[Array, "R E"]]:
    """The blocks of each row in order, and the places in the row that they come from.

    One long sort: on a GPU a radix sort, which takes as many passes as a key has bytes, and of few bytes where blocks
    are few. Equal keys come in an order that is the same each time, and that is all that is asked of it.
    """
    R, E = block.shape
    ranges = blocks + 1
    keys = R * ranges
    dtype = jnp.uint16 if keys <= 2**16 else jnp.uint32
    row = jnp.arange(R, dtype=jnp.int32)[:, None] * ranges
    place = jnp.broadcast_to(jnp.arange(E, dtype=jnp.int32), (R, E))
    key, place = jax.lax.sort(((block + row).astype(dtype).reshape(-1), place.reshape(-1)), num_keys=1, is_stable=False)
    return key.astype(jnp.int32).reshape(R, E) - row, place.reshape(R, E)


def _offsets(block: Int32[Array, "B K E"], size: Int32[Array, "B K"], blocks: int) -> Int32[Array, "B K I"]:
    """Where each block's entries begin in lists ordered by block, and behind the last one the list's size.

    A binary search would be a loop of many small launches; here each change of block is written to the block's place.
    """
    B, K, E = block.shape
    before = jnp.concatenate([jnp.full_like(block[..., :1], -1), block[..., :-1]], axis=-1)
    index = jnp.arange(E, dtype=jnp.int32)
    here = (block != before) & (index < size[..., None])
    full = jnp.broadcast_to(size[..., None], (B, K, blocks + 1))
    first = full.at[(*_rows(B, K), jnp.where(here, block, blocks + 1))].set(
        jnp.broadcast_to(index, block.shape), mode="drop"
    )
    return jax.lax.cummin(first, axis=2, reverse=True)


def _rows(B: int, K: int) -> tuple[Array, Array]:
    return jnp.arange(B, dtype=jnp.int32)[:, None, None], jnp.arange(K, dtype=jnp.int32)[None, :, None]
