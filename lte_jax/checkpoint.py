"""How a run survives: Orbax checkpoints of everything, proved whole when they are read, and kept until a better one is.

A step is a folder ``<folder>/<step>`` with one item per tree of arrays and ``meta``, JSON with the step, whatever the
caller gives (settings, data position), and a checksum of every array. Orbax renames a step into place when it is
complete, so that a kill leaves at most a temporary folder. What Orbax does not notice is noticed here: a flipped bit
(checksums), an empty or truncated step (skipped, said loudly), a save that failed in the background (``poll``).

A step that is proved damaged is renamed to ``damaged-<step>-<n>``, once an older one has been found whole. What may be
the machine's or the code's fault ends the search and renames nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging

from lte_jax import damage
from lte_jax.agreement import exchange
from lte_jax.checksums import checksums
from lte_jax.watched_writes import WatchedHandler

META = "meta"

Items = Mapping[str, Any]
Wanted = Items | Callable[[int], Items]


class CheckpointError(RuntimeError):
    """A save that failed, or no checkpoint that can be used: one line with the folder, the step and the cause."""


class DamagedError(CheckpointError):
    """A step that is proved to be damaged."""


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
        if not read_only and jax.process_index() == 0:
            for doomed in self.folder.glob("deleted-*"):  # of a run that was killed while it deleted
                shutil.rmtree(doomed, ignore_errors=True)
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

        arrays, values = WatchedHandler(note), ocp.JsonCheckpointHandler()
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        for kind, handler in (("Standard", arrays), ("Json", values)):
            for action in ("Save", "Restore"):
                registry.add(None, getattr(ocp.args, kind + action), handler)
        return registry

    def steps(self) -> list[int]:
        """Steps that look complete, oldest first; ``restore`` proves it, and renames those that are damaged."""
        return [step for step in self._numbers() if self._damage(step) is None]

    def _numbers(self) -> list[int]:
        """Of everything that is named as a step, whole or not, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdigit())

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
          DamagedError: it is not there or damaged. OSError: it cannot be read.
        """
        try:
            record = json.loads((self.folder / str(step) / META / "metadata").read_text())
        except (FileNotFoundError, ValueError) as error:
            raise DamagedError(f"{self.folder}/{step}: {META} cannot be read ({error})") from error
        if not isinstance(record, dict) or record.pop("digest", None) != _digest(record):
            raise DamagedError(f"{self.folder}/{step}: {META} is damaged")
        return record

    def restore(self, abstract: Wanted, step: int | None = None, check: Any = None) -> Restored | None:
        """The newest step that is whole, or ``step``; None where the folder holds no step and never lost one.

        Newer steps that are proved damaged are renamed to ``damaged-<step>-<n>``, unless ``step`` is given or the
        checkpoints are read only: so they are neither counted nor in the way of a new save. Where no step is whole,
        nothing is renamed. All processes call this, and all get the same step.

        Args:
          abstract: name of item -> tree of ``jax.ShapeDtypeStruct`` with the wanted shardings; only these are read. Or
            a function of the step that gives it.
          step: this one and no other.
          check: called with the meta before arrays are read; what it raises ends the search.

        Raises:
          DamagedError: ``step`` is damaged.
          CheckpointError: there are steps, or were, and none is whole; or a step could not be read for another reason.
        """
        bad: dict[int, str] = {}
        for candidate in self._candidates() if step is None else [step]:
            found, reason = self._try(candidate, abstract, check)
            if found is not None:
                for number in bad:
                    self._put_aside(number)
                return found
            bad[candidate] = reason
            logging.error("checkpoint skipped: %s/%s: %s", self.folder, candidate, reason)
            if jax.process_index() == 0:
                log = sys.stderr if self._read_only else sys.stdout  # which a program that reads has other uses for
                print(f"WARNING: checkpoint {self.folder}/{candidate} is skipped: {reason}", file=log, flush=True)
        if step is not None:
            raise DamagedError(f"{self.folder}: no checkpoint can be used; step {step}: {bad[step]}")
        aside = sorted(path.name for path in self.folder.glob("damaged-*"))
        if bad or aside:
            reasons = [f"step {number}: {reason}" for number, reason in bad.items()]
            before = [f"put aside before: {', '.join(aside)}"] if aside else []
            advice = "Nothing was renamed, and the run does not begin again by itself: copy a whole step back there, "
            advice += "named by its number, or start anew in another --workdir"
            raise CheckpointError(
                f"{self.folder}: no checkpoint can be used; {'; '.join(reasons + before)}"
                + ("" if self._read_only else f". {advice}")
            )
        return None

    def _candidates(self) -> list[int]:
        """The steps in the folder as process 0 sees it, whole or not, newest first."""
        return json.loads(exchange(json.dumps(self._numbers()[::-1]))[0])

    def _try(self, step: int, abstract: Wanted, check: Any) -> tuple[Restored | None, str]:
        """A step that is whole for all processes, or why it is proved damaged for one of them."""
        found: Restored | None = None
        wrong, failure = "", None
        try:
            found = self._read(step, abstract, check)
        except DamagedError as error:
            wrong = str(error)
        except Exception as error:
            failure = error
        reason = self._agree(step, wrong, failure)
        if reason:
            return None, reason
        assert found is not None
        # Every process takes part in these sums: they come after the agreement that all have their arrays.
        for name, tree in found.items.items():
            expected = found.meta["checksums"].get(name, {})
            differ = [path for path, value in checksums(tree).items() if expected.get(path) != value]
            if differ and not wrong:
                wrong = f"the checksum of {name}/{differ[0]} is wrong ({len(differ)} arrays differ)"
        reason = self._agree(step, wrong, None)
        return (None, reason) if reason else (found, "")

    def _read(self, step: int, abstract: Wanted, check: Any) -> Restored:
        """This process's share of a step, with no word to the others (Orbax's manager would wait for them)."""
        try:
            missing = self._damage(step)
            if missing is not None:
                raise DamagedError(missing)
            meta = self.read_meta(step)
        except OSError as error:
            raise self._unread(step, error) from error
        if check is not None:
            check(meta)
        items = {}
        for name, tree in (abstract(step) if callable(abstract) else abstract).items():
            path = self.folder / str(step) / name
            if not path.is_dir():
                raise DamagedError(f"{name} is missing")
            try:
                items[name] = ocp.StandardCheckpointHandler().restore(path, args=ocp.args.StandardRestore(tree))
            except Exception as error:
                proof = damage.proof(error)
                if proof is not None and path.is_dir():  # else the whole file system may be gone
                    raise DamagedError(f"cannot be read: {proof}") from error
                raise self._unread(step, error) from error
        return Restored(step, items, meta)

    def _unread(self, step: int, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"{self.folder}/{step} could not be read, and nothing proves it damaged: {damage.first_line(error)}. "
            "Nothing was renamed; start again when the cause is gone (memory, disk, network, or code whose parameters "
            f"have other shapes), or rename the folder {step} to go on from the step before"
        )

    def _agree(self, step: int, wrong: str, failure: Exception | None) -> str:
        """What proves the step damaged for one of the processes, the same words on all; a failure of one ends all."""
        own = json.dumps(["" if failure is None else damage.first_line(failure), wrong])
        heard = [json.loads(words) for words in exchange(own)]
        if failure is not None:
            raise failure
        for process, (failed, _) in enumerate(heard):
            if failed:
                raise CheckpointError(f"{self.folder}/{step}: process {process} could not read it: {failed}")
        proofs = [proof for _, proof in heard]
        if len(set(proofs)) == 1:
            return proofs[0]
        return next(f"process {process}: {proof}" for process, proof in enumerate(proofs) if proof)

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
        if self._read_only:
            return
        if jax.process_index() == 0:
            source = self.folder / str(step)
            number = next(n for n in range(10_000) if not (self.folder / f"damaged-{step}-{n}").exists())
            source.rename(self.folder / f"damaged-{step}-{number}")
            print(f"{source} was renamed to damaged-{step}-{number}", flush=True)
        exchange("renamed")  # every process forgets the step, after it is gone
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
            except DamagedError:
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


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
