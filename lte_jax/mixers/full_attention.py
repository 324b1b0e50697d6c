"""Full causal attention: each token sees every earlier token of its document."""

from __future__ import annotations

import dataclasses

from lte_jax.mixers.softmax_attention import SoftmaxAttention, SoftmaxConfig


@dataclasses.dataclass(frozen=True)
class Config(SoftmaxConfig):
    """Settings of full attention: those of :class:`SoftmaxConfig`."""

    name = "full_attention"


class FullAttention(SoftmaxAttention):
    """See :mod:`lte_jax.mixers.softmax_attention`. The cache has ``max_length`` slots.

    It takes batch * (2 max_length K N * itemsize + 4) bytes. A token beyond ``max_length`` is a ValueError where the
    cache's counter is concrete; under ``jit`` the caller has to check, as an overrun there forgets the oldest token.
    """

    needs_max_length = True
