"""What is kept of a training step that went wrong, and when do such steps end a run?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

KEPT_BATCHES = 3
"""So many batches are kept of steps that were not finite, and as many of spikes."""


class TrainingError(RuntimeError):
    """Training cannot go on; the last good checkpoint is intact."""


class BadSteps:
    """Steps that were not finite, and loss spikes, of one call of ``train``.

    Args:
      folder: of the run, where batches are kept.
      say: prints a warning.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]):
        self._folder, self._say = folder, say
        self._kept = {"nonfinite": 0, "spike": 0}

    def keep(self, step: int, batch: dict[str, np.ndarray], numbers: dict[str, Any], kind: str, applied: bool) -> None:
        """Writes this process's rows of such a step, for the first few of each kind ("nonfinite" or "spike")."""
        self._say(
            f"WARNING: step {step} is {'a loss spike' if applied else 'skipped'}: loss {float(numbers['loss'])}, "
            f"gradient norm {float(numbers['grad_norm'])}"
        )
        if self._kept[kind] < KEPT_BATCHES:
            place = self._folder / f"{kind}-{step}-process{jax.process_index()}.npz"
            np.savez(place, **batch)  # type: ignore[arg-type]
        self._kept[kind] += 1


def check(in_row: int, most: int, step: int, spike: bool) -> None:
    """Raises TrainingError where ``most`` steps in a row, up to ``step``, went wrong; the last was a spike or not."""
    if in_row < most:
        return
    if spike:
        raise TrainingError(
            f"the loss was a spike in {in_row} steps in a row, up to step {step}: training stops; look at the batches "
            "in spike-*.npz, or go on with a higher --set spikes.sigmas or with --set spikes.skip=false"
        )
    raise TrainingError(
        f"the loss or gradient was not finite in {in_row} steps in a row, up to step {step}: training stops; look at "
        "the batches in nonfinite-*.npz, or go on with --set optimizer.learning_rate=(a lower one) "
        "--allow_change=optimizer.learning_rate"
    )
