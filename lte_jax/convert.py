"""The authors' checkpoints: a Hugging Face folder to a model, and a model to such a folder.

Each weight of ours has one name in theirs, the same for reading and writing (``weight_names``). Linear weights are
stored transposed there ([out, in]), convolutions as [channels, 1, taps], and layers one by one where ours are stacked.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lte_jax import penalty_files
from lte_jax.hf_config import model_config_from_hf, model_config_to_hf
from lte_jax.mixers import lte
from lte_jax.model import LanguageModel
from lte_jax.model_config import ModelConfig
from lte_jax.penalty_files import SavedPenalty

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "added_tokens.json",
    "generation_config.json",
)

ParameterPath = tuple[Any, ...]
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class WeightReport:
    """How a folder's weights meet a model: all empty when they match."""

    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()

    @classmethod
    def compare(
        cls, expected: Mapping[str, Shape], found: Mapping[str, Shape], ignored: Collection[str] = ()
    ) -> WeightReport:
        """The report on shapes by name; ``ignored`` names are no extras."""
        return cls(
            missing=tuple(sorted(set(expected) - set(found))),
            extra=tuple(sorted(set(found) - set(expected) - set(ignored))),
            mismatched=tuple(
                f"{name} {list(found[name])} instead of {list(shape)}"
                for name, shape in sorted(expected.items())
                if name in found and tuple(found[name]) != tuple(shape)
            ),
        )

    def raise_if_any(self, where: str | Path, error: type[ValueError] = ValueError) -> None:
        """Raises ``error`` with the names, where anything does not match."""
        parts = [
            f"{title}: {', '.join(names[:8])}{f' and {len(names) - 8} more' if len(names) > 8 else ''}"
            for title, names in (("missing", self.missing), ("extra", self.extra), ("wrong shape", self.mismatched))
            if names
        ]
        if parts:
            raise error(
                f"{where}: the weights are not those of the model's settings; {'; '.join(parts)}; "
                "give settings and weights of one model"
            )


def from_pretrained(
    folder: str | os.PathLike[str],
    implementation: str | None = None,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    remat: str = "none",
) -> LanguageModel:
    """Reads a Hugging Face folder of the authors' code (one or several safetensors files).

    Args:
      folder: holds config.json and model.safetensors, or model.safetensors.index.json and its shards.
      implementation: of every operation; None picks the fastest measured.
      dtype, param_dtype: of the computation and of the stored weights.

    Raises:
      FileNotFoundError: a file is not there.
      ValueError: an unsupported config, a truncated file, missing, extra or misshapen weights (named).
    """
    folder = Path(folder)
    weights = _Weights(folder)
    config = read_config(folder, weights)
    model = abstract_model(config, implementation=implementation, dtype=dtype, param_dtype=param_dtype, remat=remat)
    check_weights(config, weights).raise_if_any(folder)
    graph, state = nnx.split(model)
    flat = dict(nnx.to_flat_state(state))
    for path, variable in flat.items():
        loaded = _read_parameter(path, variable.get_value(), config, weights)
        flat[path] = variable.replace(jnp.asarray(loaded, variable.get_value().dtype))
    return nnx.merge(graph, nnx.from_flat_state(flat))


def save_pretrained(
    model: LanguageModel,
    folder: str | os.PathLike[str],
    *,
    tokenizer_folder: str | os.PathLike[str] | None = None,
    penalty: SavedPenalty | None = None,
    max_shard_bytes: int = 5 * 2**30,
) -> None:
    """Writes a folder that the authors' code loads: config.json, safetensors, and the tokenizer's files.

    The folder appears whole or not at all.

    Args:
      tokenizer_folder: where to copy tokenizer files from.
      penalty: of an LTE model: schedule, weights and counts; default the published schedule and zeros.
      max_shard_bytes: weights beyond this size are split over several files with an index.

    Raises:
      FileExistsError: the folder exists and is not empty.
      ValueError: the authors' code has no such model.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; name a new folder")
    values = model_config_to_hf(model.config, None if penalty is None else penalty.schedule)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        (partial / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
        _write_shards(_authors_tensors(model, penalty), partial, max_shard_bytes)
        if tokenizer_folder is not None:
            copy_tokenizer(tokenizer_folder, partial)
        partial.chmod(0o755)
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def copy_tokenizer(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> list[str]:
    """Copies the tokenizer files that ``source`` holds, and returns their names."""
    names = [name for name in TOKENIZER_FILES if (Path(source) / name).is_file()]
    for name in names:
        shutil.copyfile(Path(source) / name, Path(target) / name)
    return names


def read_config(folder: str | os.PathLike[str], weights: _Weights | None = None) -> ModelConfig:
    """The model that the folder's config.json describes."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no config.json; name a Hugging Face folder")
    try:
        values = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    nsa_head_dim = None
    if values.get("model_type") == "nsa":
        weights = weights or _Weights(Path(folder))
        rows, heads = weights.shape("model.layers.0.attn.q_proj.weight")[0], values.get("num_heads", 64)
        nsa_head_dim = rows // heads
    return model_config_from_hf(values, nsa_head_dim)


