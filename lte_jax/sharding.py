"""Where does each dimension of each array live? One table maps logical axes to mesh axes; nothing else decides.

A dimension is split over its mesh axes if their size divides it, and is whole on every device otherwise (2 KV heads on
``tensor=4`` are replicated). A mesh axis is used once per array, by the first dimension that wants it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor", "sequence")

RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "length": ("sequence",),
    "embed": ("fsdp",),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "vocab": ("tensor",),
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices each axis has; their product is the number of devices.

    ``data`` splits the batch and copies the weights; ``fsdp`` splits both; ``tensor`` splits heads, inner widths and
    the vocabulary; ``sequence`` splits the tokens of a row.
    """

    data: int | None = None
    """None takes what the other axes leave."""
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1
    devices: int | None = None
    """How many devices the launch must have; None accepts what is there."""


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over ``devices`` (default: all).

    Raises:
      ValueError: the devices are not those that the config asks for.
    """
    found = list(jax.devices() if devices is None else devices)
    count = len(found)
    if config.devices is not None and config.devices != count:
        raise ValueError(
            f"mesh.devices={config.devices}, and this launch has {count} {found[0].platform} devices in "
            f"{jax.process_count()} processes: check the launcher (one process per GPU or per node, all started)"
        )
    others = config.fsdp * config.tensor * config.sequence
    if min(config.fsdp, config.tensor, config.sequence, config.data or 1) < 1:
        raise ValueError(f"{config}: every axis needs at least 1 device")
    if config.data is None and count % others:
        raise ValueError(f"fsdp x tensor x sequence = {others} does not divide the {count} devices: change an axis")
    data = count // others if config.data is None else config.data
    if data * others != count:
        raise ValueError(
            f"the mesh data={data} x fsdp={config.fsdp} x tensor={config.tensor} x sequence={config.sequence} has "
            f"{data * others} places for {count} devices: change an axis or the launch"
        )
    if jax.process_count() > 1 and jax.local_device_count() % (config.tensor * config.sequence):
        raise ValueError(
            f"tensor x sequence = {config.tensor * config.sequence} must divide the {jax.local_device_count()} devices "
            "of a process, so that each process loads its own rows: lower them"
        )
    shape = (data, config.fsdp, config.tensor, config.sequence)
    if devices is None:
        return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 4)
    return Mesh(np.array(found).reshape(shape), AXES, axis_types=(AxisType.Auto,) * 4)


def device_table(mesh: Mesh) -> str:
    """One line per process: its devices, and the mesh."""
    rows: dict[int, list[int]] = {}
    for device in mesh.devices.flat:
        rows.setdefault(device.process_index, []).append(device.id)
    kind = mesh.devices.flat[0].device_kind
    lines = [f"process {process}: {len(ids)} x {kind}, ids {ids}" for process, ids in sorted(rows.items())]
    return "\n".join([*lines, "mesh " + " x ".join(f"{name}={size}" for name, size in mesh.shape.items())])


def spec(
    axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh, every: bool = False
) -> PartitionSpec:
    """The partition of an array with the logical ``axes``; extra leading dimensions (stacked layers) are whole.

    Args:
      every: name the mesh axes of one device too, at the first dimension, so that no gradient is summed over them.

    Raises:
      ValueError: a logical axis that the table does not know.
    """
    names = (None,) * (len(shape) - len(axes)) + tuple(axes)
    used: set[str] = set()
    entries: list[Any] = []
    for name, size in zip(names, shape, strict=True):
        if name is not None and name not in RULES:
            raise ValueError(f"logical axis {name!r} is not in the table; it knows {', '.join(RULES)}")
        rule = RULES.get(name or "", ())
        wanted = tuple(axis for axis in rule if mesh.shape[axis] > 1 and axis not in used)
        if not wanted or size % math.prod(mesh.shape[axis] for axis in wanted):
            entries.append(None)
            continue
        used.update(wanted)
        entries.append(wanted if len(wanted) > 1 else wanted[0])
    if every:
        first = (entries[0],) if isinstance(entries[0], str) else entries[0] or ()
        entries[0] = (*first, *(axis for axis, count in mesh.shape.items() if count == 1)) or None
    return PartitionSpec(*entries)


def named(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """``spec`` on its mesh."""
    return NamedSharding(mesh, spec(axes, shape, mesh))


def on(mesh: Mesh) -> contextlib.AbstractContextManager[Any]:
    """Inside a function that is being compiled: what follows is for this mesh (``partition`` reads it)."""
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """Of a [B, T] array.

    Raises:
      ValueError: the mesh does not divide the batch or the length.
    """
    for name, size in zip(("batch", "length"), shape, strict=True):
        ways = math.prod(mesh.shape[axis] for axis in RULES[name])
        if size % ways:
            raise ValueError(f"{name} {size} is not a multiple of {' x '.join(RULES[name])} = {ways}: change one")
    return named(("batch", "length"), shape, mesh)


def rows_mesh(devices: int) -> Mesh | None:
    """The mesh for ``over_rows`` on the first ``devices`` of this process; None for one.

    Raises:
      ValueError: there are not so many.
    """
    if not 1 <= devices <= jax.local_device_count():
        raise ValueError(f"--devices={devices}: it must lie in [1, {jax.local_device_count()}], what is here")
    return None if devices == 1 else make_mesh(MeshConfig(), jax.local_devices()[:devices])


def by_rows(mesh: Mesh, before: int = 0) -> PartitionSpec:
    """Rows over all devices, each with whole weights; ``before`` dimensions come before that of the rows.

    Axes of one device are left out, as they are where a program leaves its results: it would compile anew for those.
    """
    axes = tuple(name for name, size in mesh.shape.items() if size > 1)
    return PartitionSpec(*(None,) * before, axes[0] if len(axes) == 1 else axes or None)


def over_rows(function: Any, mesh: Mesh | None, in_specs: Any, out_specs: Any) -> Any:
    """``function`` run by each device of a mesh on its own rows, kernels included; as it is without a mesh."""
    if mesh is None:
        return function
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def put(tree: Any, mesh: Mesh | None, specs: Any) -> Any:
    """Arrays where ``over_rows`` wants them (``specs`` is a prefix of the tree); as they are without a mesh."""
    if mesh is None:
        return tree
    is_spec = lambda leaf: isinstance(leaf, PartitionSpec)  # noqa: E731 - a PartitionSpec is a tuple, so a tree
    return jax.device_put(tree, jax.tree.map(lambda leaf: NamedSharding(mesh, leaf), specs, is_leaf=is_spec))


def local_shard(place: jax.sharding.Sharding, shape: tuple[int, ...]) -> tuple[int, int]:
    """(index, count): which piece of the global batch this process loads, the rows that its devices hold."""
    count = jax.process_count()
    rows = [index[0].start or 0 for index in place.addressable_devices_indices_map(shape).values() if index]
    return min(rows) // (shape[0] // count), count
