"""Sliding-window attention: each token sees the last W tokens, itself included."""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import nnx
from jax.typing import DTypeLike

from lte_jax.layers import InitRule
from lte_jax.mixers.base import MixerConfig
from lte_jax.mixers.softmax_attention import SoftmaxAttention, validate_heads


@dataclasses.dataclass(frozen=True)
class Config(MixerConfig):
    """Settings of sliding-window attention.

    Attributes:
      num_kv_heads: as many as heads by default.
      head_dim: width / num_heads by default.
      window: W, the keys that a token sees with itself (LTE's window does not count the token itself).
      rope_theta: base of the rotary positions.
      qkv_bias: biases on the three input projections.
      qk_norm: an RMSNorm over each head of q and of k, before the rotation.
    """

    num_heads: int = 16
    num_kv_heads: int | None = None
    head_dim: int | None = None
    window: int = 1024
    rope_theta: float = 10000.0
    qkv_bias: bool = False
    qk_norm: bool = False

    def validate(self, width: int) -> None:
        validate_heads("window_attention", width, self.num_heads, self.num_kv_heads, self.head_dim)
        if self.window < 1:
            raise ValueError(f"window_attention: window={self.window} must be at least 1; a token sees itself")
        if self.rope_theta <= 0:
            raise ValueError(f"window_attention: rope_theta={self.rope_theta} must be above 0")


class WindowAttention(SoftmaxAttention):
    """See :mod:`lte_jax.mixers.softmax_attention`. The cache has W slots: batch * (2 W K N * itemsize + 4) bytes."""

    def __init__(
        self,
        config: Config,
        width: int,
        *,
        init: InitRule,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
        max_length: int,
        implementation: str | None = None,
    ):
        config.validate(width)
        settings: dict[str, Any] = dataclasses.asdict(config)
        options: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs, max_length=max_length)
        super().__init__(width, init=init, implementation=implementation, **options, **settings)
