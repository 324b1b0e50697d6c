"""Does a run's folder let in what may go on there, and nothing else?"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
import tokenizers

import experiments.suite
import lte_jax.train
from experiments import train as program
from experiments.suite import Suite
from lte_jax import configs, data, metrics, runs
from lte_jax.data.tokenizer import load_tokenizer
from lte_jax.folder_lock import LOCK
from lte_jax.metrics import read_metrics
from lte_jax.profiling import Trace
from lte_jax.spikes import SpikeConfig
from lte_jax.train import Result, _Run, train
from tests.system.test_signals import config, metas, send

ONE = jax.devices()[:1]
pytestmark = pytest.mark.usefixtures("shared_programs")


def test_a_learning_rate_changes_where_that_is_stated_and_the_step_is_kept(tmp_path, monkeypatch):
    def start(rate, *stated, **changes):
        first = config(steps=4)
        optimizer = dataclasses.replace(first.optimizer, learning_rate=rate, **changes)
        compute = dataclasses.replace(first.compute, chunk_tokens=64, layers="unroll")
        changed = dataclasses.replace(first, optimizer=optimizer, compute=compute, spikes=SpikeConfig(sigmas=9.0))
        return train(changed, tmp_path, devices=ONE, allow_change=stated)

    with monkeypatch.context() as patch:
        send(patch, "_run_step", signal.SIGTERM, at=1)
        assert train(config(steps=4), tmp_path, devices=ONE).step == 2
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(runs.RunError, match=r"another --workdir, or go on .*: --allow_change=optimizer.learning_rate$"):
        start(3e-3)
    with pytest.raises(runs.RunError, match=r"differing: optimizer.clip 1.0 -> 0.5. .*--allow_change=optimizer.clip$"):
        start(3e-3, "optimizer.learning_rate", clip=0.5)
    with pytest.raises(runs.RunError, match=r"--allow_change=seed: .*only settings of optimizer"):
        start(3e-3, "seed")
    assert (tmp_path / "config.json").read_text() == before

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # after the change was accepted, before it is saved with a step
        patch.setattr(_Run, "loop", killed)
        with pytest.raises(KeyboardInterrupt):
            start(3e-3, "optimizer.learning_rate", max_skipped=7)
    assert start(3e-3, max_skipped=7).finished, "the change has been stated once"
    records = read_metrics(tmp_path)
    change = {"step": 2, "changed": {"optimizer.learning_rate": [1e-2, 3e-3]}}
    assert [record for record in records if "changed" in record] == [change]
    rates = {record["step"]: record["learning_rate"] for record in records if "learning_rate" in record}
    schedule = {1: 1 / 3, 2: 2 / 3, 3: 1.0}
    for step, part in schedule.items():
        assert rates[step] == pytest.approx(part * (1e-2 if step <= 2 else 3e-3))
    assert metas(tmp_path)[4]["config"]["optimizer"]["learning_rate"] == 3e-3


def test_a_run_goes_on_where_its_data_were_moved():
    before = configs.to_dict(config(data=data.PackedRows(path="/old/shards")))
    after = configs.to_dict(config(data=data.PackedRows(path="/new/shards")))
    with pytest.raises(runs.RunError, match=r"data.path '/old/shards' -> .* go on .*: --allow_change=data.path$"):
        runs.check_same(before, after, "run")
    runs.check_stated(["data.path"])
    runs.check_same(before, after, "run", ["data.path"])
    with pytest.raises(runs.RunError, match=r"data\.seed 0 -> 1"):
        runs.check_same(before, {**after, "data": {**after["data"], "seed": 1}}, "run", ["data.path"])


def test_a_second_launch_in_a_folder_is_refused_and_names_the_first(tmp_path):
    settings = {"seed": 0}
    folder, lock = runs.claim(tmp_path / "run", settings)
    with pytest.raises(runs.RunError, match=rf"{folder} is in use by process {os.getpid()} on .*, since 20.*--workdir"):
        runs.claim(tmp_path / "run", settings)
    lock.close()
    runs.claim(tmp_path / "run", settings)[1].close()
    with pytest.raises(runs.RunError, match="holds another run"):
        runs.claim(tmp_path / "run", {"seed": 1})
    runs.claim(tmp_path / "run", settings)[1].close()


def test_the_lock_of_a_killed_launch_is_gone(tmp_path):
    runs.claim(tmp_path, {})[1].close()
    code = "import fcntl, sys, time; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); "
    command = [sys.executable, "-c", f"{code}time.sleep(60)", str(tmp_path / LOCK)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(runs.RunError, match="is in use"):
            runs.claim(tmp_path, {})
        other.kill()
    runs.claim(tmp_path, {})[1].close()


def test_numbers_of_a_run_survive_a_full_disk_at_its_next_start(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    write = Path.write_text

    def half(self, text, **kwargs):
        write(self, text[: len(text) // 2], **kwargs)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", half)
        with pytest.raises(OSError, match="No space"):
            metrics._keep_until(path, 1)
    assert len(read_metrics(tmp_path)) == 2
    metrics._keep_until(path, 1)
    assert read_metrics(tmp_path) == [{"step": 1}]


def test_a_finished_run_of_several_is_not_traced_and_says_so(tmp_path, capfd):
    trace = Trace(tmp_path, (20, 5))
    trace.check(30, 30)
    assert "has finished its 30 steps, so nothing is traced" in capfd.readouterr().out
    with trace.step(20):
        pass
    assert trace.after(24, None) is None and not list(tmp_path.iterdir())


def test_a_signal_in_the_last_save_of_one_run_leaves_the_next_to_be_done(tmp_path, monkeypatch):
    begun, signalled = [], []

    def fake(run, folder, **options):
        begun.append(folder.name)
        assert options == {"allow_change": []}
        return Result(folder, 3, finished=True, heldout=None, interrupted=folder.name in signalled)

    monkeypatch.setattr(lte_jax.train, "train", fake)
    monkeypatch.setattr(experiments.suite, "compare", lambda *_: begun.append("compare"))
    runs_of = [dataclasses.replace(config(), name=name) for name in "ab"]
    for name, done, expected in (("a", False, "a"), ("b", False, "a b"), ("none", True, "a b compare")):
        begun[:], signalled[:] = [], [name]
        assert program._train_all(Suite(tuple(runs_of)), tmp_path, {"allow_change": []}) == done
        assert begun == expected.split()


def test_a_mixture_of_texts_brings_its_tokenizer_to_the_run(tmp_path):
    for name, words in (("one", "abc"), ("same", "abc"), ("other", "cba")):
        (tmp_path / name).mkdir()
        model = tokenizers.models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="a")
        tokenizers.Tokenizer(model).save(str(tmp_path / name / "tokenizer.json"))
    text = {name: data.Text(tokenizer=str(tmp_path / name)) for name in ("one", "same", "other")}
    mixture = data.Mixture((text["one"], text["same"]), (1.0, 1.0))
    runs.save_tokenizer(tmp_path, mixture)
    assert load_tokenizer(tmp_path / "tokenizer").encode("c") == load_tokenizer(tmp_path / "one").encode("c")
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    assert runs.of_other_tokenizer(tmp_path, mixture) == "" == runs.of_other_tokenizer(tmp_path, data.SymbolNeedles())
    assert "other, which gives others" in runs.of_other_tokenizer(tmp_path, text["other"])
    runs.save_tokenizer(tmp_path, text["same"])
    with pytest.raises(runs.RunError, match=r"other' gives other ids than .*tokenizer, with which this run began"):
        runs.save_tokenizer(tmp_path, text["other"])
    assert load_tokenizer(tmp_path / "tokenizer").encode("c") == load_tokenizer(tmp_path / "one").encode("c")
    differing = data.Mixture((text["one"], text["other"]), (1.0, 1.0))
    with pytest.raises(
        data.DataError, match=r"tokenizers .*one, .*other: one model.*; prepare all parts with the same"
    ):
        differing.tokenizer  # noqa: B018
    with pytest.raises(data.DataError, match="one model reads the ids of one"):
        differing.rows()
    assert data.Mixture((data.SymbolNeedles(),), (1.0,)).tokenizer is None
    for read in (lambda empty: empty.length, lambda empty: empty.vocab_size, lambda empty: empty.rows()):
        with pytest.raises(data.DataError, match="at least one data set"):
            read(data.Mixture())
    assert configs.to_dict(mixture)["weights"] == [1.0, 1.0]


@pytest.mark.parametrize("suite", [False, True])
def test_a_folder_of_another_run_is_named_before_the_settings_are_printed(tmp_path, monkeypatch, capsys, suite):
    config = configs.load_named("experiments.configs", "quickstart")
    name = config.runs[1].name if suite else ""
    (tmp_path / name).mkdir(exist_ok=True)
    other = configs.to_dict(dataclasses.replace(config.runs[1], seed=5))
    (tmp_path / name / runs.CONFIG).write_text(json.dumps(other))
    monkeypatch.setattr(configs, "load_named", lambda *_: config if suite else config.runs[1])
    flags = dict(config="a", workdir=str(tmp_path), set=[], allow_change=[], init_from=None, profile=None)
    monkeypatch.setattr(program, "FLAGS", SimpleNamespace(**flags))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(runs.RunError, match="holds another run; differing: seed 5 -> 0"):
        program._train()
    assert capsys.readouterr().out == "" and sorted(tmp_path.rglob("*")) == before
