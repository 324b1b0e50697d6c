"""What LTE keeps of a sequence: the last W+1 tokens, a store of M slots per head, and the router's last inputs.

Position p lies in slot p mod (W+1) of the ring. A token's score is final ``reach`` steps after the token, long before
it can leave the ring; until then the ring holds 0 for it. A call with several tokens lays ring and tokens out on one
axis of keys, oldest first: index u is position ``length - (W+1) + u``.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int32

from lte_jax.dims import Keys, Values
from lte_jax.mixers import lte_store
from lte_jax.mixers.lte_store import Store
from pallas_kernels.window_attention import DecodeCache, window_attention_update_step


class LTECache(NamedTuple):
    """B sequences. ``recent`` is None for retention rules without a router (or one that reads a single token)."""

    length: Int32[Array, "B"]
    ring_k: Float[Array, "B R K N"]
    ring_v: Float[Array, "B R K N"]
    ring_score: Float32[Array, "B R K"]
    store: Store
    recent: Float[Array, "B P K C"] | None


class Past(NamedTuple):
    """The ring, oldest first, before new tokens are added: index u is position length - R + u."""

    k: Keys
    v: Values
    score: Float32[Array, "B R K"]
    position: Int32[Array, "B R"]


def empty_cache(batch: int, window: int, budget: int, heads: int, size: int, reach: int, dtype: DTypeLike) -> LTECache:
    ring = (batch, window + 1, heads)
    return LTECache(
        length=jnp.zeros(batch, jnp.int32),
        ring_k=jnp.zeros((*ring, size), dtype),
        ring_v=jnp.zeros((*ring, size), dtype),
        ring_score=jnp.zeros(ring, jnp.float32),
        store=lte_store.empty_store(batch, budget, heads, size, dtype),
        recent=jnp.zeros((batch, 2 * reach, heads, 2 * size), dtype) if reach else None,
    )


def cache_bytes(batch: int, window: int, budget: int, heads: int, size: int, reach: int, dtype: DTypeLike) -> int:
    """B (4 + K ((W+1) (2N s + 4) + M (2N s + 8) + 2 reach 2N s)) bytes, for s bytes a number."""
    pair = 2 * size * jnp.dtype(dtype).itemsize
    per_head = (window + 1) * (pair + 4) + budget * (pair + 8) + 2 * reach * pair
    return batch * (4 + heads * per_head)


def unroll(cache: LTECache) -> Past:
    """The ring's tokens in order of position; those before the start of the document have negative positions."""
    size = cache.ring_k.shape[1]
    position = cache.length[:, None] - size + jnp.arange(size, dtype=jnp.int32)
    slot = jnp.mod(position, size)
    k, v, score = (_take(x, slot) for x in (cache.ring_k, cache.ring_v, cache.ring_score))
    return Past(k, v, score, position)


def roll_up(
    cache: LTECache,
    k: Keys,
    v: Values,
    scores: Float32[Array, "B U K"],
    before: int,
    new: Int32[Array, "B"],
    reach: int,
) -> LTECache:
    """The cache whose ring holds the last W+1 tokens of the key axis, ``new`` tokens later; store and recent unchanged.

    Args:
      k, v, scores: [B,U,...] on the key axis.
      before: how many of its indices come before the new tokens (W+1, or 0 on an empty cache).
    """
    size = cache.ring_k.shape[1]
    last = cache.length + new - 1
    slot = jnp.arange(size, dtype=jnp.int32)
    position = last[:, None] - jnp.mod(last[:, None] - slot, size)
    index = jnp.clip(position - cache.length[:, None] + before, 0, k.shape[1] - 1)

    def held(x: Array, wanted: Bool[Array, "B R"], dtype: DTypeLike) -> Array:
        return jnp.where(_expand(wanted, x.ndim), _take(x, index), jnp.zeros((), x.dtype)).astype(dtype)

    return cache._replace(
        length=cache.length + new,
        ring_k=held(k, position >= 0, cache.ring_k.dtype),
        ring_v=held(v, position >= 0, cache.ring_v.dtype),
        ring_score=held(scores, (position >= 0) & (position <= last[:, None] - reach), jnp.float32),
    )


def join_inputs(
    recent: Float[Array, "B J K C"] | None, k: Keys, v: Values, dtype: DTypeLike
) -> tuple[Float[Array, "B joined K N"], Float[Array, "B joined K V"]]:
    """The router's remembered inputs and the new ones, rounded as the cache will hold them."""
    if recent is None:
        return k, v
    pairs = zip(jnp.split(recent, 2, axis=-1), (k, v), strict=True)
    k, v = (jnp.concatenate([old, new.astype(old.dtype)], axis=1).astype(dtype) for old, new in pairs)
    return k, v


def last_inputs(joined: tuple[Keys, Values], count: int, new: Int32[Array, "B"] | int) -> Float[Array, "B J K C"]:
    """The last ``count`` of the router's inputs, side by side; ``new`` of them follow the ``count`` of the cache."""
    if isinstance(new, int):
        last = [jax.lax.slice_in_dim(part, new, new + count, axis=1) for part in joined]
    else:
        last = [_take(part, new[:, None] + jnp.arange(count, dtype=jnp.int32)) for part in joined]
    return jnp.concatenate(last, axis=-1)


def push(
    cache: LTECache,
    q: Float[Array, "B H N"],
    k: Float[Array, "B K N"],
    v: Float[Array, "B K N"],
    score: Float32[Array, "B K"],
    *,
    reach: int,
    sinks: int,
    active: Bool[Array, "B"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B H N"], LTECache]:
    """One token enters the ring, the one that it displaces goes to the store, and the token's query reads both.

    A pure function of fixed shapes, in place where the cache is donated; ``recent`` is left to the caller.

    Args:
      q, k, v: of the new token, q and k rotated.
      score: of the token ``reach`` positions before it, whose score is now final.
      active: rows that have a token; the others stay as they are.
    """
    held = DecodeCache(cache.ring_k, cache.ring_v, cache.ring_score, *cache.store)
    o, held = window_attention_update_step(
        q, k, v, score, held, cache.length, sinks=sinks, reach=reach, active=active, implementation=implementation
    )
    return o, cache._replace(
        length=cache.length + (1 if active is None else active.astype(jnp.int32)),
        ring_k=held.ring_k,
        ring_v=held.ring_v,
        ring_score=held.ring_score,
        store=Store(*held[3:]),
    )


def roll(x: Float[Array, "B T ..."], shift: Int32[Array, "B"]) -> Array:
    """y[b, t] = x[b, (t + shift[b]) mod T]."""
    return _take(x, jnp.mod(jnp.arange(x.shape[1], dtype=jnp.int32) + shift[:, None], x.shape[1]))


def _expand(x: Array, ndim: int) -> Array:
    return x.reshape(x.shape + (1,) * (ndim - x.ndim))


def _take(x: Float[Array, "B U ..."], index: Int32[Array, "B R"]) -> Array:
    """x[b, index[b, r]], whatever follows the second dimension."""
    return jnp.take_along_axis(x, _expand(index, x.ndim), axis=1)
