"""How does a folder become a model: one of the authors' format, or a training run's checkpoints?

A run's folder holds ``config.json``, ``checkpoints/<step>/{params, meta, ...}`` and ``tokenizer/``; ``params`` is one
dictionary of arrays by path, and ``meta`` carries the settings, the model's under ``config.model``. Only these two are
read here, onto one device, whatever mesh wrote them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.typing import DTypeLike

from lte_jax import configs, damage
from lte_jax.checkpoint import CheckpointError, Checkpoints, DamagedError
from lte_jax.checksums import checksums
from lte_jax.convert import WeightReport, abstract_model, from_pretrained, read_penalty
from lte_jax.data.tokenizer import ByteTokenizer, Tokenizer, check_fits, load_tokenizer
from lte_jax.model import LanguageModel
from lte_jax.model_config import ModelConfig
from lte_jax.penalty_files import SavedPenalty
from lte_jax.retention import PenaltyConfig
from lte_jax.whole_files import write_json

CONFIG, CHECKPOINTS, TOKENIZER = "config.json", "checkpoints", "tokenizer"
PARAMS, TRAINING = "params", "training"


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a model lies.

    Attributes:
      folder: of the authors' format, or the run's.
      checkpoints: the folder of steps; None for the authors' format.
      step: the step that the caller's path named; None where it named none.
    """

    folder: Path
    checkpoints: Path | None = None
    step: int | None = None


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What a folder gave.

    Attributes:
      tokenizer: the Tokenizer asked for, else the one that travels with the model, else (if none is needed) None.
      step: whose weights these are; None for a Hugging Face folder.
    """

    model: LanguageModel
    tokenizer: Any
    step: int | None


def load_model(
    folder: str | os.PathLike[str],
    *,
    implementation: str | None = None,
    dtype: DTypeLike = jnp.float32,
    step: int | None = None,
) -> tuple[LanguageModel, Tokenizer | None]:
    """The model in a folder, and the tokenizer that travels with it; arguments and errors are those of ``load``."""
    loaded = load(folder, implementation=implementation, dtype=dtype, step=step)
    return loaded.model, loaded.tokenizer


def load(
    folder: str | os.PathLike[str],
    *,
    tokenizer: str | None = None,
    needs_tokenizer: bool = False,
    implementation: str | None = None,
    dtype: DTypeLike = jnp.float32,
    step: int | None = None,
) -> Loaded:
    """The model in a folder, its tokenizer, and its step.

    Args:
      folder: a Hugging Face folder of the authors' format, a run's folder, its ``checkpoints``, or one step of these.
      tokenizer: "bytes", a file or a folder, in place of the one that travels with the model.
      needs_tokenizer: whether none is an error.
      implementation: of every operation; None picks the fastest measured.
      dtype: of the computation; the weights keep theirs.
      step: which checkpoint; None takes the newest that is whole.

    Raises:
      FileNotFoundError: there is no such folder, or no model in it.
      ValueError: weights that are not those of the settings (named), a tokenizer with more ids than the model or none
        where one is needed, a ``step`` for a folder without steps.
      CheckpointError: no step can be used.
    """
    place = find(folder)
    found = find_tokenizer(place) if tokenizer is None else load_tokenizer(tokenizer)
    if found is None and needs_tokenizer:
        raise ValueError(f"{folder} holds no tokenizer: name one with --tokenizer ('bytes', a file or a folder)")
    if place.checkpoints is None:
        if step is not None:
            raise ValueError(f"step={step}: {place.folder} is a Hugging Face folder, which has no steps; leave it out")
        model, taken = from_pretrained(place.folder, implementation, dtype=dtype), None
    else:
        if place.step is not None and step not in (None, place.step):
            raise ValueError(f"step={step}: the path names step {place.step}; give one of the two")
        taken, meta, params = _restore(place.checkpoints, place.step if step is None else step)
        config = _model_config(meta.get("config", {}), place)
        model = _fill(config, params, place.checkpoints, implementation=implementation, dtype=dtype)
    if found is not None:
        check_fits(found, model.config.vocab_size)
    return Loaded(model, found, taken)


def save_model(
    model: LanguageModel,
    folder: str | os.PathLike[str],
    *,
    tokenizer: Tokenizer | None = None,
    penalty: SavedPenalty | None = None,
    name: str = "converted",
) -> None:
    """Writes step 0 of a new run's folder, which ``load_model`` and training's ``--init_from`` read.

    Args:
      penalty: kept beside the weights for ``load_penalty``; training that starts from the weights begins its own.

    Raises:
      FileExistsError: the folder exists and is not empty.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not empty; name a new folder")
    if tokenizer is not None:
        check_fits(tokenizer, model.config.vocab_size)
        tokenizer.save(folder / TOKENIZER)
    settings = {"name": name, "model": model.config.to_dict(), "compute": {"dtype": model.dtype.name}}
    params = {"/".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.split(model)[1])}
    items: dict[str, Any] = {PARAMS: params}
    if penalty is not None:
        settings["penalty"] = configs.to_dict(penalty.schedule)
        items[TRAINING] = {"penalty": {"weights": jnp.asarray(penalty.weights), "kept": jnp.asarray(penalty.kept)}}
    checkpoints = Checkpoints(folder / CHECKPOINTS, asynchronous=False)
    checkpoints.save(0, items, {"config": settings})
    checkpoints.close()
    write_json(folder / CONFIG, settings)


