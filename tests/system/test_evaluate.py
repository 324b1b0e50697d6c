"""Do scores say what the model says: on data sets, through the harness adapter, and from the shell's point of view?"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from experiments.evaluate import evaluate_data, evaluate_tasks, texts
from lte_jax import LTE, GatedDeltaNet, LanguageModel, ModelConfig, configs, restore
from lte_jax.checkpoint import Checkpoints
from lte_jax.data import MQARMix, SymbolNeedles, Text
from lte_jax.data.tokenizer import load_tokenizer
from lte_jax.evaluate import heldout
from lte_jax.evaluate.scores import score_batches

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install -e '.[eval]'"
)
NEEDLES = SymbolNeedles(length=48, needles=4, keys=4, values=4, queries=4, min_distance=16, heldout_rows=22)


@functools.cache
def build() -> LanguageModel:
    pattern = (
        GatedDeltaNet(num_heads=2, head_dim=8, expand_v=1),
        LTE(num_heads=2, num_kv_heads=1, window=13, budget=6, sinks=2),
    )
    config = ModelConfig(vocab_size=260, width=16, num_layers=2, pattern=pattern, init_std=0.3, max_length=96)
    return LanguageModel(config, rngs=nnx.Rngs(0))


def log_probs(tokens, reading: str) -> np.ndarray:
    """The model's own log-probabilities of each next token, from a call of nothing else."""
    logits = build()(np.array([tokens]), reading=reading).logits[0, :-1]
    return np.asarray(jax.nn.log_softmax(logits))[np.arange(len(tokens) - 1), tokens[1:]]


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


def test_rows_of_several_lengths_are_scored_together():
    mix = MQARMix(train=((16, 2, 4),), test=((16, 2, 4), (32, 4, 4)), vocabulary=64)
    scores = heldout.score(build(), mix, batch_size=4)
    assert scores.targets == 4 * 2 + 4 * 4 and scores.loss_by_position.shape == (32,)


def test_the_runs_own_held_out_rows_are_the_default(run, capsys):
    record = evaluate_data(str(run), batch_size=8)
    expected = heldout.score(build(), NEEDLES, batch_size=8)
    written = json.loads((run / "evaluation.json").read_text())
    assert written["loss"] == record["loss"] == pytest.approx(expected.loss)
    assert written["chance"] == 0.25 and written["data"]["length"] == 48 and len(written["by_distance"]) == 4
    assert (run / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    assert "tokens back" in capsys.readouterr().out


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


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_tasks_without_the_harness_say_what_to_install(run):
    with pytest.raises(RuntimeError, match=r"pip install -e '.\[eval\]'"):
        evaluate_tasks(str(run), ["piqa"])


def adapter(**options):
    from lte_jax.evaluate.harness import HarnessModel

    return HarnessModel(build(), load_tokenizer("bytes"), texts, batch_size=4, **options)


def instances(kind: str, arguments: list[tuple]):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, argument, index) for index, argument in enumerate(arguments)]


@needs_harness
@pytest.mark.parametrize("reading", ["prompt", "streaming"])
def test_log_likelihoods_equal_the_models_own(reading):
    asked = [("The cat sat on the", " mat"), ("", "alone"), ("trailing ", "space"), ("x" * 120, "yz"), ("a", "b")]
    found = adapter(reading=reading).loglikelihood(instances("loglikelihood", asked), disable_tqdm=True)
    for (context, continuation), (value, greedy) in zip(asked, found, strict=True):
        whole = [256, *context.encode(), *continuation.encode()]
        size = len(continuation.encode()) + len(context) - len(context.rstrip())
        whole = whole[-97:]  # one more than the longest sequence: the last token is never read
        own = log_probs(whole, "streaming") if reading == "streaming" else log_probs([*whole[:-1], whole[-1]], reading)
        if reading == "streaming":
            np.testing.assert_allclose(value, own[-size:].sum(), atol=1e-4)
        else:  # the prompt reading ranks what it is given: the same call without the last token
            logits = build()(np.array([whole[:-1]]), reading="prompt").logits[0]
            own = np.asarray(jax.nn.log_softmax(logits))[np.arange(len(whole) - 1), whole[1:]]
            np.testing.assert_allclose(value, own[-size:].sum(), atol=1e-4)
            assert greedy == bool((np.asarray(logits).argmax(-1)[-size:] == whole[-size:]).all())


