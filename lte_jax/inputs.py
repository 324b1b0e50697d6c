"""What a model accepts: token ids in range, masks without holes, no more tokens than its cache holds."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lte_jax.dims import Hidden, SegmentIds


def check_tokens(input_ids: Any, vocab_size: int) -> None:
    """Raises ValueError unless ``input_ids`` is [B, T] of ids in [0, vocab_size)."""
    array = np.asarray(input_ids)
    if array.ndim != 2 or array.size == 0:
        raise ValueError(f"input_ids has shape {array.shape}; it must be [batch, tokens] and not empty")
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"input_ids has dtype {array.dtype}; token ids are integers")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise ValueError(
            f"token id {wrong} is outside the vocabulary [0, {vocab_size}); is this the model's tokenizer?"
        )


def mask_to_segment_ids(attention_mask: Any) -> jax.Array:
    """A Hugging Face mask [B, T] as segment ids: 1 for tokens, 0 for padding at the left or the right.

    Raises:
      ValueError: a row has a hole, padding between tokens (checked where the mask is concrete).
    """
    if not isinstance(attention_mask, jax.core.Tracer):
        mask = np.asarray(attention_mask)
        if mask.ndim != 2:
            raise ValueError(f"attention_mask has shape {mask.shape}; it must be [batch, tokens]")
        if not np.isin(mask, (0, 1)).all():
            raise ValueError("attention_mask holds values other than 0 and 1; give packed documents as segment_ids")
        edges = np.diff(np.pad(mask.astype(np.int8), ((0, 0), (1, 1))), axis=1)
        holes = np.flatnonzero((edges == 1).sum(axis=1) > 1)
        if holes.size:
            raise ValueError(
                f"attention_mask has a hole in row {holes[0]}: only padding at the left or the right is meant; "
                "give packed documents as segment_ids"
            )
    return jnp.asarray(attention_mask).astype(jnp.int32)


def zero_padding(x: Hidden, segment_ids: SegmentIds | None) -> Hidden:
    """x with padded positions set to 0."""
    return x if segment_ids is None else jnp.where((segment_ids != 0)[..., None], x, jnp.zeros((), x.dtype))


def check_room(length: jax.Array, new: Any, slots: int) -> None:
    """Raises ValueError where a cache of ``slots`` tokens that holds ``length`` [B] would overflow by ``new`` [B] more.

    Only where both are concrete: under jit nothing can be raised, and the caller must have checked.
    """
    if isinstance(length, jax.core.Tracer) or isinstance(new, jax.core.Tracer):
        return
    longest = int(np.max(np.asarray(length) + np.asarray(new)))
    if longest > slots:
        raise ValueError(
            f"the sequence would reach {longest} tokens, and its cache holds max_length={slots}; make it with "
            "init_cache(batch_size, max_length=...)"
        )
