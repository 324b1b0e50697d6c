"""What does a run do when the disk is full, a record is damaged, the loss jumps, or it is killed with data workers?"""

from __future__ import annotations

import dataclasses
import io
import resource
import signal
import subprocess
import sys
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lte_jax import data, metrics, spikes
from lte_jax.bad_steps import TrainingError
from lte_jax.checkpoint import CheckpointConfig, CheckpointError, Checkpoints
from lte_jax.data import DataError, UnreadableError, corpus, pipeline
from lte_jax.data.tasks import TaskRows
from lte_jax.experiment import EvaluationConfig
from lte_jax.metrics import read_metrics
from lte_jax.spikes import SpikeConfig, SpikeState
from lte_jax.train import _Run, train
from tests.system.data_samples import batches, same, small_text
from tests.system.test_launch import check_gone
from tests.system.worker import experiment

ONE = jax.devices()[:1]
pytestmark = pytest.mark.usefixtures("shared_programs")


def small(**changes):
    return dataclasses.replace(experiment(), steps=12, checkpoint=CheckpointConfig(every=3, keep=2), **changes)


def steps_of(folder):
    checkpoints = Checkpoints(folder / "checkpoints", read_only=True)
    try:
        return checkpoints.steps()
    finally:
        checkpoints.close()


def sums(folder, step):
    checkpoints = Checkpoints(folder / "checkpoints", read_only=True)
    try:
        return checkpoints.read_meta(step)["checksums"]
    finally:
        checkpoints.close()


def test_a_full_disk_ends_the_run_within_the_interval_and_the_last_step_is_intact(tmp_path, monkeypatch):
    save = _Run._save
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    seen = []

    def and_fill(self, state):
        seen.append(self.step)
        if self.step == 6:
            self.checkpoints.wait()
            # A write beyond it fails as on a full disk; the metrics of all steps are shorter.
            resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, hard))
        return save(self, state)

    monkeypatch.setattr(_Run, "_save", and_fill)
    # The failure of the save at 6 is known at the latest when the next is due, at 9.
    try:
        with pytest.raises(CheckpointError, match=r"saving step 6 to .* failed.*the last good step is 3"):
            train(small(), tmp_path / "run", devices=ONE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert seen in ([3, 6], [3, 6, 9]) and steps_of(tmp_path / "run") == [3]
    monkeypatch.undo()
    assert train(small(), tmp_path / "run", devices=ONE).finished


def test_a_bad_record_stops_the_run_saved_and_may_be_left_out(tmp_path, monkeypatch, capfd):
    read = TaskRows.__getitem__

    def damaged(self, index):
        if index == 37:
            raise DataError("shards/train-00003.array_record: records from 37 on are damaged; copy it again")
        return read(self, index)

    monkeypatch.setattr(TaskRows, "__getitem__", damaged)
    words = r"step 5: shards/train-00003.*record.* 37 .*damaged.*--set reading.bad_rows=skip"
    with pytest.raises(DataError, match=words):
        train(small(), tmp_path / "run", devices=ONE)
    assert steps_of(tmp_path / "run")[-1] == 4  # rows 32 to 39 are the batch of step 5
    config = small(reading=pipeline.ReadingConfig(bad_rows="skip"))

    def unreadable(self, index):
        if index == 37:
            raise UnreadableError("shards/train-00003.array_record: cannot be read (Input/output error)")
        return read(self, index)

    with monkeypatch.context() as patch:  # what may be whole is not left out
        patch.setattr(TaskRows, "__getitem__", unreadable)
        with pytest.raises(UnreadableError, match=r"step 5: .*\(Input/output error\)$"):
            train(config, tmp_path / "run", devices=ONE)
    began = time.monotonic()
    assert train(config, tmp_path / "run", devices=ONE).finished
    print(f"\ncontinued and finished in {time.monotonic() - began:.1f} s")
    targets = {record["step"]: record["targets"] for record in read_metrics(tmp_path / "run")}
    assert targets[5] == targets[4] * 7 / 8 and targets[6] == targets[4]
    assert "row 37 of the reading order is left out" in capfd.readouterr().out


def test_damaged_shards_are_left_out_row_by_row_the_same_in_every_process(tmp_path):
    plan = corpus.make_plan(small_text(tmp_path), tmp_path / "shards", part_bytes=2**20)
    list(corpus.write_parts(plan, 0))
    manifest = corpus.finish(plan)
    packed = data.PackedRows(str(tmp_path / "shards"))
    count = manifest["rows"]["train"] // 4  # all rows once
    whole = batches(count, packed.rows(), 4)
    shard = tmp_path / "shards" / manifest["train"][0]["name"]
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 4] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(DataError, match=r"damaged|not a whole"):
        batches(count, packed.rows(), 4)
    skipping = pipeline.ReadingConfig(bad_rows="skip")
    found = batches(count, packed.rows(), 4, reading=skipping)
    halves = [batches(count, packed.rows(), 4, reading=skipping, shard_index=i, shard_count=2) for i in range(2)]
    lost = 0
    for step, (one, other) in enumerate(zip(found, whole, strict=True)):
        assert same({name: np.concatenate([half[step][name] for half in halves]) for name in one}, one)
        for row in range(4):
            if (one["labels"][row] == data.IGNORE).all():
                lost += 1
            else:
                assert all(np.array_equal(one[name][row], other[name][row]) for name in one)
    assert 1 <= lost < count


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_a_shard_cut_short_is_refused_before_anything_is_written(split, tmp_path):
    plan = corpus.make_plan(small_text(tmp_path), tmp_path / "shards", part_bytes=2**20)
    list(corpus.write_parts(plan, 0))
    shard = tmp_path / "shards" / corpus.finish(plan)[split][0]["name"]
    shard.write_bytes(shard.read_bytes()[:-7])
    config = small(data=data.PackedRows(str(tmp_path / "shards")))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=300))
    with pytest.raises(DataError, match=f"{shard.name}: .* bytes, but the manifest says .*; copy it again"):
        train(config, tmp_path / "run", devices=ONE)
    assert not (tmp_path / "run").exists()


