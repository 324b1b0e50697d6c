"""Does a run continue exactly, whatever stopped it, and does it refuse what would spoil it?"""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lte_jax import configs, runs
from lte_jax.bad_steps import TrainingError
from lte_jax.checkpoint import CheckpointConfig, Checkpoints
from lte_jax.data import SymbolNeedles
from lte_jax.experiment import EvaluationConfig, step_config
from lte_jax.metrics import flops_per_token, read_metrics
from lte_jax.retention import PenaltyConfig
from lte_jax.sharding import MeshConfig, make_mesh
from lte_jax.step import Builder
from lte_jax.train import _Run, train
from tests.system.tiny import DATA, tiny_experiment, tiny_model

ONE = jax.devices()[:1]
pytestmark = pytest.mark.usefixtures("shared_programs")


def sums(folder, step):
    checkpoints = Checkpoints(folder / "checkpoints", read_only=True)
    meta = checkpoints.read_meta(step)
    checkpoints.close()
    return meta["checksums"], meta["data"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, shared_programs):
    """An uninterrupted run, and how it ended."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, train(tiny_experiment(), folder, devices=ONE)


@pytest.fixture(scope="module")
def cache(whole, tmp_path_factory):
    """Where runs that are killed keep their compiled programs: a kill may leave one half written.

    It begins with a copy of those that ``whole`` compiled, where the tests keep any.
    """
    folder = tmp_path_factory.mktemp("xla")
    if kept := jax.config.jax_compilation_cache_dir:
        for file in Path(kept).glob("jit__*-cache"):
            shutil.copy(file, folder)
    return folder


def test_a_run_leaves_its_settings_numbers_pictures_and_checkpoints(whole):
    folder, result = whole
    assert (result.step, result.finished) == (11, True)
    assert configs.from_dict(type(tiny_experiment()), runs.read_config(folder)) == tiny_experiment()
    assert {"loss.png", "kept.png", "config.json", "metrics.jsonl"} <= {path.name for path in folder.iterdir()}
    records = read_metrics(folder)
    training = [record for record in records if "loss" in record]
    assert [record["step"] for record in training] == list(range(1, 12))
    assert all(np.shape(record["kept"]) == (1, 2) for record in training)
    assert any(np.any(record["penalty_weights"]) for record in training), "the controller never moved"
    assert [record["step"] for record in records if "heldout_loss" in record] == [6, 11]
    assert records[-1]["heldout_targets"] == DATA.heldout_rows * DATA.queries
    assert training[-1]["loss"] < training[0]["loss"]


def test_a_signal_saves_at_the_current_step_and_the_run_continues_bit_for_bit(whole, tmp_path, monkeypatch):
    run_step = _Run._run_step

    def and_interrupt(self, state, batch, interrupted):
        if self.step == 6:
            os.kill(os.getpid(), signal.SIGUSR1)
        return run_step(self, state, batch, interrupted)

    monkeypatch.setattr(_Run, "_run_step", and_interrupt)
    before = signal.getsignal(signal.SIGTERM)
    stopped = train(tiny_experiment(), tmp_path, devices=ONE)
    monkeypatch.undo()
    assert (stopped.step, stopped.finished) == (7, False)  # 7 is no multiple of the controller's period of 4
    assert signal.getsignal(signal.SIGTERM) is before
    assert train(tiny_experiment(), tmp_path, devices=ONE).finished
    assert sums(tmp_path, 11) == sums(whole[0], 11)
    ours, theirs = read_metrics(tmp_path), read_metrics(whole[0])
    assert [record.get("loss") for record in ours] == [record.get("loss") for record in theirs]


def killed_after(workdir, cache, seconds_after_step_2):
    """Starts a run as a process, and kills it -9 some time after its second step."""
    code = f"from tests.system.tiny import run_in_process; run_in_process({str(workdir)!r}, {str(cache)!r})"
    log = cache / "killed.log"
    with log.open("w") as output:
        process = subprocess.Popen([sys.executable, "-c", code], stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 240
        while len(read_metrics(workdir)) < 2 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(seconds_after_step_2)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    steps = len(read_metrics(workdir))
    assert steps >= 2, f"the run ended with {process.returncode} before its second step: {log.read_text()[-2000:]}"


def check_kill(whole, tmp_path, cache, seconds):
    killed_after(tmp_path / "run", cache, seconds)
    config = tiny_experiment(checkpoint=CheckpointConfig(every=1, keep=2))
    assert train(config, tmp_path / "run", devices=ONE).finished
    assert sums(tmp_path / "run", 11) == sums(whole[0], 11)


def test_a_killed_run_continues_bit_for_bit(whole, tmp_path, cache):
    check_kill(whole, tmp_path, cache, random.random() * 0.3)


@pytest.mark.exhaustive
@pytest.mark.parametrize("number", range(100))
def test_a_hundred_random_kills_lose_nothing(whole, tmp_path, cache, number):
    check_kill(whole, tmp_path, cache, random.Random(number).random() * 2.0)


def test_a_damaged_newest_checkpoint_costs_only_the_steps_since_the_one_before(whole, tmp_path, capfd):
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    for file in (folder / "checkpoints" / "11" / "params").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:-7])
    assert train(tiny_experiment(), folder, devices=ONE).step == 11
    said = capfd.readouterr().out
    assert "checkpoints/11 is skipped" in said and "from step 10" in said
    assert sums(folder, 11) == sums(whole[0], 11)


def one_layer():
    """For tests of what does not depend on the layers: less to compile."""
    model = tiny_model(dropout=0.0)
    return tiny_experiment(model=dataclasses.replace(model, num_layers=1, pattern=model.pattern[1:]))


def test_a_run_that_only_skips_stops_with_an_error_and_keeps_the_batch(tmp_path):
    config = one_layer()
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, learning_rate=1e30))
    with pytest.raises(TrainingError, match="not finite in 3 steps in a row"):
        train(config, tmp_path, devices=ONE)
    skipped = [record["skipped"] for record in read_metrics(tmp_path)]
    assert skipped[0] == 0 and skipped[-1] == 3
    saved = sorted(tmp_path.glob("nonfinite-*.npz"))
    assert len(saved) == 3 and np.load(saved[0])["input_ids"].shape == (8, 32)


def test_another_config_and_a_foreign_folder_are_refused_and_left_alone(whole, tmp_path):
    folder = whole[0]
    before = sorted((path.name, path.stat().st_mtime_ns) for path in folder.iterdir())
    changed = tiny_experiment(model=tiny_model(budget=7), seed=3)
    with pytest.raises(runs.RunError, match=r"another run; differing: model\.pattern.*seed 0 -> 3"):
        train(changed, folder, devices=ONE)
    assert before == sorted((path.name, path.stat().st_mtime_ns) for path in folder.iterdir())
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(runs.RunError, match="not empty"):
        train(tiny_experiment(), tmp_path, devices=ONE)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_checkpoint_of_another_model_is_refused_by_name(whole, tmp_path):
    shutil.copytree(whole[0] / "checkpoints", tmp_path / "checkpoints")
    changed = tiny_experiment(model=dataclasses.replace(tiny_model(), width=24))
    (tmp_path / "config.json").write_text(json.dumps(configs.to_dict(changed)))
    with pytest.raises(runs.RunError, match=r"checkpoint 11 holds another run; differing: model\.width 16 -> 24"):
        train(changed, tmp_path, devices=ONE)


def test_a_new_run_starts_from_the_weights_of_another_with_another_budget_and_schedule(whole, tmp_path):
    config = tiny_experiment(model=tiny_model(budget=9, window=8), steps=1, penalty=PenaltyConfig(freeze_steps=5))
    config = dataclasses.replace(config, evaluation=EvaluationConfig(every=5, batches=1))
    train(config, tmp_path / "new", init_from=whole[0], devices=ONE)
    builder = runs.single_device_builder(config.model)
    old, new = (runs.initial_params(folder, builder) for folder in (whole[0], tmp_path / "new"))
    for name in old:
        frozen = "/router/" in name
        assert np.array_equal(old[name], new[name]) == frozen, name
        np.testing.assert_allclose(new[name], old[name], atol=0.02)
    wider = runs.single_device_builder(dataclasses.replace(config.model, intermediate_size=40))
    with pytest.raises(runs.RunError, match=r"wrong shape: .*down_proj/weight \[1, 24, 16\] instead of"):
        runs.initial_params(whole[0], wider)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 6, "accumulation": 4}, "not a multiple of accumulation=4"),
        ({"steps": 0}, "at least 1"),
        ({"evaluation": EvaluationConfig(batches=-1)}, "evaluation.batches=-1: it must be at least 1, or none for all"),
        ({"data": SymbolNeedles()}, "outside the model's vocabulary"),
        ({"mesh": MeshConfig(devices=4)}, "mesh.devices=4, and this launch has 1"),
        ({"mesh": MeshConfig(tensor=2)}, "does not divide the 1 devices"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_written(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(tiny_experiment(**changes), tmp_path / "run", devices=ONE)
    assert not (tmp_path / "run").exists()


def one_step(config, batch, mesh):
    builder = Builder(step_config(config, 32), mesh)
    return builder.train_step()(builder.init_state(), batch)


def test_accumulation_gives_the_step_of_the_full_batch():
    rng = np.random.default_rng(0)
    segments = np.sort(rng.integers(0, 4, (8, 32)), axis=1).astype(np.int32)  # rows with different counts of targets
    labels = np.where((rng.random((8, 32)) < 0.5) & (segments > 0), rng.integers(0, DATA.vocab_size, (8, 32)), -1)
    batch = {
        "input_ids": jnp.asarray(rng.integers(0, DATA.vocab_size, (8, 32)), jnp.int32),
        "labels": jnp.asarray(labels, jnp.int32),
        "segment_ids": jnp.asarray(segments),
        "interrupted": jnp.zeros(8, jnp.int32),
    }
    mesh = make_mesh(MeshConfig(), ONE)
    config = one_layer()
    full, numbers = one_step(config, batch, mesh)
    parts, part_numbers = one_step(dataclasses.replace(config, accumulation=4), batch, mesh)
    for name in ("loss", "ce", "grad_norm", "accuracy", "kept", "targets"):
        np.testing.assert_allclose(part_numbers[name], numbers[name], rtol=1e-5, err_msg=name)
    for name, leaf in full.params.items():
        np.testing.assert_allclose(parts.params[name], leaf, rtol=1e-4, atol=3e-6, err_msg=name)


def test_an_evaluation_reads_the_same_rows_whatever_is_computed_at_a_time(tmp_path):
    found = []
    for parts in (1, 4):
        changed = {"accumulation": parts, "evaluation": EvaluationConfig(every=2, batches=1), "steps": 2}
        train(tiny_experiment(**changed), tmp_path / str(parts), devices=ONE)
        found.append([record for record in read_metrics(tmp_path / str(parts)) if "heldout_loss" in record][-1])
    assert found[0]["heldout_targets"] == found[1]["heldout_targets"] == 8 * 4


def test_a_run_says_how_long_its_rows_are_and_how_many_are_held_out(tmp_path, capfd):
    with pytest.raises(ValueError, match=r"--init_from: .* no such folder"):
        train(tiny_experiment(), tmp_path / "run", init_from=tmp_path / "none", devices=ONE)
    assert "rows of 32 tokens; 12 are held out" in capfd.readouterr().out


def test_flops_follow_the_formula():
    config = tiny_model()
    # 6 per weight; forward: 6 N V per delta-rule head, 4 H N per key seen: the window's average and the budget.
    seen = min(33 / 2, (7 * 8 / 2 + 25 * 7) / 32 + 5)
    assert flops_per_token(config, 1000, 32) == pytest.approx(6 * 1000 + 3 * (2 * 6 * 4 * 4 + 4 * 16 * seen))
