"""Which retention rule, window and budget serve best at equal bytes of cache? A table and a figure, over seeds.

python -m experiments.sweep --config=quickstart --workdir=runs/sweep --windows=12,20 --seeds=0,1,2
python -m experiments.sweep --config=quickstart --workdir=runs/sweep --rules=learned,recency,sliding --set steps=300

The config's LTE layers say how many bytes each layer may keep. For every rule and window the budget is the largest that
fits; "sliding" spends all bytes on a plain window. A run lies in a folder of its name, and a second call continues.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from absl import app, flags, logging

from experiments.paths import define_path
from experiments.suite import Suite
from experiments.warned import said_in_one_line
from lte_jax import LTE, WindowAttention, configs, restore
from lte_jax.data import Batches, Mixture
from lte_jax.evaluate.scores import score_batches
from lte_jax.experiment import ExperimentConfig
from lte_jax.mixers import lte_cache
from lte_jax.mixers.base import MixerConfig
from lte_jax.mixers.lte_store import RULES
from lte_jax.whole_files import write_json, write_text

FLAGS = flags.FLAGS
SLIDING = "sliding"
_DTYPE = "bfloat16"  # of the caches whose bytes are compared


@dataclasses.dataclass(frozen=True)
class Setting:
    """One point of a sweep: ``bytes`` of one sequence in one such layer; ``budget`` is 0 for a window alone."""

    rule: str
    window: int
    budget: int
    bytes: int
    mixer: MixerConfig

    @property
    def name(self) -> str:
        return f"{self.rule}-w{self.window}" + (f"-m{self.budget}" if self.budget else "")


def lte_bytes(config: LTE, size: int) -> int:
    """Of one sequence's cache in a layer with heads of ``size``."""
    return lte_cache.cache_bytes(1, config.window, config.budget, config.kv_heads, size, config.reach, _DTYPE)


def settings(base: LTE, width: int, rules: Sequence[str], windows: Sequence[int]) -> list[Setting]:
    """Every rule at every window, each with the largest budget whose cache is no larger than the base's.

    Raises:
      ValueError: an unknown rule, or a window that leaves no room for a budget.
    """
    size = width // base.num_heads
    most = lte_bytes(base, size)
    found: list[Setting] = []
    for rule in rules:
        if rule == SLIDING:
            slot = base.kv_heads * 2 * size * 2
            sliding = WindowAttention(
                num_heads=base.num_heads, num_kv_heads=base.num_kv_heads, window=(most - 4) // slot,
                rope_theta=base.rope_theta, qkv_bias=base.qkv_bias,
            )  # fmt: skip
            found.append(Setting(rule, sliding.window, 0, sliding.window * slot + 4, sliding))
            continue
        if rule not in RULES:
            raise ValueError(f"--rules={rule}: there is {', '.join((*RULES, SLIDING))}")
        for window in windows:
            empty = dataclasses.replace(base, retention=rule, window=window, budget=0)
            slot = lte_bytes(dataclasses.replace(empty, budget=1), size) - lte_bytes(empty, size)
            budget = (most - lte_bytes(empty, size)) // slot
            if budget <= base.sinks:
                raise ValueError(
                    f"--windows={window}: with {most} bytes, a window of {window} leaves {max(budget, 0)} slots, which "
                    f"must be more than sinks={base.sinks}; shorten it"
                )
            mixer = dataclasses.replace(empty, budget=budget)
            mixer.validate(width)
            found.append(Setting(rule, window, budget, lte_bytes(mixer, size), mixer))
    return found


def run_of(base: ExperimentConfig, setting: Setting, seed: int) -> ExperimentConfig:
    """The base with this setting in place of its LTE layers, and this seed for its weights and its data."""
    pattern = tuple(setting.mixer if isinstance(mixer, LTE) else mixer for mixer in base.model.pattern)
    model = dataclasses.replace(base.model, pattern=pattern)
    return dataclasses.replace(
        base, name=f"{setting.name}-s{seed}", model=model, seed=seed, data=_with_seed(base.data, seed)
    )


def _with_seed(data: Any, seed: int) -> Any:
    """The data with ``seed`` added to its own, of every part of a mixture."""
    if isinstance(data, Mixture):
        return dataclasses.replace(data, parts=tuple(_with_seed(part, seed) for part in data.parts))
    return dataclasses.replace(data, seed=data.seed + seed)


