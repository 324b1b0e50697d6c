"""One layer of each mixer on packed rows, and what its compiled step sends: the cases of every test of meshes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lte_jax import LTE, NSA, FullAttention, GatedDeltaNet, WindowAttention, sharding
from lte_jax.experiment import ExperimentConfig, step_config
from lte_jax.mixers import mixer_name
from lte_jax.sharding import MeshConfig, make_mesh
from lte_jax.step import Builder, ComputeConfig
from tests.system.tiny import DATA, ROUTER, tiny_experiment, tiny_model


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a case; two key/value heads."""

    rows: int
    length: int
    width: int
    head: int
    """Of attention's heads, width / head of them, and of the delta rule's two."""
    window: int
    nsa: NSA

    @property
    def mixers(self) -> dict[str, Any]:
        """By the name that pages and tests use."""
        heads: Any = dict(num_heads=self.width // self.head, num_kv_heads=2)
        lte = dict(window=self.window, budget=self.window - 1, sinks=1, dropout=0.0, **ROUTER)
        return {
            "lte": LTE(**heads, **lte),
            "window": WindowAttention(**heads, window=self.window),
            "full": FullAttention(**heads),
            "nsa": self.nsa,
            "gdn": GatedDeltaNet(num_heads=2, head_dim=self.head),
        }


SMALL = Sizes(
    rows=8,
    length=DATA.length,
    width=16,
    head=4,
    window=6,
    nsa=NSA(num_heads=4, num_kv_heads=2, head_dim=8, block_size=4, block_counts=3, window=6),
)
KERNELS = Sizes(
    rows=4,
    length=512,
    width=256,
    head=64,
    window=96,
    nsa=NSA(num_heads=32, num_kv_heads=2, head_dim=64, block_size=32, block_counts=4, window=96),
)
"""What the GPU's kernels take."""

MIXERS = SMALL.mixers


def config_of(mixer: Any, sizes: Sizes = SMALL, *before: Any, **compute: Any) -> ExperimentConfig:
    """A model of the layers ``before`` and one of ``mixer``."""
    model = dataclasses.replace(
        tiny_model(dropout=0.0), width=sizes.width, num_layers=1 + len(before), pattern=(*before, mixer)
    )
    return tiny_experiment(model=model, compute=ComputeConfig(**compute))


def packed_rows(batch: int = SMALL.rows, length: int = SMALL.length) -> np.ndarray:
    """Documents that begin and end inside shards, on their edges, and last for several; padding before and after."""
    cuts = np.random.default_rng(0).integers(1, length, (batch, 3))
    segments = 1 + np.sum(np.arange(length)[None, :, None] >= cuts[:, None, :], axis=2)
    segments[0], segments[1, :9], segments[2, -9:] = 1, 0, 0
    segments[3] = np.repeat([4, 5], length // 2)
    return segments.astype(np.int32)


def batch_of(sizes: Sizes) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    ids = rng.integers(0, DATA.vocab_size, (sizes.rows, sizes.length)).astype(np.int32)
    segments = packed_rows(sizes.rows, sizes.length)
    labels = np.where((segments > 0) & (rng.random(segments.shape) < 0.7), np.roll(ids, -1, 1), -1).astype(np.int32)
    return {"input_ids": ids, "labels": labels, "segment_ids": segments}


def loss_and_gradients(
    config: ExperimentConfig, mesh_config: MeshConfig, devices: Any, sizes: Sizes = SMALL
) -> tuple[tuple[Any, dict[str, Any]], Any, str]:
    """Loss and gradients of packed rows, the state, and the compiled program's text."""
    mesh = make_mesh(mesh_config, devices)
    builder = Builder(step_config(config, sizes.length), mesh)
    arrays = {name: jax.device_put(x, sharding.batch_sharding(x.shape, mesh)) for name, x in batch_of(sizes).items()}
    state = builder.init_state()
    for name, leaf in state.params.items():
        assert leaf.sharding == builder.param_shapes[name].sharding, name

    def compute(state: Any, arrays: Any) -> Any:
        gradients, metrics = builder._gradients(state, arrays, jnp.int32(1), None)
        return metrics["loss"], gradients

    compiled = jax.jit(compute).lower(state, arrays).compile()
    return jax.device_get(compiled(state, arrays)), state, compiled.as_text()


def collectives(text: str) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """(kind, shape, where in the program) of each one that moves arrays whole: all but sums."""
    pattern = r"= (.*?) (all-gather|all-to-all|collective-permute)(?:-start)?\(.*?op_name=\"([^\"]*)"
    for line in text.splitlines():
        for shapes, kind, where in re.findall(pattern, line):
            for shape in re.findall(r"\w+\[([\d,]*)\]", shapes):
                yield kind, tuple(int(size) for size in shape.split(",") if size), where


def check_collectives(text: str, mesh: MeshConfig, mixer: Any, sizes: Sizes = SMALL) -> None:
    """Each one that is not of a weight is the attention's keys, a halo, or a delta-rule state: never of q or x.

    Raises:
      AssertionError: one is not.
    """
    tokens = sizes.length // mesh.sequence
    delta = mixer_name(mixer) == "gated_deltanet"
    heads, kv_heads = mixer.num_heads, mixer.num_heads if delta else mixer.num_kv_heads
    size = getattr(mixer, "head_dim", None) or sizes.width // heads
    mine = heads // mesh.tensor
    for kind, shape, where in collectives(text):
        found = (kind, shape, where)
        if kind == "all-gather" and mesh.sequence > 1 and "shard_map/all_gather" in where:
            assert len(shape) == 2 or tokens not in shape[2:3], found  # states, document numbers
        elif "shard_map/ppermute" in where or kind == "collective-permute":
            if delta:
                assert len(shape) < 3 or shape[1] < tokens, found  # the last taps of the convolution
                continue
            # Where a device has one query head and its one KV head (tensor=4), k has the shape of q: nothing is said.
            alike = mine == max(1, kv_heads // mesh.tensor)
            rows_of_q = len(shape) == 4 and shape[2:] == (mine, size) and not alike
            assert not (rows_of_q and shape[1] >= tokens), found
        elif len(shape) >= 3 and (sizes.length in shape[:2] or shape[1] == tokens):
            # The best token over a split vocabulary; and fewer KV heads than devices of the tensor axis are whole on
            # each: k and v, half as wide as all of q.
            best = shape[2:] == (mesh.tensor,)
            few = kv_heads % mesh.tensor and np.prod(shape[2:]) <= kv_heads * size
            assert best or few, found
