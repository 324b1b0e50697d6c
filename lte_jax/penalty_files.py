"""What of the retention penalty do the authors' folders and our checkpoints both hold, and how is it written there?

Their config.json holds the schedule (``l1_*`` and ``routing_freeze_steps`` of its ``attn``), their weights file the
penalty weights and the counts of kept tokens: ``model.l1_lambda``, [layers, K], [layers] or a scalar by what one weight
is shared over, and ``model.num_kept`` [layers, K]. Our checkpoints hold the schedule in their settings and the arrays
under ``training/penalty``, there with two counters (steps seen, updates made) for which theirs have no place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from lte_jax import configs
from lte_jax.retention import PenaltyConfig

WEIGHTS, KEPT = "model.l1_lambda", "model.num_kept"

_NAMES = {
    "shared": "l1_lambda_shared",
    "period": "l1_lambda_update_steps",
    "initial": "l1_lambda_init",
    "minimum": "l1_lambda_min",
    "maximum": "l1_lambda_max",
    "raise_factor": "l1_alpha",
    "lower_factor": "l1_alpha_neg",
    "tolerance": "l1_lambda_tolerate",
    "initial_steps": "l1_lambda_initial_steps",
    "warmup_steps": "l1_warmup_steps",
    "freeze_steps": "routing_freeze_steps",
}


@dataclasses.dataclass(frozen=True)
class SavedPenalty:
    """A penalty between two files.

    Attributes:
      schedule: its settings.
      weights, kept: [layers, K] float32, as in ``retention.PenaltyState``.
    """

    schedule: PenaltyConfig
    weights: np.ndarray
    kept: np.ndarray

    @classmethod
    def none(cls, layers: int, heads: int) -> SavedPenalty:
        """Before any training: the published schedule, nothing weighed or counted."""
        zeros = np.zeros((layers, heads), np.float32)
        return cls(PenaltyConfig(), zeros, zeros)

    def to_authors(self) -> dict[str, np.ndarray]:
        """Their two tensors by name."""
        heads = {"head": self.weights, "layer": self.weights[:, 0], "all": self.weights[0, 0]}
        return {
            WEIGHTS: np.array(heads[self.schedule.shared], np.float32),
            KEPT: np.array(self.kept, np.float32),
        }

    @classmethod
    def from_authors(cls, attn: Mapping[str, Any], tensors: Mapping[str, np.ndarray], layers: int) -> SavedPenalty:
        """The inverse: ``attn`` of their config.json, and the two tensors, which name the heads."""
        schedule, kept = schedule_from_authors(attn), np.asarray(tensors[KEPT], np.float32)
        weights = np.asarray(tensors[WEIGHTS], np.float32)
        expected = {"head": kept.shape, "layer": (layers,), "all": ()}[schedule.shared]
        if kept.ndim != 2 or len(kept) != layers or weights.shape != expected:
            raise ValueError(
                f"{WEIGHTS} {list(weights.shape)} and {KEPT} {list(kept.shape)} do not fit {layers} LTE layers with "
                f"l1_lambda_shared={schedule.shared!r}; give weights and config.json of one model"
            )
        if weights.ndim == 1:
            weights = weights[:, None]
        return cls(schedule, np.array(np.broadcast_to(weights, kept.shape)), kept)


def schedule_to_authors(schedule: PenaltyConfig) -> dict[str, Any]:
    """The settings under their names."""
    values = {name: getattr(schedule, field) for field, name in _NAMES.items()}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def schedule_from_authors(attn: Mapping[str, Any]) -> PenaltyConfig:
    """The inverse; settings that are not there take the published values.

    Raises:
      ValueError: a value that cannot work.
    """
    return configs.from_dict(
        PenaltyConfig, {field: attn[name] for field, name in _NAMES.items() if name in attn}, "config.json: attn"
    )
