"""The gated norm in plain jax.numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.rms_norm.api import Case


def check(case: Case) -> None:
    """Every case is supported."""


def forward(x, weight, gate, *, eps, dtype):
    """y; the protocol is in ``api``."""
    x = x.astype(jnp.float32)
    y = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps) * weight.astype(jnp.float32)
    if gate is not None:
        y = y * jax.nn.silu(gate.astype(jnp.float32))
    return y.astype(dtype)


def backward(x, weight, gate, dy, past=None, *, eps):
    """dx, dweight, dgate; the protocol is in ``api``."""
    _, pullback = jax.vjp(lambda *inputs: forward(*inputs, eps=eps, dtype=dy.dtype), x, weight, gate)
    dx, dweight, dgate = pullback(dy)
    return dx if past is None else dx + past, dweight, dgate
