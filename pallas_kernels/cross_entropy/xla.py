"""Cross-entropy with its gradient in plain JAX: the definition, and what runs where there is no kernel."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.cross_entropy.api import Case


def check(case: Case) -> None:
    """Every case."""


def forward(logits: jax.Array, labels: jax.Array, *, dtype: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    loss, correct, lse = statistics(logits, labels)
    # A label of -1 matches no column, and its row is masked.
    onehot = labels[:, None] == jnp.arange(logits.shape[1])
    gradient = jnp.exp(logits - lse[:, None]) - onehot.astype(jnp.float32)
    return loss, correct, jnp.where(labels[:, None] >= 0, gradient, 0.0).astype(dtype)


def statistics(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(loss, correct, logsumexp) of each row; any number of axes before the vocabulary's."""
    asked = labels >= 0
    lse = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    correct = (jnp.argmax(logits, axis=-1) == labels) & asked
    return jnp.where(asked, lse - chosen, 0.0), correct.astype(jnp.float32), lse
