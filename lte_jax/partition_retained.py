"""Which keys of other devices does a shard of a row need where a budget bounds what is retained?

Beyond its window, a query at index i sees the tokens j with i < expiry[j]. Where LTE reads under its budget M, no more
than M tokens of a document and head are such at any i: those that a store would hold. So a device sends each later one
the tokens that are still retained at that one's first index, and no other key travels but the window's halo.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.window_attention import NEVER, Columns


def columns(arrays: dict[str, Any], document: Array, *, axis: str, past: int, budget: int) -> Columns:
    """The retained keys before a device's halo; to be called inside shard_map.

    Args:
      arrays: the device's own k, v [B,t,K,_], expiry [B,t,K] counted from the row's start, segments [B,t], and scores
        [B,t,K] or nothing.
      document: the first one of the halo and the device's own tokens, [B]; no query there sees another's columns.
      axis: the mesh axis of tokens. past: so many devices before this one are its halo.
      budget: M.

    Returns:
      At most M columns, whose positions and expiries count from the halo's first token.
    """
    shards, me = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    tokens = arrays["k"].shape[1]
    documents = jax.lax.all_gather(document, axis)
    values, scores = arrays["v"], arrays.get("scores")
    if scores is not None:  # the gradient of a score is that of its value's length
        values = values * (1.0 + scores - jax.lax.stop_gradient(scores)).astype(values.dtype)[..., None]
    index = jnp.broadcast_to(me * tokens + jnp.arange(tokens, dtype=jnp.int32)[:, None], arrays["expiry"].shape)

    def for_device(other: int) -> Columns:
        wanted = (arrays["segments"] == documents[other][:, None])[..., None] & (me + past < other)
        expiry = jnp.where(wanted & (arrays["expiry"] > other * tokens), arrays["expiry"], 0)
        return _first(Columns(arrays["k"], values, index, expiry), min(budget, tokens))

    sent = jax.tree.map(lambda *parts: jnp.stack(parts), *(for_device(other) for other in range(shards)))
    received = jax.tree.map(lambda x: jax.lax.all_to_all(x, axis, 0, 0), sent)
    joined = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:]), received)
    found = _first(joined, min(budget, joined.expiry.shape[1]))
    start = (me - past) * tokens
    moves = (found.expiry > 0) & (found.expiry < NEVER)
    return found._replace(
        position=jnp.where(found.expiry > 0, found.position - start, -1),
        expiry=jnp.where(moves, found.expiry - start, found.expiry),
    )


def _first(found: Columns, count: int) -> Columns:
    """The first ``count`` columns of each head that are not empty, and empty ones if there are fewer."""
    order = jnp.argsort(found.expiry == 0, axis=1, stable=True)[:, :count]

    def take(x: Array) -> Array:
        index = order.reshape(*order.shape, *(1,) * (x.ndim - 3))
        return jnp.take_along_axis(x, index, axis=1)

    return Columns(*map(take, found))
