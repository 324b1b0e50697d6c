"""How LTE's router scores each token: dilated convolutions over [k; v], one number per token and KV head.

    x_0 = [k_h ; v_h]                          2N channels, k before its rotary positions
    x_n = silu(mask * (conv_n(dropout(x_{n-1})) + b_n))      halves the channels
    z   = w . x_last + b,    r = sigmoid(z) - 1/2   or   relu(z)

A convolution is centred, so a score reads ``reach`` tokens on each side. It stops at the ends of its document and at
padding, which count as zeros. Heads never mix: each has its own weights, or all share one set (paper 2510.20787,
section 3). Padding is zeroed between the convolutions however the weights are shared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Shaped

from lte_jax.dims import Scores, SegmentIds
from lte_jax.layers import parameter

METHODS = ("sigmoid", "relu")


def reach(sizes: Sequence[int], dilations: Sequence[int]) -> int:
    """Tokens that a score reads on each side of its own: the sum of (taps - 1) * dilation / 2."""
    return sum((size - 1) * dilation for size, dilation in zip(sizes, dilations, strict=True)) // 2


class GroupedConvolution(nnx.Module):
    """y_t = b + sum_i x_{t + (i - (taps-1)/2) dilation} w_i, per head; x [B,T,K,I] -> y [B,T,K,O], float32.

    ``weight`` is [heads, taps, I, O], Kaiming-normal (fan in, ReLU gain); ``bias`` [heads, O] is uniform in
    +-1/sqrt(fan_in). ``heads`` is K, or 1 where all heads share the weights.
    """

    def __init__(
        self,
        heads: int,
        taps: int,
        dilation: int,
        inputs: int,
        outputs: int,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        fan_in = taps * inputs
        bound = 1.0 / math.sqrt(fan_in)
        axis = "kv_heads" if heads > 1 else None
        self.weight = parameter(
            jax.nn.initializers.normal(math.sqrt(2.0 / fan_in)),
            (heads, taps, inputs, outputs),
            (axis, None, None, None),
            param_dtype,
            rngs,
        )
        self.bias = parameter(
            lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound),
            (heads, outputs),
            (axis, None),
            param_dtype,
            rngs,
        )
        self.dilation = dilation
        self.dtype = dtype

    def __call__(self, x: Float[Array, "B T K I"], segment_ids: SegmentIds | None = None) -> Float[Array, "B T K O"]:
        heads, taps, inputs, outputs = self.weight.shape
        weight = self.weight[...].astype(self.dtype).transpose(0, 2, 1, 3).reshape(heads, inputs, taps * outputs)
        # One product for all taps, then shifts of its (narrower) result: x is read once.
        x = x.astype(self.dtype)
        if heads == 1:
            products = jnp.matmul(x, weight[0], preferred_element_type=jnp.float32)
        else:
            if jax.default_backend() == "cpu":  # XLA's CPU has no batched product of 16-bit inputs into float32
                x, weight = x.astype(jnp.float32), weight.astype(jnp.float32)
            products = jnp.einsum("btki,kio->btko", x, weight, preferred_element_type=jnp.float32)
        y = self.bias[...].astype(jnp.float32)
        for tap in range(taps):
            product = products[..., tap * outputs : (tap + 1) * outputs]
            offset = tap * self.dilation - (taps - 1) * self.dilation // 2
            y = y + _same_document(_shift(product, offset), offset, segment_ids)
        return y


class HeadProjection(nnx.Module):
    """z = w . x + b, one number per head: x [B,T,K,I] -> z [B,T,K], float32. ``bias`` starts at 1/2: all kept."""

    def __init__(self, heads: int, inputs: int, *, param_dtype: DTypeLike, rngs: nnx.Rngs):
        axis = "kv_heads" if heads > 1 else None
        std = jax.nn.initializers.normal(math.sqrt(2.0 / inputs))
        self.weight = parameter(std, (heads, inputs), (axis, None), param_dtype, rngs)
        self.bias = parameter(jax.nn.initializers.constant(0.5), (heads,), (axis,), param_dtype, rngs)

    def __call__(self, x: Float[Array, "B T K I"]) -> Scores:
        weight, bias = self.weight[...].astype(jnp.float32), self.bias[...].astype(jnp.float32)
        return jnp.sum(x.astype(jnp.float32) * weight, axis=-1) + bias


class Router(nnx.Module):
    """Scores tokens for retention: [k; v] [B,T,K,2N] -> r [B,T,K] float32; a token is selected where r > 0.

    Args:
      heads: K for own weights per head, 1 for one set that all heads share.
      channels: of a head's input, 2N.
      sizes, dilations: taps and dilation of each convolution; each halves the channels.
      dropout: the rate before each convolution, where a key is given.
      method: "sigmoid" (sigmoid(z) - 1/2) or "relu".
    """

    def __init__(
        self,
        heads: int,
        channels: int,
        *,
        sizes: Sequence[int],
        dilations: Sequence[int],
        dropout: float,
        method: str,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        convs = []
        for size, dilation in zip(sizes, dilations, strict=True):
            convs.append(
                GroupedConvolution(
                    heads, size, dilation, channels, channels // 2, dtype=dtype, param_dtype=param_dtype, rngs=rngs
                )
            )
            channels //= 2
        self.convs = nnx.List(convs)
        self.proj = HeadProjection(heads, channels, param_dtype=param_dtype, rngs=rngs)
        self.dropout = dropout
        self.method = method
        self.dtype = dtype

    def __call__(
        self, x: Float[Array, "B T K C"], segment_ids: SegmentIds | None = None, key: jax.Array | None = None
    ) -> Scores:
        """Scores of every token, 0 at padding.

        Args:
          x: keys (without rotary positions) and values side by side, C = 2N.
          segment_ids: document of each token, 0 for padding; None for one document.
          key: draws dropout; None means none.
        """
        real = None if segment_ids is None else (segment_ids != 0)[..., None]
        keys = [None] * len(self.convs) if key is None else jax.random.split(key, len(self.convs))
        x = _zero(x, None if real is None else real[..., None])
        for conv, conv_key in zip(self.convs, keys, strict=True):
            y = conv(_dropout(x, self.dropout, conv_key), segment_ids)
            x = jax.nn.silu(_zero(y, None if real is None else real[..., None])).astype(self.dtype)
        z = self.proj(x)
        return _zero(jax.nn.relu(z) if self.method == "relu" else jax.nn.sigmoid(z) - 0.5, real)


def _zero(x: Array, real: Bool[Array, "..."] | None) -> Array:
    return x if real is None else jnp.where(real, x, jnp.zeros((), x.dtype))


def _shift(x: Shaped[Array, "B T ..."], offset: int) -> Shaped[Array, "B T ..."]:
    """y_t = x_{t + offset}, 0 outside the sequence."""
    tokens = x.shape[1]
    if abs(offset) >= tokens:
        return jnp.zeros_like(x)
    pads = [(0, 0)] * x.ndim
    pads[1] = (max(-offset, 0), max(offset, 0))
    return jax.lax.slice_in_dim(jnp.pad(x, pads), max(offset, 0), max(offset, 0) + tokens, axis=1)


def _same_document(shifted: Float[Array, "B T K O"], offset: int, segment_ids: SegmentIds | None) -> Array:
    """Zeros where the token that was shifted in belongs to another document than the token that reads it."""
    if segment_ids is None or offset == 0:
        return shifted
    return _zero(shifted, (_shift(segment_ids, offset) == segment_ids)[..., None, None])


def _dropout(x: Array, rate: float, key: jax.Array | None) -> Array:
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype))
