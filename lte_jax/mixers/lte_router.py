"""LTE's router: the weights of dilated convolutions over [k; v] that give one number per token and KV head.

``pallas_kernels.router`` has the equation. A convolution is centred, so a score reads ``reach`` tokens on each side. It
stops at the ends of its document and at padding, which count as zeros. Heads never mix: each has its own weights, or
all share one set (paper 2510.20787, section 3). Padding is zeroed between the convolutions however the weights are
shared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
from flax import nnx

from lte_jax.dims import Keys, Scores, SegmentIds, Values
from lte_jax.layers import Recipe
from lte_jax.partition_router import router_scores
from pallas_kernels.dispatch import xla_or_fastest
from pallas_kernels.router import Convolution, Dropout, draw_seeds


def reach(sizes: Sequence[int], dilations: Sequence[int]) -> int:
    """Tokens that a score reads on each side of its own: the sum of (taps - 1) * dilation / 2."""
    return sum((size - 1) * dilation for size, dilation in zip(sizes, dilations, strict=True)) // 2


class GroupedConvolution(nnx.Module):
    """The parameters of y_t = b + sum_i x_{t + (i - (taps-1)/2) dilation} w_i, per head.

    ``weight`` is [heads, taps, I, O], Kaiming-normal (fan in, ReLU gain); ``bias`` [heads, O] is uniform in
    +-1/sqrt(fan_in). ``heads`` is K, or 1 where all heads share the weights.
    """

    def __init__(self, heads: int, taps: int, dilation: int, inputs: int, outputs: int, recipe: Recipe):
        fan_in = taps * inputs
        bound = 1.0 / math.sqrt(fan_in)
        axis = "kv_heads" if heads > 1 else None
        kaiming = jax.nn.initializers.normal(math.sqrt(2.0 / fan_in))
        self.weight = recipe.parameter(kaiming, (heads, taps, inputs, outputs), (axis, None, None, None))
        self.bias = recipe.parameter(
            lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound),
            (heads, outputs),
            (axis, None),
        )
        self.dilation = dilation


class HeadProjection(nnx.Module):
    """The parameters of z = w . x + b, one number per head. ``bias`` starts at 1/2: all kept."""

    def __init__(self, heads: int, inputs: int, recipe: Recipe):
        axis = "kv_heads" if heads > 1 else None
        std = jax.nn.initializers.normal(math.sqrt(2.0 / inputs))
        self.weight = recipe.parameter(std, (heads, inputs), (axis, None))
        self.bias = recipe.parameter(jax.nn.initializers.constant(0.5), (heads,), (axis,))


class Router(nnx.Module):
    """Scores tokens for retention: k, v [B,T,K,N] -> r [B,T,K] float32; a token is selected where r > 0.

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
        recipe: Recipe,
        *,
        sizes: Sequence[int],
        dilations: Sequence[int],
        dropout: float,
        method: str,
    ):
        convs = []
        for size, dilation in zip(sizes, dilations, strict=True):
            convs.append(GroupedConvolution(heads, size, dilation, channels, channels // 2, recipe))
            channels //= 2
        self.convs = nnx.List(convs)
        self.proj = HeadProjection(heads, channels, recipe)
        self.dropout = dropout
        self.method = method
        self.dtype = recipe.dtype

    def __call__(
        self,
        k: Keys,
        v: Values,
        segment_ids: SegmentIds | None = None,
        key: jax.Array | None = None,
        implementation: str | None = None,
    ) -> Scores:
        """Scores of every token, 0 at padding.

        Args:
          k, v: keys (without rotary positions) and values.
          segment_ids: document of each token, 0 for padding; None for one document.
          key: draws dropout; None means none.
          implementation: of the model's operations (``xla_or_fastest``).
        """
        dropout = None
        if key is not None and self.dropout:
            dropout = Dropout(self.dropout, draw_seeds(key, len(self.convs)))
        return router_scores(
            k.astype(self.dtype),
            v.astype(self.dtype),
            [Convolution(conv.weight[...], conv.bias[...]) for conv in self.convs],
            self.proj.weight[...],
            self.proj.bias[...],
            dilations=[conv.dilation for conv in self.convs],
            method=self.method,
            segment_ids=segment_ids,
            dropout=dropout,
            implementation=xla_or_fastest(implementation),
        )
