"""Sliding-window attention: each token sees the last W tokens, itself included."""

from __future__ import annotations

import dataclasses

from lte_jax.mixers.softmax_attention import SoftmaxAttention, SoftmaxConfig


@dataclasses.dataclass(frozen=True)
class Config(SoftmaxConfig):
    """Settings of sliding-window attention: those of :class:`SoftmaxConfig`, and

    Attributes:
      window: W, the keys that a token sees with itself (LTE's window does not count the token itself).
    """

    window: int = 1024

    name = "window_attention"

    def validate(self, width: int) -> None:
        super().validate(width)
        if self.window < 1:
            raise ValueError(f"window_attention: window={self.window} must be at least 1; a token sees itself")


class WindowAttention(SoftmaxAttention):
    """See :mod:`lte_jax.mixers.softmax_attention`. The cache has W slots: batch * (2 W K N * itemsize + 4) bytes."""
