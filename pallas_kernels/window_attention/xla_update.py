"""How does one token change ring and store? The rule of a decode step in plain JAX."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from pallas_kernels.window_attention.api import DecodeCache, StepCase, UpdateCase


def enter_store(
    store: tuple[Array, Array, Array, Array],
    k: Float[Array, "B K N"],
    v: Float[Array, "B K V"],
    position: Int32[Array, "B"],
    score: Float32[Array, "B K"],
) -> tuple[Array, Array, Array, Array]:
    """A token leaves the window: it takes a free slot, replaces the last in order if strictly better, or is dropped.

    ``store``: (k, v, position, score) as a ``DecodeCache`` has them. ``score`` is +inf for a sink, -inf for what is no
    candidate. Writes at most one slot per head, in place where the caller donates the store.
    """
    stored_k, stored_v, positions, scores = store
    lowest = jnp.min(scores, axis=1)
    # Among equal scores the latest position goes first; among empty slots (all -1) the first slot is taken.
    last = jnp.argmax(jnp.where(scores == lowest[:, None], positions, -2), axis=1).astype(jnp.int32)
    slot = jnp.where(score > lowest, last, scores.shape[1])  # beyond the last: no slot, the write is dropped
    rows, columns = jnp.ogrid[: k.shape[0], : k.shape[1]]
    at = (rows, slot, columns)
    return (
        stored_k.at[at].set(k, mode="drop"),
        stored_v.at[at].set(v, mode="drop"),
        positions.at[at].set(jnp.broadcast_to(position[:, None], score.shape), mode="drop"),
        scores.at[at].set(score, mode="drop"),
    )


def take_in(
    cache: DecodeCache,
    k: Float[Array, "B K N"],
    v: Float[Array, "B K V"],
    score: Float32[Array, "B K"],
    length: Int32[Array, "B"],
    active: Bool[Array, "B"] | None,
    sinks: int,
    reach: int,
) -> DecodeCache:
    """The cache (of one layer) after one token per row, as ``api.window_attention_update_step`` defines it."""
    batch, size = cache.ring_score.shape[:2]
    rows = jnp.arange(batch)
    real = jnp.ones(batch, bool) if active is None else active
    slot = jnp.mod(length, size)
    leaving = length - size
    outgoing = cache.ring_score[rows, slot]
    outgoing = jnp.where((leaving < sinks)[:, None], jnp.inf, jnp.where(outgoing > 0, outgoing, -jnp.inf))
    outgoing = jnp.where((real & (leaving >= 0))[:, None], outgoing, -jnp.inf)
    store = enter_store(cache[3:], cache.ring_k[rows, slot], cache.ring_v[rows, slot], leaving, outgoing)
    here = jnp.where(real, slot, size)  # size: no slot, the write is dropped
    scored = jnp.where(real & (length >= reach), jnp.mod(length - reach, size), size)
    ring_score = cache.ring_score
    if reach:
        ring_score = ring_score.at[rows, here].set(0.0, mode="drop")
    return DecodeCache(
        cache.ring_k.at[rows, here].set(k, mode="drop"),
        cache.ring_v.at[rows, here].set(v, mode="drop"),
        ring_score.at[rows, scored].set(score, mode="drop"),
        *store,
    )


def update_step(
    step: Callable[..., Array],
    case: UpdateCase,
    q: Array,
    k: Array,
    v: Array,
    score: Array,
    cache: DecodeCache,
    length: Array,
    active: Array | None,
    layer: Array,
) -> tuple[Array, DecodeCache]:
    """(o, cache): the rule, then ``step`` over ring and store."""
    own = DecodeCache(*(jax.lax.dynamic_index_in_dim(x, layer, 0, keepdims=False) for x in cache))
    own = take_in(own, k, v, score, length, active, case.sinks, case.reach)
    counted = length + 1 if active is None else length + active.astype(jnp.int32)
    held = jnp.broadcast_to(jnp.minimum(counted, case.slots[0])[:, None], (case.B, case.K))
    stored = jnp.sum(own.store_position >= 0, axis=1, dtype=jnp.int32)
    plain = StepCase(
        **{field.name: getattr(case, field.name) for field in dataclasses.fields(StepCase) if field.name != "lengths"},
        lengths=(True, True),
    )
    keys, values = (
        tuple(x.astype(q.dtype) for x in pair) for pair in ((own.ring_k, own.store_k), (own.ring_v, own.store_v))
    )
    o = step(plain, q, keys, values, (held, stored))
    return o, DecodeCache(
        *(jax.lax.dynamic_update_index_in_dim(x, y, layer, 0) for x, y in zip(cache, own, strict=True))
    )