def load_penalty(folder: str | os.PathLike[str], step: int | None = None) -> SavedPenalty | None:
    """LTE's penalty as a folder of either format holds it; None where there is none. Arguments as for ``load_model``.

    Raises:
      CheckpointError: it is damaged.
    """
    place = find(folder)
    if place.checkpoints is None:
        return read_penalty(place.folder)
    settings, chosen = _read_settings(place, step)
    path = place.checkpoints / str(chosen)
    if "penalty" not in settings or not (path / TRAINING).is_dir():
        return None
    saved = _saved_shapes(path, TRAINING).get("penalty")
    if not saved:
        return None
    wanted = {"penalty": {name: saved[name] for name in ("weights", "kept")}}
    options: dict[str, Any] = dict(restore_args=ocp.checkpoint_utils.construct_restore_args(wanted))
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        arguments = ocp.args.PyTreeRestore(wanted, partial_restore=True, **options)
        found = checkpointer.restore((path / TRAINING).absolute(), args=arguments)
    with contextlib.closing(Checkpoints(place.checkpoints, read_only=True)) as checkpoints:
        expected = checkpoints.read_meta(chosen)["checksums"][TRAINING]
    if any(expected.get(name) != value for name, value in checksums(found).items()):
        raise CheckpointError(f"{path}: the checksum of the penalty is wrong; take another step")
    schedule = configs.from_dict(PenaltyConfig, settings["penalty"], "penalty")
    return SavedPenalty(schedule, *(np.asarray(found["penalty"][name]) for name in ("weights", "kept")))


def find(folder: str | os.PathLike[str]) -> Place:
    """What a folder is.

    Raises:
      FileNotFoundError: it is not there, or holds no model.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; name a Hugging Face folder or a training run's")
    if (folder / CHECKPOINTS).is_dir():
        return Place(folder, folder / CHECKPOINTS)
    if folder.name.isdigit() and (folder / PARAMS).is_dir():
        return Place(_run_folder(folder.parent), folder.parent, int(folder.name))
    if any(path.name.isdigit() and path.is_dir() for path in folder.iterdir()):
        return Place(_run_folder(folder), folder)
    if (folder / CONFIG).is_file():
        return Place(folder)
    raise FileNotFoundError(
        f"{folder} holds neither config.json (a Hugging Face folder) nor {CHECKPOINTS}/ (a training run); name one of "
        "these"
    )


def find_tokenizer(place: Place) -> Tokenizer | None:
    """The tokenizer that lies with a model, if one does."""
    if place.checkpoints is not None:
        folder = place.folder / TOKENIZER
        return load_tokenizer(folder) if folder.is_dir() else None
    if (place.folder / "tokenizer.json").is_file() or _is_byte_level(place.folder / "tokenizer_config.json"):
        return load_tokenizer(place.folder)
    return None


def _is_byte_level(path: Path) -> bool:
    return path.is_file() and json.loads(path.read_text()).get("tokenizer_class") == ByteTokenizer.__name__


def read_settings(place: Place, step: int | None = None) -> dict[str, Any]:
    """The settings of the run that wrote a checkpoint; {} for the authors' format."""
    return {} if place.checkpoints is None else _read_settings(place, step)[0]


