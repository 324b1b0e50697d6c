"""What does the folder of a run hold, and may this run use it?

    config.json       the resolved settings
    metrics.jsonl     one record per logged step
    tokenizer/        the data's tokenizer, where it has one
    checkpoints/<step>
    *.png             pictures

A folder belongs to one run: another config, or files of something else, are refused and never overwritten.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from lte_jax import configs, restore
from lte_jax.convert import WeightReport
from lte_jax.data.tokenizer import load_tokenizer
from lte_jax.model_config import ModelConfig
from lte_jax.optim import OptimizerConfig
from lte_jax.restore import CONFIG, TOKENIZER
from lte_jax.retention import PenaltyConfig
from lte_jax.sharding import MeshConfig, make_mesh
from lte_jax.step import Builder, ComputeConfig, Params, StepConfig

FREE = (
    *("mesh", "accumulation", "checkpoint", "evaluation", "reading"),
    *("compute.remat", "compute.implementation", "log_every", "name"),
)
"""Settings that a run may change when it continues: they do not change what it learns, up to rounding, the draws of
dropout (``accumulation``) and rows left out because they cannot be read (``reading.bad_rows``)."""


class RunError(ValueError):
    """A folder that this run may not use."""


def claim(workdir: str | Path, config: dict[str, Any]) -> Path:
    """Makes the folder, or takes up the run that it holds if that has the same settings.

    Raises:
      RunError: it holds another run (the differing settings are named) or something else.
    """
    folder = Path(workdir).absolute()
    if jax.process_index() == 0:
        if (folder / CONFIG).is_file():
            check_same(read_config(folder), config, str(folder))
        elif folder.exists() and any(folder.iterdir()):
            raise RunError(f"{folder} is not empty and holds no {CONFIG} of a run: name another --workdir")
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{CONFIG}-{os.getpid()}"
        partial.write_text(json.dumps(config, indent=2) + "\n")
        partial.replace(folder / CONFIG)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("workdir")
        check_same(read_config(folder), config, str(folder))
    return folder


def read_config(workdir: str | Path) -> dict[str, Any]:
    """The settings saved with a run."""
    path = Path(workdir) / CONFIG
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise RunError(f"{workdir} holds no {CONFIG}: it is not the folder of a run") from None
    except ValueError as error:
        raise RunError(f"{path} is damaged: {error}") from error


def check_same(old: dict[str, Any], new: dict[str, Any], where: str) -> None:
    """Raises RunError, naming them, where settings differ that must not."""
    found = {
        key: values
        for key, values in configs.differences(old, new).items()
        if not any(key == free or key.startswith(free + ".") for free in FREE)
    }
    if found:
        named = ", ".join(f"{key} {before!r} -> {after!r}" for key, (before, after) in list(found.items())[:6])
        more = f" and {len(found) - 6} more" if len(found) > 6 else ""
        raise RunError(f"{where} holds another run; differing: {named}{more}. Name another --workdir")


def save_tokenizer(folder: Path, data: Any) -> None:
    """Copies the data's tokenizer, where it has one, so that it travels with the checkpoints."""
    name = getattr(data, "tokenizer", None)
    if name is not None and jax.process_index() == 0:
        load_tokenizer(name).save(folder / TOKENIZER)


def single_device_builder(model: ModelConfig, compute: ComputeConfig | None = None) -> Builder:
    """A builder for using a model: the settings of training do not matter."""
    config = StepConfig(
        model, OptimizerConfig(), PenaltyConfig(), compute or ComputeConfig(), steps=1, accumulation=1, seed=0, length=1
    )
    return Builder(config, make_mesh(MeshConfig(), jax.devices()[:1]))


def initial_params(source: str | Path, builder: Builder) -> Params:
    """Weights to start from: of a run's newest checkpoint or of the authors' folder; windows, budgets may differ.

    Raises:
      RunError: the weights do not fit the model (names and shapes are given).
    """
    path = Path(source)
    if not (path / CONFIG).is_file():
        raise RunError(
            f"--init_from={source}: neither the folder of a run nor a Hugging Face folder ({CONFIG} missing)"
        )
    model, _ = restore.load_model(path)
    found = builder.params_of(model)
    expected, shapes = ({name: leaf.shape for name, leaf in tree.items()} for tree in (builder.param_shapes, found))
    WeightReport.compare(expected, shapes).raise_if_any(f"--init_from={source}", RunError)
    return {name: np.asarray(jnp.asarray(leaf, builder.param_shapes[name].dtype)) for name, leaf in found.items()}
