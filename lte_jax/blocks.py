"""One layer of the model, and one repeat of its pattern."""

from __future__ import annotations

from typing import Any

from flax import nnx

from lte_jax import partition
from lte_jax.dims import Hidden, SegmentIds
from lte_jax.inputs import zero_padding
from lte_jax.layers import GatedMLP, Recipe, RMSNorm, mlp_width
from lte_jax.mixers import mixer_module
from lte_jax.mixers.base import Aux, MixerConfig
from lte_jax.model_config import ModelConfig, with_emitters
from lte_jax.remat import operand
from pallas_kernels.dispatch import xla_or_fastest


class Block(nnx.Module):
    """Pre-norm residual layer: x += mixer(rms(x)); x += mlp(rms(x))."""

    def __init__(self, config: ModelConfig, mixer: MixerConfig, recipe: Recipe):
        self.mixer_norm = RMSNorm(config.width, recipe, eps=config.norm_eps)
        self.mixer = mixer_module(mixer)(mixer, config.width, recipe)
        self._norms = xla_or_fastest(recipe.implementation)
        self.mlp_norm = RMSNorm(config.width, recipe, eps=config.norm_eps)
        inner = mlp_width(config.width, config.hidden_ratio, config.intermediate_size)
        self.mlp = GatedMLP(config.width, inner, recipe)

    def __call__(self, x: Hidden, **kwargs: Any) -> tuple[Hidden, Aux]:
        x, normed = self._normed(self.mixer_norm, x)
        y, aux = self.mixer(normed, **kwargs)
        x, normed = self._normed(self.mlp_norm, operand(x + y))
        return self._finish(operand(x + self.mlp(normed)), kwargs["segment_ids"]), aux

    def extend(self, x: Hidden, cache: Any, **kwargs: Any) -> tuple[Hidden, Any, Aux]:
        y, cache, aux = self.mixer.extend(self.mixer_norm(x), cache, **kwargs)
        x = x + y
        return self._finish(x + self.mlp(self.mlp_norm(x)), kwargs["segment_ids"]), cache, aux

    def _normed(self, norm: RMSNorm, x: Hidden) -> tuple[Hidden, Hidden]:
        """(x, its norm), whose gradients meet in one pass."""
        named: Any = dict(eps=norm.eps, dtype=norm.dtype, implementation=self._norms)
        x, normed = partition.residual_rms_norm(x, norm.weight[...], **named)
        return x, operand(normed)

    def _finish(self, x: Hidden, segment_ids: SegmentIds | None) -> Hidden:
        return partition.constrain(zero_padding(x, segment_ids), "batch", "length", None)


class Unit(nnx.Module):
    """One repeat of the pattern: what a scan step runs."""

    def __init__(self, config: ModelConfig, recipe: Recipe):
        self.blocks = nnx.List([Block(config, mixer, recipe) for mixer in with_emitters(config.pattern)])
