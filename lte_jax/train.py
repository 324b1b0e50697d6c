"""How is a model trained? The loop: data, steps, evaluation, checkpoints, signals.

A run lives in one folder (``runs.py``). Starting the same command again continues it from its newest whole checkpoint,
bit for bit on the same devices. SIGTERM, SIGUSR1 and, in a single process, Ctrl-C save at the current step; the
program then exits with ``INTERRUPTED``. Numbers are read from the devices one step late, so that they never wait for
the host.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np

from lte_jax import bad_steps, configs, memory, metrics, plots, restore, runs, sharding
from lte_jax.bad_steps import BadSteps
from lte_jax.checkpoint import Checkpoints
from lte_jax.data import Batches, DataError, UnreadableError
from lte_jax.experiment import ExperimentConfig, step_config
from lte_jax.profiling import Stopwatch, Trace
from lte_jax.signals import Signals
from lte_jax.step import Builder, Params, TrainState, model_arrays

INTERRUPTED = 75
"""Exit code after a signal: everything is saved, run the same command again (EX_TEMPFAIL)."""

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended."""

    folder: Path
    step: int
    finished: bool
    """False after a signal."""
    heldout: dict[str, float] | None
    """Of the last evaluation."""
    interrupted: bool = False
    """Whether a signal came, also one in the last save of a run that is finished."""


def train(
    config: ExperimentConfig,
    workdir: str | Path,
    *,
    init_from: str | Path | None = None,
    profile: tuple[int, int] | None = None,
    devices: Sequence[jax.Device] | None = None,
    allow_change: Sequence[str] = (),
) -> Result:
    """Trains from the newest checkpoint in ``workdir`` to the last step.

    Args:
      init_from: folder of a run or of the authors' weights to start from, for a run that has no checkpoint yet.
      profile: (first step, how many) to trace into ``workdir/profile``.
      devices: default all.
      allow_change: settings that a run may change when it goes on (``runs.STATED``), such as "optimizer.learning_rate".

    Raises:
      ValueError: settings, data or a folder that cannot be used, before any step.
      CheckpointError: a save failed. TrainingError: only steps that are not finite. DataError: a row that cannot be
        read; in a single process, the steps until then are saved.
    """
    config.check()
    runs.check_stated(allow_change)
    with Signals(ctrl_c=jax.process_count() == 1) as signals:
        run = _Run(config, workdir, devices, allow_change)
        try:
            state = run.start(init_from)
            trace = Trace(run.folder / "profile", profile)
            trace.check(run.step, config.steps)
            state = run.loop(state, signals, trace)
            signals.hold()
            run.finish(state)
            heldout = None if run.heldout is None else run.heldout[1]
            return Result(run.folder, run.step, run.step >= config.steps, heldout, signals.received)
        finally:
            run.close()


