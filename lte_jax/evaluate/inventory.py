"""Which weights does a folder hold, do they fit its settings, and what memory does the model need?

Reads headers and metadata only, on any machine.
"""

from __future__ import annotations

import dataclasses
import math
import os

import jax
import jax.numpy as jnp
from flax import nnx

from lte_jax import restore
from lte_jax.convert import WeightReport, abstract_model, check_folder
from lte_jax.model_config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Inventory:
    """What a folder holds.

    Attributes:
      parameters: count. cache_bytes: of one sequence in bfloat16, by its length.
    """

    folder: str
    config: ModelConfig
    report: WeightReport
    parameters: int
    cache_bytes: dict[int, int]

    @property
    def matches(self) -> bool:
        return not (self.report.missing or self.report.extra or self.report.mismatched)


def inventory(folder: str | os.PathLike[str], step: int | None = None) -> Inventory:
    """Compares a folder's weights with its settings; raises as ``restore.load_model`` where neither can be read."""
    place = restore.find(folder)
    if place.checkpoints is None:
        config, report = check_folder(place.folder)
    else:
        config, report = restore.check_checkpoint(place, step)
    graph, state = nnx.split(abstract_model(config))
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state))

    def cache_bytes(length: int) -> int:
        cache = jax.eval_shape(lambda values: nnx.merge(graph, values).init_cache(1, length, jnp.bfloat16), state)
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))

    lengths = sorted({min(4096, config.max_length), config.max_length, 32768})
    return Inventory(str(folder), config, report, parameters, {length: cache_bytes(length) for length in lengths})


def describe(found: Inventory) -> str:
    """The inventory as text, one fact a line."""
    names = found.config.layer_names()
    layers = ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names))
    lines = [
        f"{found.folder}: {len(names)} layers ({layers}), width {found.config.width}, "
        f"vocabulary {found.config.vocab_size}",
        f"parameters: {found.parameters:,}",
    ]
    for title, entries in (
        ("missing", found.report.missing),
        ("extra", found.report.extra),
        ("wrong shape", found.report.mismatched),
    ):
        lines += [f"{title}: {entry}" for entry in entries]
    if found.matches:
        lines.append("weights: all match")
    lines += [
        f"memory of the weights: {_size(4 * found.parameters)} in float32, {_size(2 * found.parameters)} in bfloat16",
        f"memory to train (float32 weights, gradients, two moments): {_size(16 * found.parameters)}, and activations",
    ]
    lines += [
        f"memory of the cache of one sequence of {length} tokens in bfloat16: {_size(size)}"
        for length, size in found.cache_bytes.items()
    ]
    return "\n".join(lines)


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"