def check_checkpoint(place: Place, step: int | None = None) -> tuple[ModelConfig, WeightReport]:
    """The model of a step (default the newest) and how its parameters meet it, reading metadata only."""
    settings, chosen = _read_settings(place, step)
    config = _model_config(settings, place)
    assert place.checkpoints is not None
    return config, _compare(config, _by_path(_saved_shapes(place.checkpoints / str(chosen))))


def _run_folder(checkpoints: Path) -> Path:
    return checkpoints.parent if checkpoints.name == CHECKPOINTS else checkpoints


def _read_settings(place: Place, step: int | None) -> tuple[dict[str, Any], int]:
    """The settings saved with a step, and its number; without a step, the newest's."""
    assert place.checkpoints is not None
    with contextlib.closing(Checkpoints(place.checkpoints, read_only=True)) as checkpoints:
        chosen = place.step if step is None else step
        known = checkpoints.steps()
        if not known or (chosen is not None and chosen not in known):
            raise CheckpointError(_no_step(place.checkpoints, chosen, known))
        chosen = known[-1] if chosen is None else chosen
        return checkpoints.read_meta(chosen).get("config", {}), chosen


def _model_config(settings: Mapping[str, Any], where: Place) -> ModelConfig:
    if "model" not in settings:
        raise CheckpointError(f"{where.checkpoints}: its settings name no model (config.model); it is no run of ours")
    return ModelConfig.from_dict(settings["model"])


def _no_step(folder: Path, step: int | None, known: list[int]) -> str:
    if step is None:
        return f"{folder}: no checkpoint there"
    return f"{folder}: no step {step}; there are {', '.join(map(str, known)) or 'none'}"


def _restore(folder: Path, step: int | None) -> tuple[int, dict[str, Any], dict[str, jax.Array]]:
    """``step``, or the newest step that is whole, with its meta and its parameters by path."""
    with contextlib.closing(Checkpoints(folder, read_only=True)) as checkpoints:
        known = checkpoints.steps()
        if not known or step not in (None, *known):
            raise CheckpointError(_no_step(folder, step, known))
        found = checkpoints.restore(lambda number: {PARAMS: _saved_shapes(folder / str(number))}, step)
    assert found is not None  # as there is a step
    return found.step, found.meta, _by_path(found.items[PARAMS])


def _saved_shapes(step: Path, item: str = PARAMS) -> Any:
    """An item's tree as it was saved, to be restored onto this process's first device."""
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    try:
        # Not through a checkpointer, which makes None of every error.
        saved = ocp.StandardCheckpointHandler().metadata((step / item).absolute()).tree
    except Exception as error:
        kind = CheckpointError if damage.proof(error) is None else DamagedError
        raise kind(f"{step}: {item} cannot be read ({damage.first_line(error)})") from error
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), saved)


def _by_path(tree: Any) -> dict[str, jax.Array]:
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def _fill(config: ModelConfig, params: dict[str, jax.Array], where: Path, **types: Any) -> LanguageModel:
    """The model of ``config`` with these parameters."""
    _compare(config, params).raise_if_any(where)
    graph, state = nnx.split(abstract_model(config, **types))
    filled = {path: variable.replace(params["/".join(map(str, path))]) for path, variable in nnx.to_flat_state(state)}
    return nnx.merge(graph, nnx.from_flat_state(filled))


def _compare(config: ModelConfig, params: Mapping[str, Any]) -> WeightReport:
    """How parameters by path (arrays, or their shapes) meet a model."""
    state = nnx.split(abstract_model(config))[1]
    expected = {"/".join(map(str, path)): variable.get_value().shape for path, variable in nnx.to_flat_state(state)}
    return WeightReport.compare(expected, {name: leaf.shape for name, leaf in params.items()})
