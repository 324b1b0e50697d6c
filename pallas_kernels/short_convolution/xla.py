"""The short convolution in plain jax.numpy: a sum of shifted inputs, which XLA fuses into one pass."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.short_convolution.api import Case
from pallas_kernels.short_convolution.rows import bounds, final_state


def check(case: Case) -> None:
    """Every case is supported."""


def _activate(y: jax.Array, activation: str | None) -> jax.Array:
    return jax.nn.silu(y) if activation == "silu" else y


def _insert(into: jax.Array, piece: jax.Array, at: jax.Array) -> jax.Array:
    """Each row of ``into`` [B, U, ...] with its ``piece`` [B, n, ...] from index ``at`` [B] on."""
    return jax.vmap(lambda a, b, i: jax.lax.dynamic_update_slice_in_dim(a, b, i, axis=0))(into, piece, at)


def forward(x, weight, segment_ids, initial_state, *, activation):
    """Token t stands at index t + taps - 1 of the inputs extended to the left.

    With padding, the initial state is laid over what stands directly before the row's first document token.
    """
    (batch, tokens, width), taps = x.shape, weight.shape[0]
    history = taps - 1
    if initial_state is None:
        initial_state = jnp.zeros((batch, history, width), x.dtype)
    if segment_ids is None:
        extended, ids = jnp.concatenate([initial_state, x], axis=1), None
    else:
        row = bounds(segment_ids)
        extended = _insert(jnp.pad(x, ((0, 0), (history, 0), (0, 0))), initial_state, row.first)
        first_ids = jnp.broadcast_to(row.first_id[:, None], (batch, history))
        ids = _insert(jnp.pad(segment_ids, ((0, 0), (history, 0))), first_ids, row.first)
    # Cast before the taps are taken, so that the backward pass sums them in float32.
    extended = extended.astype(jnp.float32)
    y = jnp.zeros(x.shape, jnp.float32)
    for tap in range(taps):
        term = weight[tap].astype(jnp.float32) * extended[:, tap : tap + tokens]
        if ids is not None:
            same = (ids[:, tap : tap + tokens] == segment_ids) & (segment_ids != 0)
            term = jnp.where(same[..., None], term, 0.0)
        y = y + term
    return _activate(y, activation).astype(x.dtype), final_state(x, segment_ids, initial_state, history)


def backward(x, weight, segment_ids, initial_state, dy, dfinal_state, *, activation):
    """Differentiates the forward pass, recomputed from its inputs, so that no shifted copy of x is kept."""

    def run(x, weight, initial_state):
        y, after = forward(x, weight, segment_ids, initial_state, activation=activation)
        return (y,) if dfinal_state is None else (y, after)

    _, pullback = jax.vjp(run, x, weight, initial_state)
    return pullback((dy,) if dfinal_state is None else (dy, dfinal_state))


def step(x, weight, state, *, activation):
    """The window of taps slides by one token."""
    window = jnp.concatenate([state, x[:, None]], axis=1)
    y = jnp.sum(window.astype(jnp.float32) * weight.astype(jnp.float32), axis=1)
    return _activate(y, activation).astype(x.dtype), window[:, 1:]
