"""The product of few rows in plain jax.numpy: the reference, and what runs without a GPU."""

from __future__ import annotations

import math
from itertools import accumulate

import jax
import jax.numpy as jnp

from pallas_kernels.row_product.api import Case


def check(case: Case) -> None:
    """Any case."""


def forward(x, weight, norm, bias, residual, *, eps: float, gated: bool, widths: tuple[int, ...], dtype):
    if norm is not None:
        x32 = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
        x = (x32 * scale * norm.astype(jnp.float32)).astype(x.dtype)
    rows = x.shape[0]
    if rows == 1:  # XLA's GPU compiler writes the product of one row as a sum over whole weights
        x = jnp.pad(x, ((0, 7), (0, 0)))
    y = jax.lax.dot_general(x, weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)[:rows]
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    if gated:
        gate, up = jnp.split(y, 2, axis=1)
        y = jax.nn.silu(gate) * up
    if residual is not None:
        y = y + residual.astype(jnp.float32)
    assert sum(widths) == math.prod(y.shape[1:])
    return tuple(jnp.split(y.astype(dtype), list(accumulate(widths))[:-1], axis=1))
