"""Several runs of one command, trained one after the other and compared at the end."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from lte_jax import configs, plots, restore
from lte_jax.data import Batches
from lte_jax.evaluate.scores import Scores, score_batches
from lte_jax.experiment import ExperimentConfig
from lte_jax.whole_files import write_json


@dataclasses.dataclass(frozen=True)
class Suite:
    """Runs, each in a folder of its name inside the workdir."""

    runs: tuple[ExperimentConfig, ...]

    def override(self, assignments: Sequence[str]) -> Suite:
        """``a.b=value`` changes every run, ``name.a.b=value`` the run of that name."""
        changed = list(self.runs)
        for assignment in assignments:
            first, _, rest = assignment.partition(".")
            named = [index for index, run in enumerate(changed) if run.name == first]
            for index in named or range(len(changed)):
                changed[index] = configs.override(changed[index], [rest if named else assignment])
        return Suite(tuple(changed))


def compare(suite: Suite, workdir: Path) -> str:
    """Scores the runs on held-out rows under their hard budgets: a table, ``accuracy.png`` and ``summary.json``."""
    scores: dict[str, Scores] = {}
    for run in suite.runs:
        model, _ = restore.load_model(workdir / run.name)
        rows = run.data.rows("heldout", batch_size=64)
        with contextlib.closing(Batches(rows, 64, pad_last=True)) as batches:
            scores[run.name] = score_batches(model, batches, reading="streaming", buckets=6)
    chance = getattr(suite.runs[0].data, "chance", None)
    picture = plots.accuracy_by_distance(
        workdir / "accuracy.png",
        {name: [(b.low, b.high, b.accuracy) for b in found.by_distance] for name, found in scores.items()},
        chance,
    )
    summary = {"chance": chance, "models": {name: found.to_dict() for name, found in scores.items()}}
    write_json(workdir / "summary.json", summary)
    return f"{_table(scores, chance)}\npicture: {picture}"


def _table(scores: dict[str, Scores], chance: float | None) -> str:
    names = list(scores)
    lines = ["accuracy by distance to the answer (held-out rows, hard budget)"]
    lines.append(f"{'distance':>12}" + "".join(f"{name:>12}" for name in names) + f"{'chance':>12}")
    level = "" if chance is None else f"{chance:.3f}"
    for buckets in zip(*(scores[name].by_distance for name in names), strict=True):
        span = f"{buckets[0].low}-{buckets[0].high}"
        lines.append(f"{span:>12}" + "".join(f"{bucket.accuracy:12.3f}" for bucket in buckets) + f"{level:>12}")
    lines.append(f"{'all':>12}" + "".join(f"{scores[name].accuracy:12.3f}" for name in names) + f"{level:>12}")
    return "\n".join(lines)