@needs_harness
def test_rolling_log_likelihoods_go_over_the_whole_text(caplog):
    text = "a long text, " * 20  # several windows of 96
    (value,) = adapter(reading="streaming").loglikelihood_rolling(
        instances("loglikelihood_rolling", [(text,)]), disable_tqdm=True
    )
    tokens = [256, *text.encode()]  # the prefix token stands before the first token, which is the bos token itself
    expected, windows = 0.0, [tokens[start : start + 96] for start in range(0, len(tokens), 96)]
    before = 256
    for window in windows:
        context = max(0, 96 - len(window)) if window is windows[-1] and len(windows) > 1 else 0
        start = windows.index(window) * 96
        given = [before, *window] if not context else [*tokens[start - 1 - context : start], *window]
        expected += log_probs(given, "streaming")[-len(window) :].sum()
        before = window[-1]
    np.testing.assert_allclose(value, expected, atol=2e-3)


@needs_harness
def test_generations_stop_where_the_task_says():
    model = adapter(max_gen_toks=12)
    options = {"until": ["\n"], "max_gen_toks": 12}
    contexts = ["abc", "a longer context", "x" * 200]
    found = model.generate_until(instances("generate_until", [(text, options) for text in contexts]), disable_tqdm=True)
    for context, text in zip(contexts, found, strict=True):
        ids = [256, *context.encode()][-(96 - 12) :]
        (own,) = texts(
            build(), [ids], temperature=0.0, top_k=0, top_p=1.0, max_new_tokens=12, eos_id=257,
            decode=load_tokenizer("bytes").decode,
        )  # fmt: skip
        assert text == own.split("\n")[0]


@needs_harness
def test_a_task_of_local_files_runs_and_resumes(run, tmp_path, monkeypatch, capsys):
    rows = [{"question": f"number {n} is", "choices": [" odd", " even"], "answer": n % 2} for n in range(5)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "parity.yaml").write_text(
        f"""
task: parity_local
dataset_path: json
dataset_kwargs:
  data_files:
    test: {tmp_path / "data.jsonl"}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
"""
    )
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    options = dict(include_path=str(tmp_path / "tasks"), cache=str(tmp_path / "answers"))
    first = evaluate_tasks(str(run), ["parity_local"], str(tmp_path / "out.json"), **options)
    expected = []
    for row in rows:
        values = [
            log_probs([256, *(row["question"] + choice).encode()], "streaming")[-len(choice) :].sum()
            for choice in row["choices"]
        ]
        expected.append(int(np.argmax(values)) == row["answer"])
    assert first["n-samples"]["parity_local"]["effective"] == 5
    assert json.loads((tmp_path / "out.json").read_text())["results"] == json.loads(json.dumps(first["results"]))
    assert "parity_local: acc,none" in capsys.readouterr().out
    from lte_jax.evaluate import harness

    monkeypatch.setattr(harness, "_score_batch", None)  # every answer must come out of the file
    again = evaluate_tasks(str(run), ["parity_local"], str(tmp_path / "again.json"), **options)
    assert again["results"] == first["results"]
    with pytest.raises(ValueError, match="no task 'parity_locall'; near: parity_local"):
        evaluate_tasks(str(run), ["parity_locall"], **options)


@needs_harness
def test_the_adapter_refuses_what_cannot_work(run, tmp_path):
    restore.save_model(build(), tmp_path / "bare")
    with pytest.raises(ValueError, match="holds no tokenizer"):
        evaluate_tasks(str(tmp_path / "bare"), ["piqa"])
    with pytest.raises(ValueError, match="leaves no room"):
        adapter(max_length=8).generate_until(instances("generate_until", [("a", {"until": ["\n"]})]), disable_tqdm=True)
    with pytest.raises(ValueError, match="at most max_length=8"):
        adapter(max_length=8).loglikelihood(instances("loglikelihood", [("a", "b" * 9)]), disable_tqdm=True)
