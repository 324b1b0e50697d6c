"""How a run survives: Orbax checkpoints of everything, proved whole when they are read, and kept until a better one is.

A step is a folder ``<folder>/<step>`` with one item per tree of arrays and ``meta``, JSON with the step, whatever the
caller gives (settings, data position), and a checksum of every array. Orbax renames a step into place when it is
complete, so that a kill leaves at most a temporary folder. What Orbax does not notice is noticed here: a flipped bit
(checksums), an empty or truncated step (skipped, said loudly), a save that failed in the background (``poll``).

    checksum(x) = sum_i bits(x_i) (hash(i) | 1)  mod 2^32,   i the row-major index

It is computed on the devices, does not depend on how x is laid out over them, and every weight is odd, so that a change
of one element always changes it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

META = "meta"

Items = Mapping[str, Any]


class CheckpointError(RuntimeError):
    """A save that failed, or no checkpoint that can be used: one line with the folder, the step and the cause."""


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and which stay."""

    every: int = 1000
    """Steps between saves; the last step is always saved."""
    keep: int = 3
    """The newest so many stay, and besides them the best by held-out loss."""
    asynchronous: bool = True
    """Write behind the training steps."""

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep < 1:
            raise ValueError(f"checkpoint.every {self.every}, keep {self.keep}: both must be at least 1")


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint that passed every check."""

    step: int
    items: dict[str, Any]
    meta: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run.

    Args:
      folder: made if it is not there.
      keep: how many of the newest stay; the one with the lowest ``metric`` stays besides.
      asynchronous: whether ``save`` returns before the files are written.
      read_only: neither makes nor renames anything.
    """

    def __init__(self, folder: str | Path, *, keep: int = 3, asynchronous: bool = True, read_only: bool = False):
        self.folder = Path(folder).absolute()
        self._keep, self._read_only = keep, read_only
        self._pending: int | None = None
        self._failure: BaseException | None = None
        if read_only and not self.folder.is_dir():
            raise CheckpointError(f"{self.folder}: no checkpoints there")
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                create=not read_only,
                read_only=read_only,
                enable_async_checkpointing=asynchronous and not read_only,
                step_name_format=ocp.path.step.standard_name_format(),
            ),
            handler_registry=self._handlers(),
        )

    def _handlers(self) -> Any:
        def note(error: BaseException) -> None:
            self._failure = error

        arrays, values = _Watched(note), ocp.JsonCheckpointHandler()
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        for kind, handler in (("Standard", arrays), ("Json", values)):
            for action in ("Save", "Restore"):
                registry.add(None, getattr(ocp.args, kind + action), handler)
        return registry

    def steps(self) -> list[int]:
        """Steps that look complete, oldest first; ``restore`` proves it."""
        if not self.folder.is_dir():
            return []
        numbers = [int(path.name) for path in self.folder.iterdir() if path.name.isdigit() and path.is_dir()]
        return sorted(step for step in numbers if self._damage(step) is None)

    def save(self, step: int, items: Items, meta: Mapping[str, Any], metric: float | None = None) -> None:
        """Writes ``items``, trees of arrays, and ``meta``; arrays may be donated as soon as this returns.

        Raises:
          CheckpointError: this save, or an earlier one that has ended since the last ``poll``, failed.
        """
        self.wait()
        sums = {name: checksums(tree) for name, tree in items.items()}
        record = {**meta, "step": step, "metric": metric, "checksums": sums}
        record["digest"] = _digest(record)
        arguments = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        try:
            self._manager.save(
                step, args=ocp.args.Composite(**arguments, **{META: ocp.args.JsonSave(record)}), force=True
            )
        except Exception as error:
            raise self._failed(step, error) from error
        self._pending = step
        self.poll()

    def poll(self) -> int | None:
        """The step that has become safe since the last call, if any; older ones that need not stay are then deleted.

        Raises:
          CheckpointError: the save in the background failed.
        """
        if self._pending is None:
            return None
        if self._failure is not None and jax.process_count() > 1:
            # Orbax would wait here for the other processes, which wait for this one until their time is out.
            raise self._failed(self._pending, self._failure)
        if self._manager.is_saving_in_progress():
            return None
        step, self._pending = self._pending, None
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:
            raise self._failed(step, error) from error
        damage = self._damage(step)
        if damage is not None:
            raise self._failed(step, RuntimeError(damage))
        self._prune()
        return step

    def wait(self) -> None:
        """Returns when nothing is being written; raises as ``poll``."""
        while self._pending is not None:
            self.poll()
            if self._pending is not None:
                time.sleep(0.005)

    def close(self) -> None:
        """Waits for the save in progress, then lets go of threads; after a failure among several processes, neither."""
        if self._failure is not None and jax.process_count() > 1:
            return
        try:
            self.wait()
        finally:
            self._manager.close()

    def read_meta(self, step: int) -> dict[str, Any]:
        """The JSON saved with a step, proved whole.

        Raises:
          CheckpointError: it is not there or damaged.
        """
        try:
            record = json.loads((self.folder / str(step) / META / "metadata").read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.folder}/{step}: {META} cannot be read ({error})") from error
        if not isinstance(record, dict) or record.pop("digest", None) != _digest(record):
            raise CheckpointError(f"{self.folder}/{step}: {META} is damaged")
        return record

    def restore(self, abstract: Items, step: int | None = None, check: Any = None) -> Restored | None:
        """The newest step that is whole, or ``step``; None where the folder holds no step at all.

        Args:
          abstract: name of item -> tree of ``jax.ShapeDtypeStruct`` with the wanted shardings; only these are read.
          step: this one and no other.
          check: called with the meta before arrays are read; what it raises ends the search.

        Raises:
          CheckpointError: there are steps, and none is whole.
        """
        candidates = self._candidates() if step is None else [step]
        reasons = []
        for candidate in candidates:
            found, reason = self._try(candidate, abstract, check)
            if _everywhere(found is not None):
                assert found is not None
                return found
            reasons.append(f"step {candidate}: {reason or 'damaged for another process'}")
            logging.error("checkpoint skipped: %s/%s: %s", self.folder, candidate, reason)
            print(f"WARNING: checkpoint {self.folder}/{candidate} is skipped: {reason}", flush=True)
            if step is None:
                self._put_aside(candidate)
        if reasons:
            raise CheckpointError(f"{self.folder}: no checkpoint can be used; " + "; ".join(reasons))
        return None

    def _candidates(self) -> list[int]:
        if not self.folder.is_dir():
            return []
        return sorted((int(path.name) for path in self.folder.iterdir() if path.name.isdigit()), reverse=True)

    def _try(self, step: int, abstract: Items, check: Any) -> tuple[Restored | None, str]:
        damage = self._damage(step)
        if damage is not None:
            return None, damage
        try:
            meta = self.read_meta(step)
        except CheckpointError as error:
            return None, str(error)
        if check is not None:
            check(meta)
        try:
            arguments = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
            restored = dict(self._manager.restore(step, args=ocp.args.Composite(**arguments)))
        except Exception as error:  # whatever tensorstore makes of damaged files
            return None, f"cannot be read: {type(error).__name__}: {str(error).splitlines()[0][:300]}"
        for name, tree in restored.items():
            expected = meta["checksums"].get(name, {})
            wrong = [path for path, value in checksums(tree).items() if expected.get(path) != value]
            if wrong:
                return None, f"the checksum of {name}/{wrong[0]} is wrong ({len(wrong)} arrays differ)"
        return Restored(step, restored, meta), ""

    def _damage(self, step: int) -> str | None:
        """What is missing at a glance; None for a step that looks complete."""
        path = self.folder / str(step)
        if not path.is_dir():
            return "is not a folder"
        if not any(path.iterdir()):
            return "the folder is empty"
        for name in ("_CHECKPOINT_METADATA", f"{META}/metadata"):
            if not (path / name).is_file():
                return f"{name} is missing"
        return None

    def _put_aside(self, step: int) -> None:
        """Renames a step that cannot be used, so that it is neither counted nor in the way of a new save."""
        if self._read_only:
            return
        if jax.process_index() == 0:
            source = self.folder / str(step)
            number = next(n for n in range(10_000) if not (self.folder / f"damaged-{step}-{n}").exists())
            source.rename(self.folder / f"damaged-{step}-{number}")
        _everywhere(True)  # every process forgets the step, after it is gone
        self._manager.reload()

    def _prune(self) -> None:
        """Deletes all but the newest ``keep`` and the best; called only when the newest is known to be complete."""
        if jax.process_index() != 0:
            return
        steps = self.steps()
        stay = {*steps[-self._keep :], self.best_step()}
        for step in steps:
            if step not in stay:
                doomed = self.folder / f"deleted-{step}"
                (self.folder / str(step)).rename(doomed)
                shutil.rmtree(doomed, ignore_errors=True)

    def best_step(self) -> int | None:
        """The complete step with the lowest metric; None where no step has one."""
        metrics = {}
        for step in self.steps():
            try:
                metric = self.read_meta(step)["metric"]
            except CheckpointError:
                continue
            if metric is not None and math.isfinite(metric):
                metrics[step] = metric
        return min(metrics, key=lambda step: (metrics[step], -step)) if metrics else None

    def _failed(self, step: int, error: BaseException) -> CheckpointError:
        good = [other for other in self.steps() if other != step]
        last = f"the last good step is {good[-1]}" if good else "no earlier step is there"
        cause = str(error).strip().splitlines()
        return CheckpointError(
            f"saving step {step} to {self.folder} failed: {cause[0][:300] if cause else type(error).__name__}; {last}"
        )


