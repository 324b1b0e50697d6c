"""The registry of token mixers: name -> (settings, module), one line each."""

from __future__ import annotations

import dataclasses
from typing import Any

from lte_jax.mixers import full_attention, gated_deltanet, lte, nsa, window_attention
from lte_jax.mixers.base import Mixer, MixerConfig

MIXERS: dict[str, tuple[type[MixerConfig], type[Mixer]]] = {
    "gated_deltanet": (gated_deltanet.Config, gated_deltanet.GatedDeltaNet),
    "window_attention": (window_attention.Config, window_attention.WindowAttention),
    "full_attention": (full_attention.Config, full_attention.FullAttention),
    "lte": (lte.Config, lte.LTE),
    "nsa": (nsa.Config, nsa.NSA),
}


def mixer_name(config: MixerConfig) -> str:
    """The registered name of a mixer's settings."""
    for name, (config_type, _) in MIXERS.items():
        if type(config) is config_type:
            return name
    raise ValueError(f"{type(config).__name__} is not the Config of a registered mixer ({', '.join(MIXERS)})")


def mixer_module(config: MixerConfig) -> type[Mixer]:
    """The module that runs these settings."""
    return MIXERS[mixer_name(config)][1]


def config_to_dict(config: MixerConfig) -> dict[str, Any]:
    """Settings as JSON values, with the mixer's name under ``"mixer"``."""
    return {"mixer": mixer_name(config), **dataclasses.asdict(config)}


def config_from_dict(values: dict[str, Any]) -> MixerConfig:
    """The inverse of :func:`config_to_dict`.

    Raises:
      ValueError: the mixer or one of the settings is unknown.
    """
    values = dict(values)
    name = values.pop("mixer", None)
    if name not in MIXERS:
        raise ValueError(f"mixer={name!r} is not one of {', '.join(MIXERS)}")
    config_type = MIXERS[name][0]
    known = {field.name for field in dataclasses.fields(config_type)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"{name} has no setting {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    return config_type(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