def test_a_full_disk_under_the_log_hides_no_error(tmp_path, monkeypatch):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", Full())
        reporter = metrics.Reporter(tmp_path, start=0, total=2, tokens_per_step=1, flops=1.0, every=1)
        reporter._bar.mininterval = 0.0
        for step in (1, 2):
            reporter.step(step, {"loss": 2.0})
        reporter.close()
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]


def test_spikes_stand_out_from_what_the_run_has_shown():
    rng = np.random.default_rng(0)
    losses = 3.0 + 0.05 * rng.normal(size=300)
    losses[150], losses[200], losses[220:] = 4.0, np.nan, losses[220:] + 0.5
    detect = jax.jit(lambda state, loss: spikes.detect(state, SpikeConfig(sigmas=6.0, memory=50), loss))
    state, found = spikes.init_state(), []
    for step, loss in enumerate(losses):
        state, spike = detect(state, jnp.float32(loss))
        if spike:
            found.append(step)
    assert found[0] == 150 and 200 not in found and found[1] == 220
    assert found[-1] < 260, "a lasting change of level is accepted"
    assert int(state.steps) == 299 and np.isfinite(float(state.mean))
    quiet = SpikeState(jnp.float32(2.0), jnp.float32(4.0), jnp.int32(60))
    assert not detect(quiet, jnp.float32(2.001))[1] and detect(quiet, jnp.float32(2.2))[1]


