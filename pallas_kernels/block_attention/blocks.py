"""Where do blocks begin and end: the layout of a row, means over its blocks, and the cache that keeps them up to date.

A document is cut into blocks of S tokens from its own first token on. A row of several documents (or with padding)
lists its complete blocks in one table, in order: block c of a document is entry ``base + c`` of the table, where
``base`` counts the complete blocks of the documents before it. An incomplete block (a document's last) is in no table.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.documents import document_bounds


class Layout(NamedTuple):
    """How the tokens of each row fall into documents and blocks. S is the block size, C = max(1, T // S)."""

    start: Int32[Array, "B T"]
    """Index of the first token of the token's document."""
    position: Int32[Array, "B T"]
    """Index within the document; -1 for padding."""
    base: Int32[Array, "B T"]
    """Table entry of the first complete block of the token's document."""
    first_token: Int32[Array, "B C"]
    """Index of the first token of each complete block of the row; T where the table has no such entry."""


class BlockCache(NamedTuple):
    """Keys and values of one document per row, the means of its complete blocks, and its length so far."""

    k: Float[Array, "B U K N"]
    v: Float[Array, "B U K V"]
    pooled_k: Float[Array, "B C K N"]
    pooled_v: Float[Array, "B C K V"]
    length: Int32[Array, "B"]


def table_size(tokens: int, block_size: int) -> int:
    """The most complete blocks that a row can have, at least 1 so that no array is empty."""
    return max(1, tokens // block_size)


def row_layout(segment_ids: Int32[Array, "B T"], block_size: int) -> Layout:
    """The layout of packed rows: documents are runs of one nonzero id."""
    B, T = segment_ids.shape
    index = jnp.arange(T, dtype=jnp.int32)
    start, _ = document_bounds(segment_ids)
    position = jnp.where(segment_ids != 0, index - start, -1)
    ends = (position >= 0) & ((position + 1) % block_size == 0)
    count = jnp.cumsum(ends, axis=1, dtype=jnp.int32)
    base = count - (position + 1) // block_size
    C = table_size(T, block_size)
    entry = jnp.where(ends, count - 1, C)
    rows = jnp.arange(B, dtype=jnp.int32)[:, None]
    first_token = jnp.full((B, C), T, jnp.int32).at[rows, entry].set(index - (block_size - 1), mode="drop")
    return Layout(start, position, base, first_token)


def plain_layout(B: int, T: int, block_size: int) -> Layout:
    """The layout of rows that are one document each, without padding."""
    position = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    zero = jnp.zeros((B, T), jnp.int32)
    blocks = jnp.arange(table_size(T, block_size), dtype=jnp.int32) * block_size
    return Layout(zero, position, zero, jnp.broadcast_to(blocks, (B, blocks.size)))


def pool(x: Float[Array, "B T K N"], layout: Layout | None, block_size: int) -> Float[Array, "B C K N"]:
    """The mean of each complete block, summed in float32; entries without a block are finite and never read."""
    B, T, *rest = x.shape
    C = table_size(T, block_size)
    if block_size > T:
        return jnp.zeros((B, C, *rest), x.dtype)
    if layout is None:
        blocks = x[:, : C * block_size].reshape(B, C, block_size, *rest)
    else:
        blocks = read_blocks(x, layout.first_token, block_size)
    return jnp.mean(blocks.astype(jnp.float32), axis=2).astype(x.dtype)


def unpool(
    gradient: Float[Array, "B C K N"], layout: Layout | None, T: int, block_size: int
) -> Float[Array, "B T K N"]:
    """The transpose of :func:`pool`: each token of a complete block gets 1/S of its block's gradient."""
    B, C, *rest = gradient.shape
    share = gradient * (1.0 / block_size)
    if block_size > T:
        return jnp.zeros((B, T, *rest), gradient.dtype)
    if layout is None:
        spread = jnp.repeat(share, block_size, axis=1)
        return jnp.pad(spread, ((0, 0), (0, T - C * block_size), (0, 0), (0, 0)))
    block = layout.position // block_size
    entry = jnp.clip(layout.base + block, 0, C - 1)
    complete = jnp.take_along_axis(layout.first_token, entry, axis=1) == layout.start + block * block_size
    spread = jnp.take_along_axis(share, entry[:, :, None, None], axis=1)
    return jnp.where((complete & (layout.position >= 0))[:, :, None, None], spread, 0.0)


def read_blocks(x: Float[Array, "B U K N"], first: Int32[Array, "B C"], block_size: int) -> Float[Array, "B C S K N"]:
    """The block_size tokens from each index on; an index too near the end reads the last block_size tokens instead."""
    read = jax.vmap(lambda row, i: jax.lax.dynamic_slice_in_dim(row, i, block_size, axis=0), in_axes=(None, 0))
    return jax.vmap(read)(x, first)


def init_block_cache(
    batch: int, max_length: int, num_kv_heads: int, head_dim: int, value_dim: int, block_size: int, dtype: DTypeLike
) -> BlockCache:
    """An empty cache for documents of at most ``max_length`` tokens."""
    C = table_size(max_length, block_size)
    return BlockCache(
        k=jnp.zeros((batch, max_length, num_kv_heads, head_dim), dtype),
        v=jnp.zeros((batch, max_length, num_kv_heads, value_dim), dtype),
        pooled_k=jnp.zeros((batch, C, num_kv_heads, head_dim), dtype),
        pooled_v=jnp.zeros((batch, C, num_kv_heads, value_dim), dtype),
        length=jnp.zeros((batch,), jnp.int32),
    )


def append(
    cache: BlockCache,
    k: Float[Array, "B T K N"],
    v: Float[Array, "B T K V"],
    valid: Bool[Array, "B T"] | None,
    block_size: int,
) -> tuple[BlockCache, Int32[Array, "B T"]]:
    """Writes the valid tokens behind those in the cache; returns it and each new token's position (-1: padding).

    Tokens beyond the cache's max_length are dropped: the caller checks on the host that there are none.
    """
    B, T = k.shape[:2]
    U = cache.k.shape[1]
    if valid is None:
        valid = jnp.ones((B, T), bool)
    rank = jnp.cumsum(valid, axis=1, dtype=jnp.int32)
    position = jnp.where(valid, cache.length[:, None] + rank - 1, -1)
    rows = jnp.arange(B, dtype=jnp.int32)[:, None]
    slot = jnp.where(valid, position, U)
    k_all = cache.k.at[rows, slot].set(k.astype(cache.k.dtype), mode="drop")
    v_all = cache.v.at[rows, slot].set(v.astype(cache.v.dtype), mode="drop")
    length = cache.length + rank[:, -1]

    pooled_k, pooled_v = cache.pooled_k, cache.pooled_v
    if block_size <= U:
        # The blocks that the new tokens may have completed: the one under way, and those after it.
        C = pooled_k.shape[1]
        touched = cache.length[:, None] // block_size + jnp.arange(min(C, T // block_size + 1), dtype=jnp.int32)
        complete = (touched < C) & ((touched + 1) * block_size <= length[:, None])
        entry = jnp.where(complete, touched, C)

        def mean(x: Array) -> Array:
            blocks = read_blocks(x, jnp.minimum(touched, C - 1) * block_size, block_size)
            return jnp.mean(blocks.astype(jnp.float32), axis=2).astype(x.dtype)

        pooled_k = pooled_k.at[rows, entry].set(mean(k_all), mode="drop")
        pooled_v = pooled_v.at[rows, entry].set(mean(v_all), mode="drop")
    return BlockCache(k_all, v_all, pooled_k, pooled_v, length), position