class _Watched(ocp.StandardCheckpointHandler):
    """Tells at once when writing fails, before Orbax waits for the other processes to say so."""

    def __init__(self, on_failure: Callable[[BaseException], None]):
        super().__init__()
        self._on_failure = on_failure

    async def async_save(self, *args: Any, **kwargs: Any) -> Any:
        writes = await super().async_save(*args, **kwargs)
        return [_WatchedWrite(write, self._on_failure) for write in writes or ()]


class _WatchedWrite:
    """One write in the background, with Orbax's interface of a future."""

    def __init__(self, write: Any, on_failure: Callable[[BaseException], None]):
        self._write, self._on_failure = write, on_failure

    def result(self, timeout: float | None = None) -> Any:
        try:
            return self._write.result(timeout=timeout)
        except BaseException as error:
            self._on_failure(error)
            raise


def checksums(tree: Any) -> dict[str, int]:
    """Path -> checksum of each array of a tree; the same for every layout over devices."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    if not flat:
        return {}
    values = np.asarray(_checksum_all([leaf for _, leaf in flat]))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): int(value)
        for (path, _), value in zip(flat, values, strict=True)
    }


@jax.jit
def _checksum_all(leaves: list[jax.Array]) -> jax.Array:
    return jnp.stack([_checksum(jnp.asarray(leaf)) for leaf in leaves])


def _checksum(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.bool_:
        bits = x.astype(jnp.uint32)
    else:
        width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
        bits = jax.lax.bitcast_convert_type(x, width).astype(jnp.uint32)
    # The index is built from one iota per dimension: flattening would gather an array that is spread over devices.
    index = jnp.zeros(x.shape, jnp.uint32)
    for dimension in range(x.ndim):
        stride = math.prod(x.shape[dimension + 1 :]) % 2**32
        index += jax.lax.broadcasted_iota(jnp.uint32, x.shape, dimension) * jnp.uint32(stride)
    mixed = index * jnp.uint32(2654435761)
    mixed ^= mixed >> 15
    mixed = (mixed * jnp.uint32(2246822519)) | jnp.uint32(1)
    return jnp.sum(bits * mixed, dtype=jnp.uint32)


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _everywhere(ok: bool) -> bool:
    """Whether all processes say so: they must take the same step or none."""
    if jax.process_count() == 1:
        return ok
    from jax.experimental import multihost_utils

    return bool(np.all(multihost_utils.process_allgather(np.array(ok))))


def abstract_like(tree: Any, sharding: jax.sharding.Sharding | None = None) -> Any:
    """Shapes, dtypes and shardings of a tree's arrays; ``sharding`` replaces theirs."""
    return jax.tree.map(
        functools.partial(_abstract_leaf, sharding=sharding),
        tree,
        is_leaf=lambda x: isinstance(x, jax.ShapeDtypeStruct),
    )


def _abstract_leaf(leaf: Any, sharding: jax.sharding.Sharding | None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding or getattr(leaf, "sharding", None))
