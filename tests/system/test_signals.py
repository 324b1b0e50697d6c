"""Is a signal obeyed whenever it comes, and does a step that it ends keep no other step's held-out numbers?"""

from __future__ import annotations

import dataclasses
import os
import signal

import jax
import pytest

from lte_jax.checkpoint import CheckpointConfig, Checkpoints
from lte_jax.data import DataError
from lte_jax.data.tasks import TaskRows
from lte_jax.experiment import EvaluationConfig
from lte_jax.metrics import read_metrics
from lte_jax.signals import Signals
from lte_jax.train import _Run, train
from tests.system.tiny import DATA
from tests.system.worker import experiment

ONE = jax.devices()[:1]
pytestmark = pytest.mark.usefixtures("shared_programs")


@pytest.fixture(autouse=True)
def usual_ctrl_c():
    """As in a terminal: a program that was started in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def config(**changes):
    """Three steps of one layer, each evaluated."""
    data = dataclasses.replace(DATA, heldout_rows=8)
    settings = {"steps": 3, "data": data, "evaluation": EvaluationConfig(every=1, batches=1)}
    return dataclasses.replace(experiment(), checkpoint=CheckpointConfig(every=100), **(settings | changes))


def metas(folder):
    checkpoints = Checkpoints(folder / "checkpoints", read_only=True)
    try:
        return {step: checkpoints.read_meta(step) for step in checkpoints.steps()}
    finally:
        checkpoints.close()


def evaluated(folder):
    return [record["step"] for record in read_metrics(folder) if "heldout_loss" in record]


def send(monkeypatch, method, *numbers, at=None):
    """Sends signals to this process at the beginning of a method of the run, once."""
    original, sent = getattr(_Run, method), []

    def and_signal(self, *args):
        if not sent and at in (None, self.step):
            for number in numbers:
                sent.append(number)
                os.kill(os.getpid(), number)
        return original(self, *args)

    monkeypatch.setattr(_Run, method, and_signal)


def test_a_signal_at_any_time_ends_the_run_saved_with_its_own_numbers(tmp_path, monkeypatch):
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    with monkeypatch.context() as patch:
        send(patch, "compile", signal.SIGTERM)
        stopped = train(config(), tmp_path, devices=ONE)
    assert (stopped.step, stopped.finished, stopped.interrupted) == (0, False, True)
    with monkeypatch.context() as patch:
        send(patch, "_run_step", signal.SIGINT, at=1)
        stopped = train(config(), tmp_path, devices=ONE)
    assert (stopped.step, stopped.finished) == (2, False)
    # The loss of step 1 is not that of the checkpoint at step 2.
    assert evaluated(tmp_path) == [1]
    assert metas(tmp_path)[2]["metric"] is None and metas(tmp_path)[2]["heldout"][0] == 1
    with monkeypatch.context() as patch:
        send(patch, "_run_step", signal.SIGUSR1, at=2)
        # During the last save both are noted and not obeyed, however often they come.
        send(patch, "_save", *[signal.SIGTERM, signal.SIGUSR1] * 2)
        last = train(config(), tmp_path, devices=ONE)
    assert (last.step, last.finished, last.interrupted) == (3, True, True)
    assert evaluated(tmp_path) == [1, 2, 3], "steps that a signal ended are evaluated when the run goes on, or ends"
    found = metas(tmp_path)[3]
    assert found["metric"] == last.heldout["heldout_loss"] and found["heldout"] == [3, last.heldout]
    again = train(config(), tmp_path, devices=ONE)
    assert again.finished and again.heldout == last.heldout and not again.interrupted
    assert evaluated(tmp_path) == [1, 2, 3]
    assert handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]


def test_a_second_ctrl_c_ends_at_once_also_in_the_last_save():
    with Signals(ctrl_c=True) as signals, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received
        signals.hold()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
    with Signals(ctrl_c=False) as signals, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    assert not signals.received


def test_a_damaged_held_out_row_ends_the_run_saved_or_is_left_out(tmp_path, monkeypatch, capfd):
    read = TaskRows.__getitem__

    def damaged(self, index):
        if len(self) == 8 and index == 3:
            raise DataError("shards/heldout-00000.array_record: records from 3 on are damaged; copy it again")
        return read(self, index)

    monkeypatch.setattr(TaskRows, "__getitem__", damaged)
    for _ in range(2):  # at every start, and nothing is lost
        with pytest.raises(DataError, match=r"held-out rows at step 2: shards.*--set reading.bad_rows=skip"):
            train(config(evaluation=EvaluationConfig(every=2)), tmp_path, devices=ONE)
        assert list(metas(tmp_path)) == [2]
    skipping = dataclasses.replace(config().reading, bad_rows="skip")
    assert train(config(evaluation=EvaluationConfig(every=2), reading=skipping), tmp_path, devices=ONE).finished
    numbers = [record["heldout_targets"] for record in read_metrics(tmp_path) if "heldout_targets" in record]
    assert numbers == [7 * DATA.queries] * 2
    assert "row 3 " in capfd.readouterr().out
