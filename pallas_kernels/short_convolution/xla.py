"""The short convolution in plain jax.numpy: a sum of shifted inputs, which XLA fuses into one pass."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def check(case) -> None:
    """Every case is supported."""


def _activate(y: jax.Array, activation: str | None) -> jax.Array:
    return jax.nn.silu(y) if activation == "silu" else y


def _insert(into: jax.Array, piece: jax.Array, at: jax.Array) -> jax.Array:
    """Each row of ``into`` [B, U, ...] with its ``piece`` [B, n, ...] from index ``at`` [B] on."""
    return jax.vmap(lambda a, b, i: jax.lax.dynamic_update_slice_in_dim(a, b, i, axis=0))(into, piece, at)


def _take(array: jax.Array, at: jax.Array, size: int) -> jax.Array:
    """``size`` elements of each row of ``array`` [B, U, ...] from index ``at`` [B] on."""
    return jax.vmap(lambda a, i: jax.lax.dynamic_slice_in_dim(a, i, size, axis=0))(array, at)


def forward(x, weight, segment_ids, initial_state, *, activation):
    """Token t stands at index t + taps - 1 of the inputs extended to the left.

    With padding, the initial state is laid over what stands directly before the row's first document token.
    """
    (batch, tokens, width), taps = x.shape, weight.shape[0]
    history = taps - 1
    if initial_state is None:
        initial_state = jnp.zeros((batch, history, width), x.dtype)
    if segment_ids is None:
        extended = jnp.concatenate([initial_state, x], axis=1)
        ids = None
        final_state = extended[:, tokens:]
    else:
        live = segment_ids != 0
        index = jnp.arange(tokens, dtype=jnp.int32)
        first = jnp.min(jnp.where(live, index, tokens), axis=1)
        # A row of padding keeps its state: it was laid right after the row's last token.
        last = jnp.max(jnp.where(live, index, -1), axis=1)
        last = jnp.where(last < 0, tokens - 1, last)
        first_id = jnp.max(jnp.where(index == first[:, None], segment_ids, -1), axis=1)
        extended = _insert(jnp.pad(x, ((0, 0), (history, 0), (0, 0))), initial_state, first)
        first_ids = jnp.broadcast_to(first_id[:, None], (batch, history))
        ids = _insert(jnp.pad(segment_ids, ((0, 0), (history, 0))), first_ids, first)
        final_state = _take(extended, last + 1, history)
        final_ids = _take(ids, last + 1, history)
        final_state = jnp.where((final_ids == final_ids[:, -1:])[..., None], final_state, jnp.zeros((), x.dtype))
    # Cast before the taps are taken, so that the backward pass sums them in float32.
    extended = extended.astype(jnp.float32)
    y = jnp.zeros(x.shape, jnp.float32)
    for tap in range(taps):
        term = weight[tap].astype(jnp.float32) * extended[:, tap : tap + tokens]
        if ids is not None:
            same = (ids[:, tap : tap + tokens] == segment_ids) & (segment_ids != 0)
            term = jnp.where(same[..., None], term, 0.0)
        y = y + term
    return _activate(y, activation).astype(x.dtype), final_state


def backward(x, weight, segment_ids, initial_state, dy, dfinal_state, *, activation):
    """Differentiates the forward pass, recomputed from its inputs, so that no shifted copy of x is kept."""

    def run(x, weight, initial_state):
        return forward(x, weight, segment_ids, initial_state, activation=activation)

    _, pullback = jax.vjp(run, x, weight, initial_state)
    return pullback((dy, dfinal_state))


def step(x, weight, state, *, activation):
    """The window of taps slides by one token."""
    window = jnp.concatenate([state, x[:, None]], axis=1)
    y = jnp.sum(window.astype(jnp.float32) * weight.astype(jnp.float32), axis=1)
    return _activate(y, activation).astype(x.dtype), window[:, 1:]