def sweep(
    base: ExperimentConfig,
    workdir: Path,
    rules: Sequence[str],
    windows: Sequence[int],
    seeds: Sequence[int],
    trainer: Callable[[ExperimentConfig, Path], Any],
    say: Callable[[str], Any] = print,
) -> list[dict[str, Any]] | None:
    """Trains and scores every point; ``sweep.json``, ``sweep.md`` and ``sweep.png`` grow with each.

    A run is scored on the rows that its own data hold out: another seed's documents may be among those it has read.

    Args:
      windows: default the base's.
      trainer: ``trainer(config, folder)`` trains a run to its end, or finds it finished (``lte_jax.train.train``).

    Returns:
      The points; None after a signal, which leaves the others to be done.
    """
    own = next((mixer for mixer in base.model.pattern if isinstance(mixer, LTE)), None)
    if own is None:
        raise ValueError(f"{base.name} has no LTE layer to put other settings into")
    if not seeds:
        raise ValueError("--seeds: give at least one")
    records: list[dict[str, Any]] = []
    for setting in settings(own, base.model.width, rules, windows or [own.window]):
        for seed in seeds:
            config = run_of(base, setting, seed)
            result = trainer(config, workdir / config.name)
            if not result.finished or result.interrupted:
                return None
            model, _ = restore.load_model(workdir / config.name)
            rows = config.data.rows("heldout", batch_size=64)
            with contextlib.closing(Batches(rows, 64, pad_last=True)) as batches:
                scores = score_batches(model, batches, reading="streaming")
            point = {name: getattr(setting, name) for name in ("rule", "window", "budget", "bytes")}
            records.append({**point, "seed": seed, "accuracy": scores.accuracy, "loss": scores.loss})
            say(f"{config.name}: accuracy {scores.accuracy:.4f}, loss {scores.loss:.4f}")
            write_json(workdir / "sweep.json", {"base": configs.to_dict(base), "points": records})
            write_text(workdir / "sweep.md", table(records) + "\n")
            figure(records, workdir / "sweep.png", base.name)
    return records


def _by_setting(records: Iterable[Mapping[str, Any]]) -> dict[tuple[str, int, int, int], list[float]]:
    found: dict[tuple[str, int, int, int], list[float]] = {}
    for record in records:
        key = (record["rule"], record["window"], record["budget"], record["bytes"])
        found.setdefault(key, []).append(record["accuracy"])
    return found


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a line for each setting, its accuracy over the seeds."""
    lines = ["| rule | window | budget | bytes per layer | accuracy, mean | least | most | seeds |", "|---" * 8 + "|"]
    for (rule, window, budget, size), values in _by_setting(records).items():
        spread = f"{statistics.mean(values):.3f} | {min(values):.3f} | {max(values):.3f} | {len(values)}"
        lines.append(f"| {rule} | {window} | {budget or '-'} | {size:,} | {spread} |")
    return "\n".join(lines)


def figure(records: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Accuracy over the window, a line for each rule, with the range of the seeds."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn, axis = plt.subplots(figsize=(7, 4))
    found = _by_setting(records)
    for rule in dict.fromkeys(key[0] for key in found):
        points = sorted((window, values) for (name, window, *_), values in found.items() if name == rule)
        means = [statistics.mean(values) for _, values in points]
        below = [mean - min(values) for mean, (_, values) in zip(means, points, strict=True)]
        above = [max(values) - mean for mean, (_, values) in zip(means, points, strict=True)]
        axis.errorbar([window for window, _ in points], means, [below, above], fmt="o-", capsize=4, label=rule)
    axis.set(xlabel="window (tokens)", ylabel="accuracy on held-out rows", ylim=(-0.02, 1.02))
    axis.set_title(f"{title}: at most {max(key[3] for key in found):,} bytes of cache per layer")
    axis.legend()
    drawn.tight_layout()
    drawn.savefig(path, dpi=110)
    plt.close(drawn)


def define_flags() -> None:
    flags.DEFINE_string("config", "quickstart", "A file in experiments/configs whose (first) LTE model is the base.")
    define_path("workdir", None, "The folder of the runs: made, or continued.")
    flags.DEFINE_list("rules", [*RULES, SLIDING], "Retention rules.")
    flags.DEFINE_list("windows", [], "Windows to try; default the base's.")
    flags.DEFINE_list("seeds", ["0"], "Of weights and data.")
    flags.DEFINE_multi_string("set", [], "A setting of the base: a.b=value. May be repeated.")
    flags.mark_flag_as_required("workdir")


def _whole(flag: str) -> list[int]:
    values: list[str] = FLAGS[flag].value or []
    try:
        return [int(value) for value in values]
    except ValueError:
        raise ValueError(f"--{flag}={','.join(values)}: not whole numbers") from None


def main(argv: list[str]) -> None:
    logging.set_verbosity(logging.ERROR)  # at lower levels orbax tells its whole life
    with said_in_one_line(argv):
        from lte_jax.train import INTERRUPTED, train

        base = configs.load_named("experiments.configs", FLAGS.config)
        if isinstance(base, Suite):
            has_lte = [run for run in base.runs if any(isinstance(mixer, LTE) for mixer in run.model.pattern)]
            base = (has_lte or base.runs)[0]
        base = configs.override(base, FLAGS.set)
        found = sweep(base, Path(FLAGS.workdir), FLAGS.rules, _whole("windows"), _whole("seeds"), train)
        if found is None:
            sys.exit(INTERRUPTED)
        print(table(found))
        print(f"{FLAGS.workdir}/sweep.md, sweep.json, sweep.png")


if __name__ == "__main__":
    define_flags()
    app.run(main)
