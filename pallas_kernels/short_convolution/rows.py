"""Where the documents of a row begin and end, and the inputs that the row leaves behind: shared by the backends."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Bounds(NamedTuple):
    """Of each row, [B] int32: the first document token (T if there is none) and its id, the last one (T - 1 if there
    is none, as the state of a row of padding lies right after it) and its id (then the same as the first one's, -1)."""

    first: jax.Array
    first_id: jax.Array
    last: jax.Array
    last_id: jax.Array


def bounds(segment_ids: jax.Array) -> Bounds:
    """The bounds of rows with ids [B,T]."""
    tokens = segment_ids.shape[1]
    live = segment_ids != 0
    index = jnp.arange(tokens, dtype=jnp.int32)
    first = jnp.min(jnp.where(live, index, tokens), axis=1)
    last = jnp.max(jnp.where(live, index, -1), axis=1)
    none = last < 0

    def pick(at: jax.Array) -> jax.Array:
        return jnp.where(none, -1, jnp.sum(jnp.where(index == at[:, None], segment_ids, 0), axis=1))

    return Bounds(first, pick(first), jnp.where(none, tokens - 1, last), pick(last))


def final_state(
    x: jax.Array, segment_ids: jax.Array | None, initial_state: jax.Array | None, history: int
) -> jax.Array:
    """The last ``history`` inputs of each row's last document [B,history,D]; before the first token, the initial ones.

    Only these rows are read, and none of it runs where nobody wants the state.
    """
    batch, tokens, width = x.shape
    if initial_state is None:
        initial_state = jnp.zeros((batch, history, width), x.dtype)
    if segment_ids is None:
        return jnp.concatenate([initial_state, x[:, max(tokens - history, 0) :]], axis=1)[:, -history:]
    row = bounds(segment_ids)
    at = row.last[:, None] + jnp.arange(1 - history, 1, dtype=jnp.int32)
    before = at < row.first[:, None]
    of_x = jnp.take_along_axis(x, jnp.maximum(at, 0)[..., None], axis=1)
    slot = jnp.clip(history + at - row.first[:, None], 0, history - 1)
    of_state = jnp.take_along_axis(initial_state, slot[..., None], axis=1)
    ids = jnp.take_along_axis(segment_ids, jnp.maximum(at, 0), axis=1)
    same = jnp.where(before, row.first_id[:, None], ids) == row.last_id[:, None]
    there = same & (~before | (history + at >= row.first[:, None]))
    return jnp.where(there[..., None], jnp.where(before[..., None], of_state, of_x), jnp.zeros((), x.dtype))
