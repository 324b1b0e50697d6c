"""What of an operation's arrays does each device of a mesh hold, and what does it receive from those before it?"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from jaxtyping import Array

from lte_jax import sharding
from pallas_kernels.window_attention import NEVER

SEQUENCE, TENSOR = "sequence", "tensor"

Arrays = dict[str, Any]
Axes = tuple[str | None, ...]

ROWS: Axes = ("batch", "length", "heads", None)
KEYS: Axes = ("batch", "length", "kv_heads", None)
SLOTS: Axes = ("batch", None, "kv_heads", None)


def current_mesh() -> AbstractMesh | None:
    """The mesh of several devices that is being traced for; None where there is none, or inside another shard_map."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or not set(sharding.AXES) <= set(mesh.axis_names):
        return None
    return None if any(kind == AxisType.Manual for kind in mesh.axis_types) else mesh


class Plan:
    """What of one call is split on a mesh.

    Args:
      rows: shape [B,T,H,_] of what has all heads. keys: [B,U,K,_].
      whole: tokens are not split.
      share_groups: the query heads of one KV head may lie on several devices.
    """

    def __init__(
        self,
        mesh: AbstractMesh,
        rows: tuple[int, ...],
        keys: tuple[int, ...],
        *,
        whole: bool = False,
        share_groups: bool = True,
    ):
        self.mesh = mesh
        self._heads, self._kv_heads = rows[2], keys[2]
        ways = mesh.shape[TENSOR]
        split = self._heads % ways == 0
        self._slice = split and self._kv_heads % ways != 0
        if self._slice and not (share_groups and ways % self._kv_heads == 0):
            split = self._slice = False
        self._names = {"batch": "batch", "heads": "heads" if split else None, "kv_heads": "kv_heads" if split else None}
        sequence = mesh.shape[SEQUENCE]
        self.shards = 1 if whole or rows[1] % sequence or rows[1] != keys[1] else sequence
        self._names["length"] = "length" if self.shards == sequence else None

    def _spec(self, axes: Axes, shape: tuple[int, ...]) -> PartitionSpec:
        return sharding.spec([self._names.get(axis or "") for axis in axes], shape, self.mesh, every=True)

    def run(self, local: Any, named: dict[str, tuple[Any, Axes]], out_axes: Any) -> Any:
        """``local`` of each device's share of the named arrays, given as (array or None, its axes)."""
        arrays = {name: x for name, (x, _) in named.items() if x is not None}
        specs = {name: self._spec(named[name][1][: x.ndim], x.shape) for name, x in arrays.items()}
        leaf = isinstance(out_axes[0], str)
        shapes = {"batch": arrays["q"].shape[0], "length": arrays["q"].shape[1], "heads": self._heads}

        def out(axes: Axes) -> PartitionSpec:
            return self._spec(axes, tuple(shapes.get(axis or "", 1) for axis in axes))

        out_specs = out(out_axes) if leaf else tuple(out(axes) for axes in out_axes)
        return jax.shard_map(local, mesh=self.mesh, in_specs=(specs,), out_specs=out_specs, check_vma=False)(arrays)

    def own_kv_heads(self, arrays: Arrays, names: tuple[str, ...] | None = None) -> Arrays:
        """The one KV head that this device's heads read, where each device holds them all."""
        if not self._slice:
            return arrays
        names = names or tuple(name for name in arrays if name not in ("q", "segments"))
        ways = self.mesh.shape[TENSOR]
        mine = jax.lax.axis_index(TENSOR) // (ways // self._kv_heads)
        return arrays | {name: jax.lax.dynamic_slice_in_dim(arrays[name], mine, 1, axis=2) for name in names}


def pad_front(x: Array, count: int) -> Array:
    return jnp.pad(x, ((0, 0), (count, 0)) + ((0, 0),) * (x.ndim - 2))


def from_before(x: Array, back: int, shards: int) -> Array:
    """What the device ``back`` places before this one on the sequence axis holds; zeros where there is none."""
    return jax.lax.ppermute(x, SEQUENCE, [(i, i + back) for i in range(shards - back)])


def with_past(arrays: Arrays, past: int) -> Arrays:
    """The arrays of keys with those of ``past`` devices before this one in front; devices not there are padding."""
    shards = jax.lax.axis_size(SEQUENCE)
    tokens = arrays["k"].shape[1]
    segments = arrays.get("segments")
    arrays = arrays | {"segments": jnp.ones(arrays["k"].shape[:2], jnp.int32) if segments is None else segments}
    joined = {
        name: jnp.concatenate([*(from_before(x, back, shards) for back in range(past, 0, -1)), x], axis=1)
        for name, x in arrays.items()
        if name in ("k", "v", "scores", "expiry", "segments")
    }
    if "expiry" in joined:
        expiry = joined["expiry"]  # counted from the row's first token, now from the first that is here
        start = (jax.lax.axis_index(SEQUENCE) - past) * tokens
        moves = (expiry > 0) & (expiry < NEVER)
        joined["expiry"] = jnp.where(moves, jnp.maximum(expiry - start, 0), expiry)
    return arrays | joined


def ends(segments: Array | None, batch: int) -> tuple[Array, Array]:
    """Numbers of the first and the last document among a shard's tokens, [B]; 0 where all are padding."""
    if segments is None:
        one = jnp.ones(batch, jnp.int32)
        return one, one
    real = segments != 0
    row = jnp.arange(batch)
    first = segments[row, jnp.argmax(real, axis=1)]
    last = segments[row, segments.shape[1] - 1 - jnp.argmax(real[:, ::-1], axis=1)]
    return first, last
