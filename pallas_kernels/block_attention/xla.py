"""Block attention in plain jax.numpy, a few query tokens at a time: any device, memory linear in T, and the reference.

Every pass walks over tiles of query tokens, small enough that a tile's logits and gathered keys stay within a fixed
number of elements. Kept for the backward pass: the selected block numbers, and a logsumexp per branch, token and head.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from pallas_kernels.block_attention.api import Case
from pallas_kernels.block_attention.blocks import Layout, plain_layout, pool, table_size, unpool
from pallas_kernels.tiles import ceil_div

_TILE_ELEMENTS = 2**23  # float32 elements that a tile's largest arrays may take together


class Residuals(NamedTuple):
    indices: Int32[Array, "B T K M"]
    lse_compressed: Float32[Array, "B T H"]
    lse_selected: Float32[Array, "B T H"]


class _Keys(NamedTuple):
    """What every tile reads."""

    k: Float[Array, "B U K N"]
    v: Float[Array, "B U K V"]
    pooled_k: Float[Array, "B C K N"]
    pooled_v: Float[Array, "B C K V"]


class _Place(NamedTuple):
    """Where the query tokens of a tile stand (see Layout)."""

    start: Int32[Array, "B T"]
    position: Int32[Array, "B T"]
    base: Int32[Array, "B T"]


def check(case: Case) -> None:
    """Every valid case is supported."""


def forward(case: Case, q: Array, k: Array, v: Array, layout: Layout | None) -> tuple[tuple[Array, Array], Residuals]:
    """(compressed, selected) outputs [B,T,H,V], each 0 where it sees nothing, and what backward needs."""
    keys = _Keys(k, v, pool(k, layout, case.block_size), pool(v, layout, case.block_size))
    outputs, indices, lse_c, lse_s = _attend(case, q, keys, _place(case, layout))
    return outputs, Residuals(indices, lse_c, lse_s)


def attend(
    case: Case, q: Array, k: Array, v: Array, pooled_k: Array, pooled_v: Array, position: Int32[Array, "B T"]
) -> tuple[Array, Array]:
    """The same outputs for queries at ``position`` (-1: padding) of one document per row, whose blocks are pooled."""
    zero = jnp.zeros_like(position)
    outputs, *_ = _attend(case, q, _Keys(k, v, pooled_k, pooled_v), _Place(zero, position, zero))
    return outputs


def select(case: Case, q: Array, k: Array, layout: Layout | None) -> Int32[Array, "B T K M"]:
    """The selected block numbers alone, most important first; -1 fills up."""
    keys = _Keys(k, k, *(pool(k, layout, case.block_size),) * 2)
    return _attend(case, q, keys, _place(case, layout))[1]


def backward(
    case: Case,
    q: Array,
    k: Array,
    v: Array,
    layout: Layout | None,
    outputs: tuple[Array, Array],
    residuals: Residuals,
    cotangents: tuple[Array, Array],
) -> tuple[Array, Array, Array]:
    """(dq, dk, dv) of both branches together."""
    keys = _Keys(k, v, pool(k, layout, case.block_size), pool(v, layout, case.block_size))

    def tile(gradients: _Keys, x: Any) -> tuple[_Keys, Array]:
        q, place, (o_c, o_s), (indices, lse_c, lse_s), (do_c, do_s) = x
        dq_c, dpooled_k, dpooled_v = _compressed_backward(case, q, keys, place, o_c, lse_c, do_c)
        dq_s, add = _selected_backward(case, q, keys, place, indices, o_s, lse_s, do_s)
        dk, dv = add(gradients.k, gradients.v)
        gradients = _Keys(dk, dv, gradients.pooled_k + dpooled_k, gradients.pooled_v + dpooled_v)
        return gradients, (dq_c + dq_s).astype(q.dtype)

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), keys)
    arrays = (q, _place(case, layout), outputs, tuple(residuals), cotangents)
    gradients, dq = _over_tiles(case, tile, zeros, arrays)
    dk = gradients.k + unpool(gradients.pooled_k, layout, case.U, case.block_size)
    dv = gradients.v + unpool(gradients.pooled_v, layout, case.U, case.block_size)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype)


def _place(case: Case, layout: Layout | None) -> _Place:
    layout = plain_layout(case.B, case.T, case.block_size) if layout is None else layout
    return _Place(layout.start, layout.position, layout.base)


def _attend(case: Case, q: Array, keys: _Keys, place: _Place) -> tuple[tuple[Array, Array], Array, Array, Array]:
    def tile(carry: tuple[()], x: Any) -> tuple[tuple[()], Any]:
        q, place = x
        o_c, lse_c, importance = _compressed(case, q, keys, place)
        indices = _top_blocks(case, importance, place)
        o_s, lse_s = _selected(case, q, keys, place, indices)
        return carry, ((o_c.astype(keys.v.dtype), o_s.astype(keys.v.dtype)), indices, lse_c, lse_s)

    return _over_tiles(case, tile, (), (q, place))[1]


def _over_tiles(case: Case, tile: Any, carry: Any, arrays: Any) -> tuple[Any, Any]:
    """Runs ``tile(carry, arrays of some tokens)`` over all tokens (axis 1); padding fills up a last short tile."""
    C, M = table_size(case.U, case.block_size), _slots(case)
    per_token = case.H * C + (
        (case.H + case.K * M) * case.U
        if _dense(case)
        else M * case.block_size * (2 * case.H + case.K * (case.N + case.V))
    )
    size = max(1, _TILE_ELEMENTS // (case.B * per_token))
    if size >= case.T:
        return tile(carry, arrays)
    size = 1 << (size.bit_length() - 1)
    tiles = ceil_div(case.T, size)

    def split(x: Array, fill: int = 0) -> Array:
        x = jnp.pad(x, ((0, 0), (0, tiles * size - case.T)) + ((0, 0),) * (x.ndim - 2), constant_values=fill)
        return jnp.moveaxis(x.reshape(case.B, tiles, size, *x.shape[2:]), 1, 0)

    def join(x: Array) -> Array:
        return jnp.moveaxis(x, 0, 1).reshape(case.B, tiles * size, *x.shape[3:])[:, : case.T]

    split_arrays = jax.tree.map(
        lambda x: _Place(split(x.start), split(x.position, -1), split(x.base)) if isinstance(x, _Place) else split(x),
        arrays,
        is_leaf=lambda x: isinstance(x, _Place),
    )
    carry, out = jax.lax.scan(tile, carry, split_arrays)
    return carry, jax.tree.map(join, out)


def _slots(case: Case) -> int:
    """Blocks kept per token: block_counts, or as many as there can be (the complete ones and one under way)."""
    return min(case.block_counts, table_size(case.U, case.block_size) + 1)


def _dense(case: Case) -> bool:
    """Whether to read all keys under a mask: where gathering the selected blocks would read as much."""
    reach = 2 * _slots(case) * case.block_size
    return reach >= case.U


def _grouped(x: Float[Array, "B T H N"], K: int) -> Float32[Array, "B T K G N"]:
    return x.astype(jnp.float32).reshape(*x.shape[:2], K, -1, *x.shape[3:])


def _merged(x: Float[Array, "B T K G N"]) -> Float[Array, "B T H N"]:
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def _softmax(logits: Float32[Array, "B T K G U"], seen: Bool[Array, "..."]) -> tuple[Array, Array]:
    """Probabilities and logsumexp over the last axis; both 0 where nothing is seen."""
    logits = jnp.where(seen, logits, -jnp.inf)
    top = jnp.max(logits, axis=-1, keepdims=True)
    top = jnp.where(jnp.isneginf(top), 0.0, top)
    weights = jnp.exp(logits - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    total = jnp.where(total == 0, 1.0, total)
    return weights / total, (top + jnp.log(total))[..., 0]


def _visible(case: Case, place: _Place, C: int) -> Bool[Array, "B T C"]:
    """Complete blocks of the own document that end at or before the token: numbers c < (position + 1) // S."""
    number = jnp.arange(C, dtype=jnp.int32) - place.base[..., None]
    return (number >= 0) & (number < (place.position[..., None] + 1) // case.block_size)


def _compressed(case: Case, q: Array, keys: _Keys, place: _Place) -> tuple[Array, Array, Float32[Array, "B T K C"]]:
    """Attention over block means: the output, its logsumexp, and each block's weight summed over the query group."""
    pooled_k, pooled_v = keys.pooled_k.astype(jnp.float32), keys.pooled_v.astype(jnp.float32)
    logits = jnp.einsum("btkgn,bckn->btkgc", _grouped(q, case.K), pooled_k) * case.scale
    seen = _visible(case, place, pooled_k.shape[1])[:, :, None, None]
    weights, lse = _softmax(logits, seen)
    o = jnp.einsum("btkgc,bckv->btkgv", weights, pooled_v)
    return _merged(o), _merged(lse[..., None])[..., 0], jnp.sum(weights, axis=3)


def _top_blocks(case: Case, importance: Float32[Array, "B T K C"], place: _Place) -> Int32[Array, "B T K M"]:
    """The numbers, within the document, of the best blocks: c <= c0, larger importance first, then smaller number.

    Blocks 0, c0 - 1 and c0 count as G, the most that a group's weights can sum to.
    """
    C = importance.shape[-1]
    group = float(case.H // case.K)
    current = (place.position // case.block_size)[..., None]
    number = jnp.arange(C, dtype=jnp.int32) - place.base[..., None]
    forced = (number == 0) | (number == current - 1)
    value = jnp.where(forced[:, :, None], group, jnp.minimum(importance, group))
    value = jnp.where(((number >= 0) & (number < current))[:, :, None], value, -jnp.inf)
    # Block c0 may be incomplete and so in no table: it gets a column of its own behind all others, as its number is.
    real = jnp.where(place.position >= 0, group, -jnp.inf)[:, :, None, None]
    value = jnp.concatenate([value, jnp.broadcast_to(real, (*value.shape[:3], 1))], axis=-1)
    best, column = jax.lax.top_k(value, _slots(case))
    column = jnp.where(column == C, current[:, :, None], column - place.base[:, :, None, None])
    return jnp.where(jnp.isneginf(best), -1, column)


class _Read(NamedTuple):
    """The keys and values that a tile's selected branch reads, as [B,(T,)K,J,N], and which of them each token sees."""

    k: Array
    v: Array
    seen: Bool[Array, "B T K J"]
    first: Int32[Array, "B T K M"] | None


def _read(case: Case, keys: _Keys, place: _Place, indices: Int32[Array, "B T K M"]) -> _Read:
    S = case.block_size
    start, position = place.start[:, :, None, None], place.position[:, :, None, None]
    if _dense(case):
        token = jnp.arange(case.U, dtype=jnp.int32)
        number = (token - start) // S
        member = jnp.any(indices[..., None] == number[:, :, :, None], axis=3)
        seen = member & (token >= start) & (token <= start + position)
        return _Read(keys.k.astype(jnp.float32), keys.v.astype(jnp.float32), seen, None)
    block = start + jnp.maximum(indices, 0) * S
    # Near the end of the keys a block is read from U - S on, and what lies before the block is masked.
    first = jnp.minimum(block, case.U - S)
    token = first[..., None] + jnp.arange(S, dtype=jnp.int32)
    seen = (indices >= 0)[..., None] & (token >= block[..., None]) & (token <= (start + position)[..., None])
    flat = (*indices.shape[:3], -1)
    k, v = (_gather(x, first, S).astype(jnp.float32).reshape(*flat, x.shape[-1]) for x in (keys.k, keys.v))
    return _Read(k, v, seen.reshape(flat), first)


def _gather(x: Float[Array, "B U K N"], first: Int32[Array, "B T K M"], S: int) -> Float[Array, "B T K M S N"]:
    def one_head(x: Float[Array, "U N"], first: Int32[Array, "T M"]) -> Array:
        read = jax.vmap(jax.vmap(lambda i: jax.lax.dynamic_slice_in_dim(x, i, S, axis=0)))
        return read(first)

    return jax.vmap(jax.vmap(one_head, in_axes=1, out_axes=1))(x, first)


def _selected_equations(case: Case) -> tuple[str, str]:
    """The einsum terms of keys and values: shared by the tokens of a tile, or gathered for each."""
    return ("bjkn", "bjkv") if _dense(case) else ("btkjn", "btkjv")


def _selected(case: Case, q: Array, keys: _Keys, place: _Place, indices: Array) -> tuple[Array, Array]:
    """Attention over the tokens of the selected blocks, up to the query's own: the output and its logsumexp."""
    read, (kt, vt) = _read(case, keys, place, indices), _selected_equations(case)
    logits = jnp.einsum(f"btkgn,{kt}->btkgj", _grouped(q, case.K), read.k) * case.scale
    weights, lse = _softmax(logits, read.seen[:, :, :, None])
    o = jnp.einsum(f"btkgj,{vt}->btkgv", weights, read.v)
    return _merged(o), _merged(lse[..., None])[..., 0]


def _probabilities(logits: Array, seen: Array, lse: Float32[Array, "B T H"], K: int) -> Array:
    lse = lse.reshape(*lse.shape[:2], K, -1, 1)
    return jnp.exp(jnp.where(seen, logits - lse, -jnp.inf))


def _delta(o: Array, do: Array) -> Float32[Array, "B T K G 1"]:
    return jnp.sum(o * do, axis=-1, keepdims=True)


def _compressed_backward(
    case: Case, q: Array, keys: _Keys, place: _Place, o: Array, lse: Array, do: Array
) -> tuple[Array, Array, Array]:
    q, o, do = (_grouped(x, case.K) for x in (q, o, do))
    pooled_k, pooled_v = keys.pooled_k.astype(jnp.float32), keys.pooled_v.astype(jnp.float32)
    logits = jnp.einsum("btkgn,bckn->btkgc", q, pooled_k) * case.scale
    seen = _visible(case, place, pooled_k.shape[1])[:, :, None, None]
    weights = _probabilities(logits, seen, lse, case.K)
    dlogits = weights * (jnp.einsum("btkgv,bckv->btkgc", do, pooled_v) - _delta(o, do)) * case.scale
    dq = jnp.einsum("btkgc,bckn->btkgn", dlogits, pooled_k)
    dpooled_k = jnp.einsum("btkgc,btkgn->bckn", dlogits, q)
    dpooled_v = jnp.einsum("btkgc,btkgv->bckv", weights, do)
    return _merged(dq), dpooled_k, dpooled_v


def _selected_backward(
    case: Case, q: Array, keys: _Keys, place: _Place, indices: Array, o: Array, lse: Array, do: Array
) -> tuple[Array, Any]:
    """dq, and a function that adds this tile's part to (dk, dv)."""
    q, o, do = (_grouped(x, case.K) for x in (q, o, do))
    read, (kt, vt) = _read(case, keys, place, indices), _selected_equations(case)
    logits = jnp.einsum(f"btkgn,{kt}->btkgj", q, read.k) * case.scale
    weights = _probabilities(logits, read.seen[:, :, :, None], lse, case.K)
    dlogits = weights * (jnp.einsum(f"btkgv,{vt}->btkgj", do, read.v) - _delta(o, do)) * case.scale
    dq = jnp.einsum(f"btkgj,{kt}->btkgn", dlogits, read.k)
    dk = jnp.einsum(f"btkgj,btkgn->{kt}", dlogits, q)
    dv = jnp.einsum(f"btkgj,btkgv->{vt}", weights, do)

    def add(total_k: Array, total_v: Array) -> tuple[Array, Array]:
        if read.first is None:
            return total_k + dk, total_v + dv
        return _scatter(total_k, read.first, dk, case.block_size), _scatter(total_v, read.first, dv, case.block_size)

    return _merged(dq), add


def _scatter(total: Float32[Array, "B U K N"], first: Array, part: Float32[Array, "B T K J N"], S: int) -> Array:
    """total plus the transpose of :func:`_gather` applied to ``part``."""
    blocks = part.reshape(*first.shape, S, part.shape[-1])
    (spread,) = jax.linear_transpose(lambda x: _gather(x, first, S), total)(blocks)
    return total + spread
