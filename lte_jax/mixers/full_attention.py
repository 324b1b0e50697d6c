"""Full causal attention: each token sees every earlier token of its document."""

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
    """Settings of full attention.

    Attributes:
      num_kv_heads: as many as heads by default.
      head_dim: width / num_heads by default.
      rope_theta: base of the rotary positions.
      qkv_bias: biases on the three input projections.
      qk_norm: an RMSNorm over each head of q and of k, before the rotation.
    """

    num_heads: int = 16
    num_kv_heads: int | None = None
    head_dim: int | None = None
    rope_theta: float = 10000.0
    qkv_bias: bool = False
    qk_norm: bool = False

    def validate(self, width: int) -> None:
        validate_heads("full_attention", width, self.num_heads, self.num_kv_heads, self.head_dim)
        if self.rope_theta <= 0:
            raise ValueError(f"full_attention: rope_theta={self.rope_theta} must be above 0")


class FullAttention(SoftmaxAttention):
    """See :mod:`lte_jax.mixers.softmax_attention`. The cache has ``max_length`` slots.

    It takes batch * (2 max_length K N * itemsize + 4) bytes. A token beyond ``max_length`` is a ValueError where the
    cache's counter is concrete; under ``jit`` the caller has to check, as an overrun there forgets the oldest token.
    """

    needs_max_length = True

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
        super().__init__(width, window=None, init=init, implementation=implementation, **options, **settings)
