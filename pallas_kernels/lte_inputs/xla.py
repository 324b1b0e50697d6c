"""LTE's inputs of a decode step in plain jax.numpy: the reference, and what runs without a GPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.lte_inputs.api import Case, Operands, Results


def check(case: Case) -> None:
    """Any case."""


def step(operands: Operands, active: jax.Array | None, *, method: str) -> Results:
    q, k, v, position, cos, sin, recent = operands[:7]
    new = jnp.concatenate([k, v], axis=-1)[:, None].astype(recent.dtype)
    joined = jnp.concatenate([recent, new], axis=1)
    x = joined.astype(k.dtype)
    real = position[:, None] - recent.shape[1] + jnp.arange(x.shape[1], dtype=jnp.int32) >= 0
    x = jnp.where(real[..., None, None], x, jnp.zeros((), x.dtype))
    for weight, bias, dilation in operands.convolutions:
        taps = weight.shape[1]
        count = x.shape[1] - (taps - 1) * dilation
        heads = (x.shape[2], *weight.shape[1:])
        weight = jnp.broadcast_to(weight, heads).astype(k.dtype).astype(jnp.float32)
        y = bias.astype(jnp.float32)
        for tap in range(taps):
            part = x[:, tap * dilation : tap * dilation + count].astype(jnp.float32)
            y = y + jnp.einsum("bjki,kio->bjko", part, weight[:, tap])
        real = real[:, (taps - 1) * dilation // 2 :][:, :count]
        x = jax.nn.silu(jnp.where(real[..., None, None], y, 0.0)).astype(k.dtype)
    z = jnp.sum(x[:, 0].astype(jnp.float32) * operands.weight.astype(jnp.float32), axis=-1)
    z = z + operands.bias.astype(jnp.float32)
    score = jax.nn.sigmoid(z) - 0.5 if method == "sigmoid" else jax.nn.relu(z)
    score = jnp.where(real, score, 0.0)
    after = joined[:, 1:]
    if active is not None:
        after = jnp.where(active[:, None, None, None], after, recent)
    return Results(_rotate(q, cos, sin), _rotate(k, cos, sin), score, after)


def _rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)