def test_a_loss_spike_may_be_skipped_and_its_batch_is_kept(tmp_path, monkeypatch):
    low = lambda: SpikeState(jnp.float32(0.1), jnp.float32(0.01), jnp.int32(200))  # noqa: E731
    monkeypatch.setattr(spikes, "init_state", low)
    with pytest.raises(TrainingError, match=r"the loss was a spike in 3 steps in a row.*spike-\*\.npz"):
        train(small(spikes=SpikeConfig(sigmas=1.0, skip=True)), tmp_path, devices=ONE)
    records = read_metrics(tmp_path)
    assert [record["skipped"] for record in records] == [1, 2, 3] and all(record["spike"] for record in records)
    assert records[0]["finite"] and not records[0]["applied"]
    kept = sorted(tmp_path.glob("spike-*-process0.npz"))
    assert len(kept) == 3 and np.load(kept[0])["labels"].shape == (8, 32)


def test_a_profile_and_the_parts_of_a_steps_time_are_written(tmp_path):
    with pytest.raises(ValueError, match="--profile=11:3: this run takes the steps 1 to 12"):
        train(small(), tmp_path / "run", profile=(11, 3), devices=ONE)
    train(small(), tmp_path / "run", profile=(4, 2), devices=ONE)
    (trace,) = (tmp_path / "run" / "profile").rglob("*.xplane.pb")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the reader's own types
        traced = jax.profiler.ProfileData.from_file(str(trace))
        events = [event for plane in traced.planes for line in plane.lines for event in line.events]
        steps = [dict(event.stats)["step_num"] for event in events if event.name == "train"]
    assert sorted(steps) == [4, 5]
    records = [record for record in read_metrics(tmp_path / "run") if "seconds" in record]
    assert len(records) >= 4
    for record in records:
        parts = record["seconds"]
        assert set(parts) == {"data", "launch", "device", "other"}
        assert sum(parts.values()) == pytest.approx(record["seconds_per_step"], rel=0.05, abs=2e-3)
        assert record["tokens_per_second"] == pytest.approx(8 * 32 / record["seconds_per_step"])


def test_peak_memory_and_mfu_are_reported_where_the_device_says_them(tmp_path, monkeypatch):
    class Device:
        device_kind = "NVIDIA H200"
        memory_stats = staticmethod(lambda: {"peak_bytes_in_use": 7 * 2**30})

    monkeypatch.setattr(metrics.jax, "local_devices", lambda: [Device()])
    monkeypatch.setattr(metrics.jax, "devices", lambda: [Device()])
    reporter = metrics.Reporter(tmp_path, start=0, total=9, tokens_per_step=1000, flops=1e9, every=1)
    for step in (1, 2):
        reporter.step(step, {"loss": 2.0})
    reporter.close()
    first, second = read_metrics(tmp_path)
    assert first["peak_bytes"] == 7 * 2**30 and "mfu" not in first
    expected = second["tokens_per_second"] * 1e9 / (jax.device_count() * 989e12)
    assert second["mfu"] == pytest.approx(expected)


WORKERS = """
import os, time
from lte_jax import data
from lte_jax.data import pipeline

if __name__ == "__main__":
    source = pipeline.Batches(data.SymbolNeedles().rows(), 4, reading=data.ReadingConfig(workers=2, ahead=1))
    next(source)
    children = [name for name in os.listdir("/proc") if name.isdigit()]
    parents = {name: open(f"/proc/{name}/stat").read().rpartition(")")[2].split()[1] for name in children}
    print(*[name for name, parent in parents.items() if parent == str(os.getpid())], flush=True)
    time.sleep(60)
"""


def test_a_killed_run_leaves_no_data_workers(tmp_path):
    (tmp_path / "program.py").write_text(WORKERS)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "program.py")], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={"PYTHONPATH": ":".join(sys.path), "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert process.stdout is not None
    workers = process.stdout.readline().split()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(workers) >= 2
    began = time.monotonic()
    check_gone(workers)
    print(f"\ndata workers gone {time.monotonic() - began:.1f} s after their process")
    process.stdout.close()


def test_evaluation_without_held_out_rows_is_left_out(tmp_path):
    config = small(evaluation=EvaluationConfig(every=2))
    assert train(config, tmp_path, devices=ONE).heldout is None
