"""Which keys are retained beyond the window, in which order, and within which bounds of the documents?

The lists that the kernels of window attention stream: positions of retained keys per KV head, in order, with the number
of them up to every position, from which the bounds of every tile follow.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int32

from pallas_kernels.documents import document_bounds
from pallas_kernels.window_attention.cases import FAR


class DocumentBounds(NamedTuple):
    """Per position: the first index of its document and the index after its last (FAR and 0 for padding)."""

    begin: Int32[Array, "B U"]
    end: Int32[Array, "B U"]


class Retained(NamedTuple):
    """The keys that some query sees beyond the window, per KV head, by position; beyond their number undefined."""

    counts: Int32[Array, "B K U"]  # retained keys among 0..j
    position: Int32[Array, "B K U"]
    expiry: Int32[Array, "B K U"]
    never: Int32[Array, "B K"]  # 1 if none of them expires before U


def query_bounds(segment_ids: Int32[Array, "B U"]) -> DocumentBounds:
    """``document_bounds``, but FAR and 0 for padding, so that it neither sees nor is seen."""
    begin, end = document_bounds(segment_ids)
    real = segment_ids != 0
    return DocumentBounds(jnp.where(real, begin, FAR), jnp.where(real, end, 0))


def retained(expiry: Int32[Array, "B U K"], window: int, begin: Int32[Array, "B U"] | None) -> Retained:
    """The list of keys j with a query i - j >= window, i < expiry[j], in j's document."""
    B, U, K = expiry.shape
    place = jnp.arange(U, dtype=jnp.int32)
    kept = (place < U - window)[:, None] & (expiry > (place + window)[:, None])
    if begin is not None:
        # The first query beyond the window must still belong to the key's document.
        later = jnp.pad(begin[:, window:], ((0, 0), (0, min(window, U))), constant_values=FAR)
        kept &= (later <= place)[:, :, None]
    kept, expiry = kept.transpose(0, 2, 1), expiry.transpose(0, 2, 1)
    counts = jnp.cumsum(kept, axis=2, dtype=jnp.int32)
    slot = jnp.where(kept, counts - 1, U).reshape(B * K, U)
    rows = jnp.arange(B * K, dtype=jnp.int32)[:, None]
    packed = jnp.stack([jnp.broadcast_to(place, kept.shape), expiry], -1).reshape(B * K, U, 2)
    packed = jnp.zeros_like(packed).at[rows, slot].set(packed, mode="drop", unique_indices=True)
    packed = packed.reshape(B, K, U, 2)
    never = jnp.all(~kept | (expiry >= U), axis=2)
    return Retained(counts, packed[..., 0], packed[..., 1], never.astype(jnp.int32))


def survey(columns: Any, window: int, U: int, begin: Int32[Array, "B U"] | None) -> Int32[Array, "B K 3"]:
    """Per KV head of a cache: slots in use (a prefix), the index from which every query sees all of them, its document.

    The index is FAR if one of the slots is empty or expires before U; the document is the row's first, by its begin.
    """
    C = columns.expiry.shape[1]
    live = columns.expiry > 0
    used = jnp.max(jnp.where(live, jnp.arange(1, C + 1, dtype=jnp.int32)[None, :, None], 0), axis=1)
    whole = (jnp.sum(live, axis=1, dtype=jnp.int32) == used) & jnp.all(~live | (columns.expiry >= U), axis=1)
    latest = jnp.max(jnp.where(live, columns.position, -FAR), axis=1) + window
    document = jnp.zeros_like(used) if begin is None else jnp.broadcast_to(jnp.min(begin, 1)[:, None], used.shape)
    return jnp.stack([used, jnp.where(whole, latest, FAR), document], axis=-1)
