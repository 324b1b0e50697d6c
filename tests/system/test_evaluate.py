"""Do scores on data sets say what the model says, and is bad input refused?"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers
from flax import nnx

from experiments.evaluations import evaluate_data, evaluate_own, evaluate_tasks, inspect
from lte_jax import LTE, GatedDeltaNet, LanguageModel, ModelConfig, configs, restore
from lte_jax.checkpoint import Checkpoints
from lte_jax.data import Copying, MQARMix, SymbolNeedles, Text
from lte_jax.data.tokenizer import load_tokenizer
from lte_jax.evaluate import heldout
from lte_jax.evaluate.scores import score_batches

NEEDLES = SymbolNeedles(length=48, needles=4, keys=4, values=4, queries=4, min_distance=16, heldout_rows=22)


@functools.cache
def build() -> LanguageModel:
    pattern = (
        GatedDeltaNet(num_heads=2, head_dim=8, expand_v=1),
        LTE(num_heads=2, num_kv_heads=1, window=13, budget=6, sinks=2),
    )
    config = ModelConfig(vocab_size=260, width=16, num_layers=2, pattern=pattern, init_std=0.3, max_length=96)
    return LanguageModel(config, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run's folder as training leaves it, with its data set and tokenizer."""
    folder = tmp_path_factory.mktemp("runs") / "needles"
    model = build()
    params = {"/".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.split(model)[1])}
    checkpoints = Checkpoints(folder / "checkpoints", asynchronous=False)
    config = {"model": model.config.to_dict(), "data": {"kind": "SymbolNeedles", **configs.to_dict(NEEDLES)}}
    checkpoints.save(3, {"params": params}, {"config": config})
    checkpoints.close()
    load_tokenizer("bytes").save(folder / "tokenizer")
    return folder


def test_scores_equal_the_models_own():
    scores = heldout.score(build(), NEEDLES, batch_size=8, buckets=3)
    losses, hits, distances = [], [], []
    for row in NEEDLES.rows("heldout"):
        asked = row["labels"] >= 0
        logits = np.asarray(jax.nn.log_softmax(build()(row["input_ids"][None], reading="streaming").logits[0]))
        losses += (-logits[asked, row["labels"][asked]]).tolist()
        hits += (logits[asked].argmax(-1) == row["labels"][asked]).tolist()
        distances += row["distance"][asked].tolist()
    assert scores.targets == len(losses) == 22 * 4
    np.testing.assert_allclose(scores.loss, np.mean(losses), atol=1e-5)
    assert scores.accuracy == pytest.approx(np.mean(hits)) and scores.perplexity == pytest.approx(np.exp(scores.loss))
    assert sum(bucket.queries for bucket in scores.by_distance) == len(losses) and len(scores.by_distance) == 3
    for bucket in scores.by_distance:
        inside = [bucket.low <= distance <= bucket.high for distance in distances]
        assert bucket.queries == sum(inside) and bucket.correct == np.sum(np.array(hits)[inside])
    assert np.isfinite(scores.loss_by_position[-4:]).all() and np.isnan(scores.loss_by_position[:-4]).all()


def test_answers_that_all_lie_equally_far_back_are_one_range():
    scores = heldout.score(build(), Copying(length=32, symbols=4, heldout_rows=8))
    assert [(bucket.low, bucket.high, bucket.queries) for bucket in scores.by_distance] == [(28, 28, 32)]


def test_rows_of_several_lengths_are_scored_together():
    mix = MQARMix(train=((16, 2, 4),), test=((16, 2, 4), (32, 4, 4)), vocabulary=64)
    scores = heldout.score(build(), mix, batch_size=4)
    assert scores.targets == 4 * 2 + 4 * 4 and scores.loss_by_position.shape == (32,)