def check_folder(folder: str | os.PathLike[str]) -> tuple[ModelConfig, WeightReport]:
    """The folder's model and how its weights meet it, reading the files' headers only."""
    weights = _Weights(Path(folder))
    config = read_config(folder, weights)
    return config, check_weights(config, weights)


def read_penalty(folder: str | os.PathLike[str]) -> SavedPenalty | None:
    """LTE's penalty as a folder holds it; None for other models, and where its weights file leaves it out.

    Raises:
      ValueError: arrays or settings that do not fit each other.
    """
    weights = _Weights(Path(folder))
    layers = read_config(folder, weights).layer_names().count("lte")
    if not layers or not {penalty_files.WEIGHTS, penalty_files.KEPT} <= weights.names:
        return None
    attn = json.loads((Path(folder) / "config.json").read_text())["attn"]
    tensors = {name: weights.read(name) for name in (penalty_files.WEIGHTS, penalty_files.KEPT)}
    return SavedPenalty.from_authors(attn, tensors, layers)


def abstract_model(config: ModelConfig, **kwargs: Any) -> LanguageModel:
    """The model with shapes in place of arrays."""
    return nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0), **kwargs))


def check_weights(config: ModelConfig, weights: _Weights) -> WeightReport:
    """Compares the names and shapes of a folder's weights with the model's."""
    expected: dict[str, Shape] = {}
    ignored = {penalty_files.WEIGHTS, penalty_files.KEPT, *(("lm_head.weight",) if config.tie_embeddings else ())}
    for path, variable in nnx.to_flat_state(nnx.split(abstract_model(config))[1]):
        shape = variable.get_value().shape
        for names in weight_names(path, config):
            # One tensor may stand under several names: any will do, and the others are no extras.
            chosen = next((name for name in names if name in weights.names), names[0])
            layer = np.broadcast_to(np.float32(0), shape[1:] if path[0] == "units" else shape)  # takes no memory
            expected[chosen] = to_authors(path, layer).shape
            ignored.update(names)
    return WeightReport.compare(expected, {name: weights.shape(name) for name in weights.names}, ignored)


def weight_names(path: ParameterPath, config: ModelConfig) -> list[tuple[str, ...]]:
    """The authors' names of one parameter: an entry per repeat for stacked ones, several names where they share one."""
    if path[0] == "units":
        position, tail = int(path[2]), path[3:]
        layers = range(position, config.num_layers, len(config.pattern))
        return [(f"model.layers.{layer}.{_authors_tail(tail)}",) for layer in layers]
    if path[0] == "router":  # one router for all LTE layers: their file repeats it, or keeps one copy
        routed = [index for index, name in enumerate(config.layer_names()) if name == "lte"]
        return [tuple(f"model.layers.{layer}.{_authors_tail(('mixer', *path))}" for layer in routed)]
    name = ".".join(str(part) for part in path)
    return [(name if path[0] == "lm_head" else f"model.{name}",)]


def _authors_tail(tail: ParameterPath) -> str:
    parts = [str(part) for part in tail]
    parts[0] = {"mixer": "attn", "mixer_norm": "attn_norm"}.get(parts[0], parts[0])
    if parts[-1].endswith("_conv"):
        parts[-1:] = [f"{parts[-1]}1d", "weight"]
    if parts[1] == "router":
        parts.insert(2, "conv_stack")
    return ".".join(parts)


