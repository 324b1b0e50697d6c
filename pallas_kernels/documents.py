"""Where do the documents of packed rows begin and end?"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32


def document_bounds(segment_ids: Int32[Array, "B T"]) -> tuple[Int32[Array, "B T"], Int32[Array, "B T"]]:
    """For every token the index of its document's first token, and the index after its last.

    A document is a run of one id; so is a stretch of padding, whose id is 0.
    """
    B, T = segment_ids.shape
    index = jnp.arange(T, dtype=jnp.int32)
    change = segment_ids[:, 1:] != segment_ids[:, :-1]
    edge = jnp.ones((B, 1), bool)
    begin = jax.lax.cummax(jnp.where(jnp.concatenate([edge, change], axis=1), index, 0), axis=1)
    last = jnp.where(jnp.concatenate([change, edge], axis=1), index + 1, T)
    return begin, jax.lax.cummin(last, axis=1, reverse=True)
