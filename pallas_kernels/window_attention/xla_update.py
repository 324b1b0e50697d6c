"""How does one token change ring and store? The rule of a decode step in plain JAX."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from pallas_kernels.window_attention.api import DecodeCache, StepCase, UpdateCase


def slot_to_replace(
    position: Int32[Array, "B M K"], stored: Float32[Array, "B M K"], score: Float32[Array, "B K"]
) -> Int32[Array, "B K"]:
    """The slot that a token of this score takes: a free one, or the last in order if strictly better; M for none."""
    lowest = jnp.min(stored, axis=1)
    # Among equal scores the latest position goes first; among empty slots (all -1) the first slot is taken.
    last = jnp.argmax(jnp.where(stored == lowest[:, None], position, -2), axis=1).astype(jnp.int32)
    return jnp.where(score > lowest, last, stored.shape[1])


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
    batch, size, heads = cache.ring_score.shape
    rows, columns = jnp.ogrid[:batch, :heads]
    own = rows[:, 0]
    real = jnp.ones(batch, bool) if active is None else active
    slot = jnp.mod(length, size)
    leaving = (length - size)[:, None]
    outgoing = cache.ring_score[own, slot]
    outgoing = jnp.where(leaving < sinks, jnp.inf, jnp.where(outgoing > 0, outgoing, -jnp.inf))
    outgoing = jnp.where(real[:, None] & (leaving >= 0), outgoing, -jnp.inf)
    at = (rows, slot_to_replace(cache.store_position, cache.store_score, outgoing), columns)
    here = jnp.where(real, slot, size)  # size: no slot, the write is dropped
    scored = jnp.where(real & (length >= reach), jnp.mod(length - reach, size), size)
    ring_score = cache.ring_score
    if reach:
        ring_score = ring_score.at[own, here].set(0.0, mode="drop")
    return DecodeCache(
        ring_k=cache.ring_k.at[own, here].set(k, mode="drop"),
        ring_v=cache.ring_v.at[own, here].set(v, mode="drop"),
        ring_score=ring_score.at[own, scored].set(score, mode="drop"),
        store_k=cache.store_k.at[at].set(cache.ring_k[own, slot], mode="drop"),
        store_v=cache.store_v.at[at].set(cache.ring_v[own, slot], mode="drop"),
        store_position=cache.store_position.at[at].set(jnp.broadcast_to(leaving, (batch, heads)), mode="drop"),
        store_score=cache.store_score.at[at].set(outgoing, mode="drop"),
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