def to_authors(path: ParameterPath, value: np.ndarray) -> np.ndarray:
    """One layer's parameter in the authors' layout."""
    kind = _kind(path)
    if kind == "linear":
        return value.T
    if kind == "short_convolution":  # [taps, D] -> [D, 1, taps]
        return value.T[:, None, :]
    if kind == "router_convolution":  # [K, taps, in, out] -> [K * out, in, 1, taps]
        heads, taps, inner, out = value.shape
        return value.transpose(0, 3, 2, 1).reshape(heads * out, inner, 1, taps)
    if kind == "router_projection":  # [K, in] -> [K, in, 1, 1]
        return value[:, :, None, None]
    if kind == "router_bias":  # [K, out] -> [K * out]
        return value.reshape(-1)
    return value


def from_authors(path: ParameterPath, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of ``to_authors`` for a parameter of ``shape``."""
    kind = _kind(path)
    if kind == "linear":
        return value.T
    if kind == "short_convolution":
        return value[:, 0, :].T
    if kind == "router_convolution":
        heads, taps, inner, out = shape
        return value.reshape(heads, out, inner, taps).transpose(0, 3, 2, 1)
    return value.reshape(shape)


def _kind(path: ParameterPath) -> str:
    names = [str(part) for part in path]
    if "router" in names:
        if names[-1] == "bias":
            return "router_bias"
        return "router_convolution" if "convs" in names else "router_projection"
    if names[-1].endswith("_conv"):
        return "short_convolution"
    if names[-1] == "weight" and (names[-2].endswith("_proj") or names[-2] == "lm_head"):
        return "linear"
    return "vector"


def _read_parameter(path: ParameterPath, abstract: Any, config: ModelConfig, weights: _Weights) -> np.ndarray:
    """One parameter, its layers stacked where the model stacks them."""
    names = [next(name for name in aliases if name in weights.names) for aliases in weight_names(path, config)]
    if path[0] != "units":
        return from_authors(path, weights.read(names[0]), abstract.shape)
    return np.stack([from_authors(path, weights.read(name), abstract.shape[1:]) for name in names])


def _authors_tensors(model: LanguageModel, penalty: SavedPenalty | None) -> Iterator[tuple[str, np.ndarray]]:
    config = model.config
    for path, variable in nnx.to_flat_state(nnx.split(model)[1]):
        value = np.asarray(jax.device_get(variable.get_value()), np.float32)
        names = weight_names(path, config)
        for index, aliases in enumerate(names):
            layer = value[index] if path[0] == "units" else value
            for alias in aliases:
                yield alias, np.ascontiguousarray(to_authors(path, layer))
    routed = [mixer for mixer in config.pattern if isinstance(mixer, lte.Config)]
    if routed:
        penalty = penalty or SavedPenalty.none(config.layer_names().count("lte"), routed[0].kv_heads)
        yield from penalty.to_authors().items()


def _write_shards(tensors: Iterator[tuple[str, np.ndarray]], folder: Path, max_shard_bytes: int) -> None:
    """Writes model.safetensors, or shards and their index; holds one shard in memory."""
    shards: list[dict[str, np.ndarray]] = [{}]
    size = 0
    total = 0
    for name, value in tensors:
        if size and size + value.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = value
        size += value.nbytes
        total += value.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        return
    index = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(shard, file))
    document = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(document, indent=2) + "\n")


class _Weights:
    """The tensors of a folder by name, read one at a time."""

    def __init__(self, folder: Path):
        index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
        if index.is_file():
            files = json.loads(index.read_text())["weight_map"]
        elif single.is_file():
            files = None
        else:
            raise FileNotFoundError(
                f"{folder} holds neither {single.name} nor {index.name}; name a Hugging Face folder"
            )
        self._files: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        if files is None:
            self._files = dict.fromkeys(self._handle(single).keys(), single)
        else:
            for name, file in files.items():
                if not (folder / file).is_file():
                    raise FileNotFoundError(f"{index} names {file}, which is not in {folder}")
                self._files[name] = folder / file
                if name not in set(self._handle(folder / file).keys()):
                    raise ValueError(f"{index} places {name} in {file}, which does not hold it")
        self.names = frozenset(self._files)

    def _handle(self, path: Path) -> Any:
        if path not in self._open:
            try:
                # flax: bfloat16 tensors come back as such, which numpy alone does not know
                self._open[path] = safe_open(path, framework="flax")
            except SafetensorError as error:
                raise ValueError(f"{path} is not a whole safetensors file ({error}); copy it again") from None
        return self._open[path]

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._files:
            raise ValueError(f"the weights hold no {name}")
        return tuple(self._handle(self._files[name]).get_slice(name).get_shape())

    def read(self, name: str) -> np.ndarray:
        return np.asarray(self._handle(self._files[name]).get_tensor(name))
