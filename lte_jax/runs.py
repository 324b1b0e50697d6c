"""What does the folder of a run hold, and may this run use it?

    config.json       the resolved settings
    metrics.jsonl     one record per logged step, per evaluation, and per change of a setting
    tokenizer/        the data's tokenizer, where it has one
    checkpoints/<step>
    *.png             pictures
    .lock             held by process 0 of the launch that is at work here

A folder belongs to one run: another config, or files of something else, are refused and never overwritten. A setting of
the optimiser, or where the data lie, may change when that is stated.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np

from lte_jax import configs, folder_lock, restore
from lte_jax.agreement import exchange
from lte_jax.convert import WeightReport
from lte_jax.data.tokenizer import load_tokenizer
from lte_jax.folder_lock import LOCK
from lte_jax.metrics import read_metrics
from lte_jax.model_config import ModelConfig
from lte_jax.optim import OptimizerConfig
from lte_jax.restore import CHECKPOINTS, CONFIG, TOKENIZER
from lte_jax.retention import PenaltyConfig
from lte_jax.sharding import MeshConfig, make_mesh
from lte_jax.step import Builder, ComputeConfig, Params, StepConfig
from lte_jax.whole_files import partial_of, write_json

FREE = (
    *("mesh", "accumulation", "checkpoint", "evaluation", "reading", "spikes", "optimizer.max_skipped"),
    *("compute.remat", "compute.implementation", "compute.layers", "compute.chunk_tokens", "log_every", "name"),
)
"""Settings that a run may change when it continues: they do not change what it learns, up to rounding, the draws of
dropout (``accumulation``), rows left out because they cannot be read (``reading.bad_rows``) and what becomes of loss
spikes (``spikes``)."""

STATED = ("optimizer", "data.path", "data.tokenizer")
"""Settings that a run may change besides where the change is stated (``--allow_change``); its metrics keep the step."""


class RunError(ValueError):
    """A folder that this run may not use."""


def claim(workdir: str | Path, config: dict[str, Any], stated: Sequence[str] = ()) -> tuple[Path, IO[str] | None]:
    """Makes the folder, or takes up the run that it holds if that has the same settings.

    Args:
      stated: names of settings that may differ although they are not ``FREE``.

    Returns:
      The folder, and on process 0 the lock on it, which lasts until it is closed or the process ends.

    Raises:
      RunError: on every process, where the folder holds another run (the differing settings are named) or something
        else, or another launch is at work in it.
    """
    folder = Path(workdir).absolute()
    lock = _on_process_0(lambda: _take(folder, config, stated))
    if jax.process_count() > 1:
        check_same(read_config(folder), config, str(folder), stated)
    return folder, lock


def check_free(workdir: str | Path, config: dict[str, Any], stated: Sequence[str] = ()) -> None:
    """Raises RunError, on every process, where ``claim`` would because of what the folder holds; writes nothing."""
    _on_process_0(lambda: _check_contents(Path(workdir).absolute(), config, stated))


def _on_process_0[T](do: Callable[[], T]) -> T | None:
    """What ``do`` returns there, None on the others; where it cannot be done, every process raises."""
    done, failure = None, None
    if jax.process_index() == 0:
        try:
            done = do()
        except (ValueError, OSError) as error:
            failure = error
    answer = exchange("done" if failure is None else str(failure))[0]
    if failure is not None:
        raise failure
    if answer != "done":
        raise RunError(answer)
    return done


def _check_contents(folder: Path, config: dict[str, Any], stated: Sequence[str]) -> None:
    if (folder / CONFIG).is_file():
        check_same(read_config(folder), config, str(folder), stated)
    elif folder.exists() and not {path.name for path in folder.iterdir()} <= {LOCK, partial_of(folder / CONFIG).name}:
        raise RunError(f"{folder} is not empty and holds no {CONFIG} of a run: name another --workdir")


def _take(folder: Path, config: dict[str, Any], stated: Sequence[str]) -> IO[str]:
    _check_contents(folder, config, stated)
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder_lock.take(folder, "--workdir", RunError)
    try:
        _check_contents(folder, config, stated)  # again, now that no other launch changes them
        write_json(folder / CONFIG, config)
    except BaseException:
        lock.close()
        raise
    return lock


def read_config(workdir: str | Path) -> dict[str, Any]:
    """The settings saved with a run."""
    path = Path(workdir) / CONFIG
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise RunError(f"{workdir} holds no {CONFIG}: it is not the folder of a run") from None
    except ValueError as error:
        raise RunError(f"{path} is damaged: {error}") from error


def changes(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings that differ and are not ``FREE``: name -> (old, new)."""
    return {key: values for key, values in configs.differences(old, new).items() if not _under(key, FREE)}