def test_the_runs_own_held_out_rows_are_the_default(run, capsys):
    record = evaluate_data(str(run), batch_size=8)
    expected = heldout.score(build(), NEEDLES, batch_size=8)
    written = json.loads((run / "evaluation.json").read_text())
    assert written["loss"] == record["loss"] == pytest.approx(expected.loss)
    assert written["step"] == restore.load(run).step is not None
    assert written["chance"] == 0.25 and written["data"]["length"] == 48 and len(written["by_distance"]) == 4
    assert (run / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    assert "tokens back" in capsys.readouterr().out
    for split, kept in (("train", 1), ("heldout", 2)):  # an earlier result is never written over
        evaluate_data(str(run), split=split, batches=1, batch_size=8)
        for name in (f"evaluation-{kept}.json", f"evaluation-{kept}.png", "evaluation.json", "evaluation.png"):
            assert (run / name).exists()
    assert json.loads((run / "evaluation-1.json").read_text()) == written
    assert json.loads((run / "evaluation-2.json").read_text())["split"] == "train"


def test_other_data_and_settings_can_be_named(run, tmp_path):
    (tmp_path / "corpus").mkdir()
    for number in range(3):
        (tmp_path / "corpus" / f"{number}.txt").write_text(f"text number {number} " * 20)
    record = evaluate_data(
        str(run),
        str(tmp_path / "out" / "text.json"),
        kind="Text",
        assignments=[f"path={tmp_path / 'corpus'}", "packing.length=64"],
        split="train",
        batch_size=2,
        batches=2,
    )
    assert record["data"]["kind"] == "Text" and record["by_distance"] == [] and record["targets"] > 100
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["text.json", "text.png"]


def test_text_is_written_with_the_checkpoints_own_tokenizer(tmp_path):
    """Bytes read by a model of words would have a perplexity too."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0, "a": 1, "b": 2, "c": 3}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.add_special_tokens(["</s>"])
    words.save(str(tmp_path / "tokenizer.json"))
    restore.save_model(build(), tmp_path / "run", tokenizer=load_tokenizer(tmp_path / "tokenizer.json"))
    restore.save_model(build(), tmp_path / "bare")
    (tmp_path / "text.txt").write_text("a b c " * 20)
    text = dict(kind="Text", split="train", batch_size=1, batches=1)
    given = [f"path={tmp_path / 'text.txt'}", "packing.length=64"]
    record = evaluate_data(str(tmp_path / "run"), assignments=given, **text)
    assert record["targets"] == 60 and record["data"]["tokenizer"].startswith(str(tmp_path / "run"))
    with pytest.warns(UserWarning, match="of tokenizer 'bytes', whose ids are not those of the checkpoint's own"):
        evaluate_data(str(tmp_path / "run"), assignments=[*given, "tokenizer=bytes"], **text)
    with pytest.raises(ValueError, match="--data=Text: the checkpoint holds no tokenizer to read text with; --set tok"):
        evaluate_data(str(tmp_path / "bare"), assignments=given, **text)


def test_other_rows_held_out_than_the_run_held_out_are_said(tmp_path):
    text = Text(path=str(tmp_path), heldout=0.05)
    saved = {"data": {"kind": "Text", **configs.to_dict(text)}}
    for given, said in (
        (["heldout=0.2"], 1),
        (["seed=4"], 1),
        ([], 0),
        (["packing.length=64"], 0),
        (["path=x", "seed=4"], 0),
    ):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            heldout.data_set(saved, None, given)
        assert len(found) == said and all("it was trained on some of" in str(warning.message) for warning in found)


def test_bad_input_is_refused(run, tmp_path):
    restore.save_model(build(), tmp_path / "bare")
    text = Text(path=str(Path(__file__)))
    cases = [
        ("names no data set; name one with --data", lambda: evaluate_data(str(tmp_path / "bare"))),
        ("kind 'Poetry' is not one of", lambda: evaluate_data(str(run), kind="Poetry")),
        ("no setting 'lenght'.*'length'", lambda: evaluate_data(str(run), assignments=["lenght=4"])),
        ("below the model's vocab_size 260", lambda: heldout.score(build(), dataclasses.replace(NEEDLES, fillers=300))),
        ("have no end", lambda: heldout.score(build(), NEEDLES, split="train")),
        ("batches=0", lambda: heldout.score(build(), NEEDLES, batches=0)),
        ("holds out no rows", lambda: heldout.score(build(), text)),
        ("nothing to score", lambda: score_batches(build(), [])),
    ]
    for message, call in cases:
        with pytest.raises(ValueError, match=message):
            call()
    assert sorted(path.name for path in (tmp_path / "bare").iterdir()) == ["checkpoints", "config.json"]


def test_results_that_could_not_be_written_are_not_computed(run, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(restore, "load", None)  # would be called first of all that takes time
    for write in (evaluate_data, lambda *rest: evaluate_own(rest[0], "needles", rest[1]), inspect):
        with pytest.raises(ValueError, match=r"file/out.* cannot be written; name another file with --output"):
            write(str(run), str(tmp_path / "file" / "out"))
    for place in ("/dev/null", str(tmp_path)):
        with pytest.raises(ValueError, match=f"{place} cannot be written"):
            evaluate_data(str(run), place)
    with pytest.raises(ValueError, match=r"out.png: the name of the JSON file; the picture beside it takes .png"):
        evaluate_data(str(run), str(tmp_path / "out.png"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # as a folder that may only be read
    with pytest.raises(ValueError, match=r"evaluation.json cannot be written"):
        evaluate_data(str(run))


def test_tasks_without_the_harness_say_what_to_install(run, monkeypatch):
    for name in ["lm_eval", *(module for module in sys.modules if module.startswith("lm_eval."))]:
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "lte_jax.evaluate.harness", raising=False)
    with pytest.raises(RuntimeError, match=r"pip install -e '.\[eval\]'"):
        evaluate_tasks(str(run), ["piqa"])
