"""The shape of a model as data: sizes, and the pattern of mixers that repeats to depth."""

from __future__ import annotations

import dataclasses
from typing import Any

from lte_jax.mixers import config_from_dict, config_to_dict, gated_deltanet, lte, mixer_name
from lte_jax.mixers.base import MixerConfig


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of a model.

    Attributes:
      vocab_size: L. width: D. num_layers: a multiple of the pattern's length.
      pattern: the mixers' settings of the layers that repeat, from the first layer up.
      hidden_ratio, intermediate_size: the MLP's inner width (``layers.mlp_width``).
      max_length: the default bound of caches that grow (full attention, NSA).
      init_std, rescale_residual: ``layers.InitRule``.
      bos_token_id, eos_token_id, pad_token_id: carried for tokenizers and converted folders; the model ignores them.
    """

    vocab_size: int
    width: int
    num_layers: int
    pattern: tuple[MixerConfig, ...]
    hidden_ratio: float = 4.0
    intermediate_size: int | None = None
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    max_length: int = 4096
    init_std: float = 0.006
    rescale_residual: bool = True
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    pad_token_id: int | None = None

    def validate(self) -> None:
        """Raises ValueError, stating the value, the rule and the fix."""
        for name in ("vocab_size", "width", "num_layers", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not self.pattern or self.num_layers % len(self.pattern):
            raise ValueError(
                f"num_layers={self.num_layers} is not a multiple of the pattern's length {len(self.pattern)}; "
                "change the depth or write out the pattern"
            )
        for mixer in self.pattern:
            mixer.validate(self.width)
        kv_heads = {mixer.kv_heads for mixer in self.pattern if isinstance(mixer, lte.Config)}
        if len(kv_heads) > 1:
            raise ValueError(f"the LTE layers have {sorted(kv_heads)} KV heads; the penalty needs one number for all")
        for below, mixer in zip((None, *self.pattern), self.pattern, strict=False):
            if _ranks_by_writes(mixer) and not isinstance(below, gated_deltanet.Config):
                raise ValueError(
                    "retention='write_strength' ranks tokens by the delta rule's write in the layer below: put a "
                    "gated_deltanet directly before that lte layer in the pattern"
                )

    def to_dict(self) -> dict[str, Any]:
        """JSON values; each mixer carries its name."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**values, "pattern": [config_to_dict(mixer) for mixer in self.pattern]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """The inverse of ``to_dict``; unknown keys are errors."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"the model has no setting {', '.join(unknown)}; it has {', '.join(sorted(known))}")
        return cls(**{**values, "pattern": tuple(config_from_dict(mixer) for mixer in values["pattern"])})

    def layer_names(self) -> tuple[str, ...]:
        """The mixer's name for every layer, from the first up."""
        return tuple(mixer_name(mixer) for mixer in self.pattern) * (self.num_layers // len(self.pattern))


def _ranks_by_writes(mixer: MixerConfig | None) -> bool:
    """Whether this is an LTE layer that ranks tokens by the delta rule's writes in the layer below."""
    return isinstance(mixer, lte.Config) and mixer.retention == "write_strength"


def with_emitters(pattern: tuple[MixerConfig, ...]) -> tuple[MixerConfig, ...]:
    """The pattern, where a GDN layer below a mixer that ranks by write strength reports it."""
    above = (*pattern[1:], None)
    return tuple(
        dataclasses.replace(mixer, emit_write_strength=True)
        if isinstance(mixer, gated_deltanet.Config) and _ranks_by_writes(upper)
        else mixer
        for mixer, upper in zip(pattern, above, strict=True)
    )