def _under(key: str, names: Sequence[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def check_stated(names: Sequence[str]) -> None:
    """Raises RunError unless all are settings that a run may change when it says so."""
    wrong = next((name for name in names if not _under(name, STATED)), None)
    if wrong is not None:
        raise RunError(
            f"--allow_change={wrong}: a run may change only settings of {', '.join(STATED)}, such as "
            "optimizer.learning_rate; name another --workdir for other settings"
        )


def check_same(old: dict[str, Any], new: dict[str, Any], where: str, stated: Sequence[str] = ()) -> None:
    """Raises RunError, naming them, where settings differ that must not."""
    found = {key: values for key, values in changes(old, new).items() if not _under(key, stated)}
    if found:
        named = ", ".join(f"{key} {before!r} -> {after!r}" for key, (before, after) in list(found.items())[:6])
        more = f" and {len(found) - 6} more" if len(found) > 6 else ""
        raise RunError(f"{where} holds another run; differing: {named}{more}. Name another --workdir{_way_on(found)}")


def _way_on(found: dict[str, Any]) -> str:
    if not all(_under(key, STATED) for key in found):
        return ", or give these settings as they were"  # a default of the code may have changed since
    return f", or go on with the change from here: {' '.join(f'--allow_change={key}' for key in found)}"


def changed_before(folder: Path) -> list[str]:
    """The settings that this run has changed, as its metrics say."""
    return [name for record in read_metrics(folder) for name in record.get("changed", ())]


def save_tokenizer(folder: Path, data: Any) -> None:
    """Copies the data's tokenizer, where it has one, so that it travels with the checkpoints.

    Raises:
      RunError: on every process, where the checkpoints there were trained on the ids of another one.
    """
    name, kept = getattr(data, "tokenizer", None), folder / TOKENIZER
    if name is None:
        return

    def copy() -> None:
        found = load_tokenizer(name)
        begun = any(path.name.isdigit() for path in (folder / CHECKPOINTS).glob("*"))
        if begun and kept.is_dir() and load_tokenizer(kept).fingerprint() != found.fingerprint():
            raise RunError(
                f"tokenizer {name!r} gives other ids than {kept}, with which this run began: give data of that one, "
                "or name another --workdir"
            )
        found.save(kept)

    _on_process_0(copy)


def of_other_tokenizer(source: str | Path, data: Any) -> str:
    """What to say where weights to start from know the ids of another tokenizer than the data's; "" otherwise."""
    name, known = getattr(data, "tokenizer", None), restore.find_tokenizer(restore.find(source))
    if name is None or known is None or load_tokenizer(name).fingerprint() == known.fingerprint():
        return ""
    return f"; WARNING: they know the ids of {known.name}, and the data are of tokenizer {name}, which gives others"


def single_device_builder(model: ModelConfig, compute: ComputeConfig | None = None) -> Builder:
    """A builder for using a model: the settings of training do not matter."""
    config = StepConfig(
        model, OptimizerConfig(), PenaltyConfig(), compute or ComputeConfig(), steps=1, accumulation=1, seed=0, length=1
    )
    return Builder(config, make_mesh(MeshConfig(), jax.devices()[:1]))


def initial_params(source: str | Path, builder: Builder) -> Params:
    """Weights to start from: of a run's newest checkpoint, of the one that is named (``run/checkpoints/500``) or of the
    authors' folder; windows, budgets may differ.

    Raises:
      RunError: there are none, or they do not fit the model (names and shapes are given).
    """
    try:
        model, _ = restore.load_model(source)
    except FileNotFoundError as error:
        raise RunError(f"--init_from: {error}") from error
    found = builder.params_of(model)
    expected, shapes = ({name: leaf.shape for name, leaf in tree.items()} for tree in (builder.param_shapes, found))
    WeightReport.compare(expected, shapes).raise_if_any(f"--init_from={source}", RunError)
    return {name: np.asarray(jnp.asarray(leaf, builder.param_shapes[name].dtype)) for name, leaf in found.items()}