class _Run:
    """One call of ``train``: its data, its compiled steps, its files."""

    def __init__(
        self,
        config: ExperimentConfig,
        workdir: str | Path,
        devices: Sequence[jax.Device] | None,
        allow_change: Sequence[str],
    ):
        self.config, self.allow_change = config, allow_change
        self.mesh = sharding.make_mesh(config.mesh, devices)
        self.say(sharding.device_table(self.mesh))
        rows = config.data.rows("train", batch_size=config.batch_size)
        first = {name: (config.batch_size, *array.shape) for name, array in rows[0].items()}
        self.place = sharding.batch_sharding(first["input_ids"], self.mesh)
        micro = config.batch_size // config.accumulation
        sharding.batch_sharding((micro, first["input_ids"][1]), self.mesh)
        self.shard = sharding.local_shard(self.place, first["input_ids"])
        self.batches = Batches(
            rows, config.batch_size, shard_index=self.shard[0], shard_count=self.shard[1], reading=config.reading
        )
        # Opened before the first step, so that a missing shard or one of another size is known before it.
        self.heldout_rows = config.data.rows("heldout", batch_size=micro)
        self.say(f"rows of {first['input_ids'][1]:,} tokens; {len(self.heldout_rows):,} are held out")
        self.builder = Builder(step_config(config, first["input_ids"][1]), self.mesh)
        self.abstract = self.builder.abstract_state()
        self.folder, self.lock = runs.claim(workdir, configs.to_dict(config), allow_change)
        runs.save_tokenizer(self.folder, config.data)
        self.checkpoints = Checkpoints(
            self.folder / restore.CHECKPOINTS, keep=config.checkpoint.keep, asynchronous=config.checkpoint.asynchronous
        )
        self.train_step = self.builder.train_step()
        self.evaluate_step = self.builder.evaluate_step(config.evaluation.reading)
        self.compiled: dict[Any, Any] = {}
        self.first_shapes = {**model_arrays(first), "interrupted": first["input_ids"][:1]}
        self.step = 0
        self.heldout: tuple[int, dict[str, float]] | None = None
        """The step of the last evaluation, and its numbers."""
        self.reporter: metrics.Reporter | None = None
        self.watch = Stopwatch()
        self.interrupted = False
        """By a signal to any of the processes, as all of them have learnt it from the same step."""

    def say(self, text: str) -> None:
        if jax.process_index() == 0:
            print(text, flush=True)

    def compile(self, shapes: dict[str, tuple[int, ...]]) -> Any:
        """The step for batches of these shapes; the first one's memory is reported before it is launched."""
        key = tuple(sorted(shapes.items()))
        if key not in self.compiled:
            abstract = {
                name: jax.ShapeDtypeStruct(shape, np.int32, sharding=self._batch_place(shape))
                for name, shape in shapes.items()
            }
            compiled = self.train_step.lower(self.abstract, abstract).compile()  # type: ignore[attr-defined]
            if not self.compiled:
                parameters = sum(int(np.prod(leaf.shape)) for leaf in self.builder.param_shapes.values())
                self.say(f"{self.config.name}: {parameters:,} parameters; {memory.report(self.abstract, compiled)}")
            self.compiled[key] = compiled
        return self.compiled[key]

    def _batch_place(self, shape: tuple[int, ...]) -> jax.sharding.NamedSharding:
        return sharding.named(("batch", "length")[: len(shape)], shape, self.mesh)

    def start(self, init_from: str | Path | None) -> TrainState:
        """The newest checkpoint that is whole, or the first state."""
        state = self.abstract
        wanted = {"params": state.params, "training": _beside_params(state)}
        settings = configs.to_dict(self.config)
        stated = [*self.allow_change, *runs.changed_before(self.folder)]
        began = time.perf_counter()
        restored = self.checkpoints.restore(
            wanted, check=lambda meta: runs.check_same(meta["config"], settings, f"checkpoint {meta['step']}", stated)
        )
        read = time.perf_counter()
        self.compile(self.first_shapes)
        if restored is not None:
            self.step = restored.step
            self.batches.set_state(restored.meta["data"])
            if restored.meta.get("heldout"):
                self.heldout = (restored.meta["heldout"][0], restored.meta["heldout"][1])
            state = _join_state(state, restored.items)
            self.say(
                f"continuing {self.folder} from step {self.step}; restored and checked in {read - began:.1f} s, "
                f"compiled in {time.perf_counter() - read:.1f} s"
            )
        elif init_from is not None:
            state = self.builder.init_state(runs.initial_params(init_from, self.builder))
            note = runs.of_other_tokenizer(init_from, self.config.data)
            self.say(f"starting from the weights of {init_from}{note}")
        else:
            state = self.builder.init_state()
        self.reporter = self._new_reporter()
        self.bad_steps = BadSteps(self.folder, self.reporter.say)
        if restored is not None:
            self.reporter.changed(self.step, runs.changes(restored.meta["config"], settings))
        return state

    def _new_reporter(self) -> metrics.Reporter:
        config, length = self.config, self.builder.config.length
        parameters = sum(int(np.prod(leaf.shape)) for leaf in self.builder.param_shapes.values())
        return metrics.Reporter(
            self.folder,
            start=self.step,
            total=config.steps,
            tokens_per_step=config.batch_size * length,
            flops=metrics.flops_per_token(config.model, parameters, length),
            every=config.log_every,
            watch=self.watch,
        )

    def loop(self, state: TrainState, signals: Signals, trace: Trace) -> TrainState:
        config = self.config
        late: tuple[int, dict[str, Any], Batch] | None = None
        self.interrupted |= signals.received and jax.process_count() == 1  # while it was restored or compiled
        if self.step and not self.interrupted:
            self._evaluate(state)  # where a signal came between a step and its evaluation
        while self.step < config.steps and not self.interrupted:
            try:
                with self.watch("data"):
                    batch = next(self.batches)
            except DataError as error:
                self._look(late)
                self._stop_at_bad_row(state, error, f"step {self.step + 1}")
            with trace.step(self.step + 1), self.watch("launch"):
                state, numbers = self._run_step(state, batch, signals.received)
            self.step += 1
            self._look(late)
            late = (self.step, numbers, batch)
            if trace.after(self.step, state) is not None:
                self.say(f"trace of the steps up to {self.step}: {trace.folder}")
            self.interrupted |= signals.received and jax.process_count() == 1
            if self.interrupted:
                break
            self.checkpoints.poll()
            if self._evaluation_is_due():
                self._look(late)
                late = None
                self._evaluate(state)
            if self.step < config.steps and self.step % config.checkpoint.every == 0:
                self._look(late)
                late = None
                self._save(state)
        self._look(late)
        trace.close()
        return state

    def _stop_at_bad_row(self, state: TrainState, error: DataError, where: str) -> NoReturn:
        # The other processes of a launch wait inside a step for this one: there is no common state to save.
        if jax.process_count() == 1 and self.step not in self.checkpoints.steps():
            self._save(state)
            self.checkpoints.wait()
        skippable = self.config.reading.bad_rows == "stop" and not isinstance(error, UnreadableError)
        advice = ". Or leave such rows out with --set reading.bad_rows=skip" if skippable else ""
        raise type(error)(f"{where}: {error}{advice}") from error

    def _run_step(self, state: TrainState, batch: Batch, interrupted: bool) -> tuple[TrainState, dict[str, Any]]:
        local = model_arrays(batch)
        # Every process tells all others of its signal through the step itself, so that all stop at the same step.
        local["interrupted"] = np.full(len(batch["input_ids"]), int(interrupted), np.int32)
        arrays = {name: self._spread(array) for name, array in local.items()}
        step = self.compile({name: array.shape for name, array in arrays.items()})
        return step(state, arrays)

    def _spread(self, local: np.ndarray) -> jax.Array:
        shape = (len(local) * self.shard[1], *local.shape[1:])
        return jax.make_array_from_process_local_data(self._batch_place(shape), local, shape)

    def _look(self, late: tuple[int, dict[str, Any], Batch] | None) -> None:
        """Reads the numbers of a step that has been launched before, and whether a process was told to stop."""
        if late is None:
            return
        assert self.reporter is not None
        step, numbers, batch = late
        names = ("skipped_in_row", "interrupted", "spike", "applied")
        with self.watch("device"):
            in_row, interrupted, spike, applied = jax.device_get([numbers[name] for name in names])
        self.interrupted |= bool(interrupted)
        self.reporter.step(step, numbers)
        if spike or not applied:
            self.bad_steps.keep(step, batch, numbers, "spike" if spike else "nonfinite", bool(applied))
        bad_steps.check(int(in_row), self.config.optimizer.max_skipped, step, bool(spike))

    def _evaluation_is_due(self) -> bool:
        due = self.step == self.config.steps or self.step % self.config.evaluation.every == 0
        return due and len(self.heldout_rows) > 0 and (self.heldout is None or self.heldout[0] != self.step)

    def _evaluate(self, state: TrainState) -> None:
        """Scores held-out rows, if this step is to be scored and has not been."""
        config = self.config
        if not self._evaluation_is_due():
            return
        batches = Batches(
            self.heldout_rows,
            config.batch_size // config.accumulation,
            shard_index=self.shard[0],
            shard_count=self.shard[1],
            reading=dataclasses.replace(config.reading, workers=0),  # starting them takes longer than these few rows
            pad_last=True,
        )
        most = config.evaluation.batches
        most = None if most is None else most * config.accumulation  # of as many rows, whatever is computed at a time
        sums = np.zeros(3)
        try:
            for batch in itertools.islice(batches, most):
                arrays = {name: self._spread(array) for name, array in model_arrays(batch).items()}
                found = jax.device_get(self.evaluate_step(state.params, arrays))
                sums += [found["loss"], found["correct"], found["targets"]]
        except DataError as error:
            self._stop_at_bad_row(state, error, f"held-out rows at step {self.step}")
        finally:
            batches.close()
        assert self.reporter is not None
        if not sums[2]:
            self.reporter.say(f"WARNING: step {self.step}: no held-out row could be read, so there is no held-out loss")
            return
        loss, accuracy = float(sums[0] / sums[2]), float(sums[1] / sums[2])
        self.heldout = (self.step, {"heldout_loss": loss, "heldout_accuracy": accuracy})
        self.reporter.write({"step": self.step, **self.heldout[1], "heldout_targets": int(sums[2])})
        self.reporter.say(f"step {self.step}: held-out loss {loss:.4f}, accuracy {accuracy:.3f}")
        self.reporter.pause()

    def _save(self, state: TrainState) -> None:
        items = {"params": state.params, "training": _beside_params(state)}
        meta = {"config": configs.to_dict(self.config), "data": self.batches.get_state(), "heldout": self.heldout}
        now = self.heldout is not None and self.heldout[0] == self.step
        self.checkpoints.save(self.step, items, meta, self.heldout[1]["heldout_loss"] if now else None)  # type: ignore[index]
        assert self.reporter is not None
        self.reporter.pause()

    def finish(self, state: TrainState) -> None:
        """The last save, and pictures if the run is complete."""
        self.checkpoints.wait()
        if self.step == self.config.steps:
            self._evaluate(state)  # where a signal came in the last step
        if self.step not in self.checkpoints.steps():
            self._save(state)
        self.checkpoints.wait()
        if self.step < self.config.steps:
            self.say(f"stopped by a signal: step {self.step} is saved; run the same command to continue")
        elif jax.process_count() == 1:
            self._draw(state.params)

    def _draw(self, params: Params) -> None:
        rows = self.config.data.rows("heldout", batch_size=1)
        row = rows[0] if len(rows) else self.config.data.rows("train", batch_size=1)[0]
        builder = runs.single_device_builder(self.config.model)
        model = builder.model({name: np.asarray(leaf) for name, leaf in params.items()})
        segments = row.get("segment_ids")
        pictures = [
            plots.loss_curve(self.folder, self._band()),
            plots.kept_tokens(self.folder, model, row["input_ids"][None], None if segments is None else segments[None]),
        ]
        self.say("pictures: " + ", ".join(str(path) for path in pictures if path is not None))

    def _band(self) -> tuple[float, float] | None:
        """Tokens per head between which the penalty's controller rests; None without learned retention."""
        if self.builder.lte is None:
            return None
        low, high = self.config.penalty.tolerance
        return low * self.builder.lte.budget, high * self.builder.lte.budget

    def close(self) -> None:
        self.batches.close()
        if self.reporter is not None:
            self.reporter.close()
        self.checkpoints.close()
        if self.lock is not None:
            self.lock.close()


def _beside_params(state: TrainState) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(state) if field.name != "params"]
    return {name: getattr(state, name) for name in names}


def _join_state(abstract: TrainState, items: dict[str, Any]) -> TrainState:
    """A state from a checkpoint's items, in the structure of ``abstract``."""
    leaves = jax.tree.leaves(items["training"])
    rest = jax.tree.unflatten(jax.tree.structure(_beside_params(abstract)), leaves)
    return TrainState(**{**rest, "params": items["params"]})
