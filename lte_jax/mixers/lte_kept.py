"""Which tokens does a call of LTE keep beyond the window, and until when does each of them stay?"""

from __future__ import annotations

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float32, Int32

from lte_jax.dims import Keys, Positions, SegmentIds, Selected, Values
from lte_jax.mixers import lte_store
from lte_jax.mixers.base import Reading
from lte_jax.mixers.lte_cache import LTECache
from lte_jax.mixers.lte_config import Config
from lte_jax.mixers.lte_store import Store
from pallas_kernels.documents import document_bounds
from pallas_kernels.window_attention.api import NEVER, Columns


def of_documents(
    config: Config,
    ranks: Float32[Array, "B T K"],
    positions: Positions,
    segment_ids: SegmentIds | None,
    reading: Reading,
) -> tuple[Int32[Array, "B T K"], Selected]:
    """Expiry and selection of every token of whole documents."""
    tokens, ring = ranks.shape[1], config.window + 1
    candidate = ranks > -jnp.inf
    if reading == "train" and config.retention == "learned":
        return jnp.where(candidate, NEVER, 0), candidate
    bounds = None if segment_ids is None else document_bounds(segment_ids)
    end = tokens if bounds is None else bounds[1]
    left = jnp.arange(tokens, dtype=jnp.int32) < jnp.broadcast_to(jnp.asarray(end) - ring, positions.shape)
    left = left[..., None]
    if reading == "prompt":
        best = lte_store.best_of_document(jnp.where(left, ranks, -jnp.inf), config.budget, bounds)
        return jnp.where(best, NEVER, 0), jnp.where(left, best, candidate)
    position = jnp.broadcast_to(positions[..., None], ranks.shape)
    successor = lte_store.successors(ranks, position, config.budget, bounds)
    last = jnp.broadcast_to(jnp.asarray(end) - ring, positions.shape)[..., None]
    return lte_store.expiries(successor, 0, ring), candidate & (successor >= last)


def of_piece(
    config: Config,
    ranks: Float32[Array, "B U K"],
    position: Int32[Array, "B U"],
    k: Keys,
    v: Values,
    cache: LTECache,
    before: int,
    new: Int32[Array, "B"],
    dtype: DTypeLike,
) -> tuple[Int32[Array, "B U K"], Columns | None, Store, Selected]:
    """What becomes of keys and slots during a call of ``extend``: expiries, columns, the store after it, selection.

    Args:
      ranks, position, k, v: on the axis of keys, whose first ``before`` are the ring's.
      cache: before the call.
      new: tokens of each row.
      dtype: of the columns, which are the slots that the call began with; None on an empty cache (``before`` 0).
    """
    budget, ring = config.budget, config.window + 1
    left = before + new - ring  # keys of a smaller index have left the window by the end of the call
    if not before:
        gone = jnp.arange(ranks.shape[1], dtype=jnp.int32) < left[:, None]
        best = lte_store.best_of_document(jnp.where(gone[..., None], ranks, -jnp.inf), budget)
        slots = lte_store.slots_of_best(best, budget)
        slots = jnp.where(slots < 0, slots, slots + budget)
        store = lte_store.refill(cache.store, slots, k, v, position, ranks)
        return jnp.where(best, NEVER, 0), None, store, jnp.where(gone[..., None], best, ranks > -jnp.inf)
    held = cache.store
    all_ranks = jnp.concatenate([held.score, ranks], axis=1)
    all_positions = jnp.concatenate([held.position, jnp.broadcast_to(position[..., None], ranks.shape)], axis=1)
    successor = lte_store.successors(all_ranks, all_positions, budget)
    slots = lte_store.slots_after(all_ranks, successor, budget, budget + left)
    store = lte_store.refill(held, slots, k, v, position, ranks)
    expiry = lte_store.expiries(successor, budget, ring)
    start = cache.length - before  # the position of index 0
    columns = Columns(
        held.k.astype(dtype),
        held.v.astype(dtype),
        held.position - start[:, None, None],
        expiry[:, :budget],
    )
    selected = (all_ranks > -jnp.inf) & (successor >= (budget + left)[:, None, None])
    return expiry[:, budget:], columns, store, selected[:, budget:]
