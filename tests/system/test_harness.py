"""Through the harness: does the adapter say what the model says, resume after a kill, and refuse what cannot work?"""

from __future__ import annotations

import functools
import importlib.util
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from experiments.evaluations import evaluate_tasks, texts
from lte_jax import LTE, GatedDeltaNet, LanguageModel, ModelConfig, restore
from lte_jax.data.tokenizer import load_tokenizer
from lte_jax.lengths import LengthWarning

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install -e '.[eval]'"
    ),
    # Libraries that the harness brings: sqlite and dill handles, deprecated names.
    pytest.mark.filterwarnings("default"),
]


@functools.cache
def build() -> LanguageModel:
    pattern = (
        GatedDeltaNet(num_heads=2, head_dim=8, expand_v=1),
        LTE(num_heads=2, num_kv_heads=1, window=13, budget=6, sinks=2),
    )
    config = ModelConfig(vocab_size=260, width=16, num_layers=2, pattern=pattern, init_std=0.3, max_length=96)
    graph, state = nnx.split(LanguageModel(config, rngs=nnx.Rngs(0)))
    # Placed as a restored model is: one program serves both.
    return nnx.merge(graph, jax.device_put(state, jax.devices()[0]))


def log_probs(tokens, reading: str) -> np.ndarray:
    """The model's own log-probabilities of each next token, from a call of nothing else; the last one is not read.

    Each length is a program to compile: let texts share one.
    """
    return ranked(tokens, reading)[0]


def ranked(tokens, reading: str) -> tuple[np.ndarray, np.ndarray]:
    """``log_probs``, and whether each token is the likeliest."""
    logits = np.asarray(build()(np.array([tokens[:-1]]), reading=reading).logits[0])
    log_normalizer = np.log(np.sum(np.exp(logits - logits.max(-1, keepdims=True)), -1)) + logits.max(-1)
    chosen = logits[np.arange(len(tokens) - 1), tokens[1:]]
    return chosen - log_normalizer, logits.argmax(-1) == tokens[1:]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "model"
    restore.save_model(build(), folder, tokenizer=load_tokenizer("bytes"))
    return folder


def adapter(**options):
    from lte_jax.evaluate.harness import HarnessModel

    return HarnessModel(build(), load_tokenizer("bytes"), texts, batch_size=4, **options)


def instances(kind: str, arguments: list[tuple]):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, argument, index) for index, argument in enumerate(arguments)]


@pytest.mark.rotating
@pytest.mark.parametrize("reading", ["prompt", "streaming"])
def test_log_likelihoods_equal_the_models_own(reading):
    # Of one length, and one text beyond the model's.
    asked = [("The cat sat", " on"), ("", "alone in here."), ("trailing ", "space"), ("x" * 120, "yz"), ("a" * 13, "b")]
    found = adapter(reading=reading).loglikelihood(instances("loglikelihood", asked), disable_tqdm=True)
    for (context, continuation), (value, greedy) in zip(asked, found, strict=True):
        whole = [256, *context.encode(), *continuation.encode()]
        size = len(continuation.encode()) + len(context) - len(context.rstrip())
        whole = whole[-97:]  # one more than the longest sequence: the last token is never read
        own, likeliest = ranked(whole, reading)
        np.testing.assert_allclose(value, own[-size:].sum(), atol=1e-4)
        assert greedy == likeliest[-size:].all()


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


def test_generations_stop_where_the_task_says():
    # Room for 64 tokens of a context: all are padded to one length.
    model = adapter(max_gen_toks=32)
    options = {"until": ["\n"], "max_gen_toks": 32}
    contexts = ["abc", "a longer context", "x" * 200]
    found = model.generate_until(instances("generate_until", [(text, options) for text in contexts]), disable_tqdm=True)
    for context, text in zip(contexts, found, strict=True):
        ids = [256, *context.encode()][-(96 - 32) :]
        (own,) = texts(
            build(), [ids], temperature=0.0, top_k=0, top_p=1.0, max_new_tokens=32, eos_id=257,
            decode=load_tokenizer("bytes").decode,
        )  # fmt: skip
        assert text == own.split("\n")[0]


def test_repeats_of_a_drawn_answer_differ_and_come_again_with_the_seed():
    drawn = {"until": ["\n"], "max_gen_toks": 32, "do_sample": True, "temperature": 1.0}
    asked = instances("generate_until", [("abc", drawn)] * 3)
    first, again, other = (
        adapter(max_gen_toks=32, seed=seed).generate_until(asked, disable_tqdm=True) for seed in (0, 0, 1)
    )
    assert first == again and len({*first, *other}) == 6


def put(folder: Path, name: str, split: str, rows: list[dict]) -> None:
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def documents(tmp_path_factory) -> Path:
    """Local files in place of a hub."""
    folder = tmp_path_factory.mktemp("documents")
    rows = [{"goal": f"number {n} is", "sol1": "odd", "sol2": "two", "label": 1 - n % 2} for n in range(5)]
    put(folder, "baber/piqa", "validation", rows)
    put(folder, "baber/piqa", "train", rows)
    put(
        folder,
        "hazyresearch/based-fda",
        "validation",
        [{"text": f"Price: {n}0 USD\nPrice: ", "value": "a"} for n in "123"],
    )
    endings = [{"text": f"the cat of {n} sat on the thick mat"} for n in range(3)]
    put(folder, "EleutherAI/lambada_openai", "test", endings)
    return folder


@pytest.fixture(autouse=True, scope="module")
def one_index():
    """The harness reads 14,000 task files each time that it is started: here those of four folders, once."""
    from lm_eval.tasks._index import TaskIndex

    read = functools.cache(TaskIndex.build)
    with pytest.MonkeyPatch.context() as patch:
        folders = ("fda", "lambada", "piqa", "ruler")
        patch.setattr(TaskIndex, "build", lambda self, paths: dict(read(tuple(x / y for x in paths for y in folders))))
        yield


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_tasks_of_local_documents_score_what_the_model_says(run, documents, tmp_path, capsys):
    found = evaluate_tasks(
        str(run),
        ["piqa", "lambada_openai", "fda_v0", "fda"],
        str(tmp_path / "out.json"),
        local_data=str(documents),
        log_samples=True,
    )
    hits = []
    for n in range(5):
        question = f"Question: number {n} is\nAnswer:"
        values = [
            log_probs([256, *(question + choice).encode()], "prompt")[-len(choice) :].sum()
            for choice in (" odd", " two")
        ]
        hits.append(int(np.argmax(values)) == 1 - n % 2)
    assert found["results"]["piqa"]["acc,none"] == pytest.approx(np.mean(hits))
    asked = [log_probs([256, *f"the cat of {n} sat on the thick mat".encode()], "prompt")[-4:].sum() for n in range(3)]
    assert found["results"]["lambada_openai"]["perplexity,none"] == pytest.approx(np.exp(-np.mean(asked)), rel=1e-4)
    assert found["versions"]["fda_v0"] == 0 and found["versions"]["fda"] == 1
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["results"] == json.loads(json.dumps(found["results"])) and written["truncated"] == 0
    samples = [json.loads(line) for line in (tmp_path / "out.samples.jsonl").read_text().splitlines()]
    assert [sample["task"] for sample in samples] == ["piqa"] * 5 + ["lambada_openai"] * 3 + ["fda_v0"] * 3 + [
        "fda"
    ] * 3
    answers = [sample["filtered_resps"][0] for sample in samples if sample["task"] == "fda_v0"]
    assert found["results"]["fda_v0"]["contains,none"] == np.mean(["a" in answer.lower() for answer in answers])
    assert all("\n" not in answer for answer in answers)
    assert "lambada_openai: perplexity,none" in capsys.readouterr().out


def test_a_group_has_a_number_of_its_own(run, documents, tmp_path):
    folder = tmp_path / "tasks" / "piqa"  # of which the index above reads
    folder.mkdir(parents=True)
    (folder / "both.yaml").write_text(
        "group: both\ntask: [piqa, lambada_openai]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    where = dict(local_data=str(documents), include_path=str(tmp_path / "tasks"))
    results = evaluate_tasks(str(run), ["both"], str(tmp_path / "out.json"), **where)["results"]
    parts = [results[name]["acc,none"] for name in ("piqa", "lambada_openai")]
    assert results["both"]["acc,none"] == pytest.approx((5 * parts[0] + 3 * parts[1]) / 8)


def test_a_killed_evaluation_goes_on_where_it_stopped(run, documents, tmp_path, monkeypatch):
    options = dict(local_data=str(documents), adapter={"answers": str(tmp_path / "answers.jsonl"), "batch_size": 4})
    from lte_jax.evaluate import harness

    original, calls = harness._score_batch, []

    def killed(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(harness, "_score_batch", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate_tasks(str(run), ["piqa"], str(tmp_path / "out.json"), **options)
    assert not (tmp_path / "out.json").exists()
    with (tmp_path / "answers.jsonl").open("a") as file:
        file.write('{"key": "half a li')
    first = evaluate_tasks(str(run), ["piqa"], str(tmp_path / "out.json"), **options)
    assert len(calls) == 1 + 1 + 2, "4 of 10 answers were known: two more batches"
    monkeypatch.setattr(harness, "_score_batch", None)  # every answer must come out of the file
    again = evaluate_tasks(str(run), ["piqa"], str(tmp_path / "again.json"), **options)
    assert again["results"] == first["results"]


def test_what_was_cut_is_counted_of_known_answers_too_and_another_end_token_is_another_evaluation(tmp_path):
    from lte_jax.evaluate.answers import AnswersError
    from lte_jax.evaluate.harness import HarnessModel

    asked = instances("generate_until", [("x" * 200, {"until": ["\n"], "max_gen_toks": 32})])
    for _ in range(2):  # the second time from the file
        found = adapter(max_gen_toks=32, answers=tmp_path / "answers.jsonl")
        found.generate_until(asked, disable_tqdm=True)
        assert found.truncated == 1
    bytes_ending = load_tokenizer("bytes")
    bytes_ending.eos_id, bytes_ending.fingerprint = 10, lambda: "bytes that end at a line"
    with pytest.raises(AnswersError, match="differing: tokenizer"):
        HarnessModel(build(), bytes_ending, texts, max_gen_toks=32, batch_size=4, answers=tmp_path / "answers.jsonl")


def test_a_process_killed_outright_goes_on_where_it_stopped(run, tmp_path):
    """kill -9 of the program itself, at a moment of nobody's choosing; the rest is what a run without it says."""
    rows = [{"goal": f"number {n} is", "sol1": "odd", "sol2": "two", "label": 1 - n % 2} for n in range(150)]
    for split in ("validation", "train"):
        put(tmp_path / "documents", "baber/piqa", split, rows)
    cache = tmp_path / "answers.jsonl"
    places = (f"--local_data={tmp_path / 'documents'}", f"--cache={cache}", f"--output={tmp_path / 'killed.json'}")
    task = ("--tasks=piqa", "--batch_size=1", f"--checkpoint={run}")
    command = [sys.executable, "-m", "experiments.evaluate", *task, *places]

    def answers(path: Path) -> list[str]:
        return path.read_text().splitlines()[1:] if path.exists() else []

    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while len(answers(cache)) < 20:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.005)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    before = answers(cache)
    assert 20 <= len(before) < 300 and not list(tmp_path.glob("killed*")), "killed in the middle, and nothing written"

    def evaluate(name: str, path: Path) -> None:
        options = dict(adapter={"answers": str(path), "batch_size": 1}, local_data=str(tmp_path / "documents"))
        evaluate_tasks(str(run), ["piqa"], str(tmp_path / f"{name}.json"), **options)

    evaluate("killed", cache)
    evaluate("whole", tmp_path / "other.jsonl")
    assert answers(cache)[: len(before) - 1] == before[:-1], "what was answered is not asked again"
    assert sorted(answers(cache)) == sorted(answers(tmp_path / "other.jsonl")) and len(answers(cache)) == 300
    killed, whole = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("killed", "whole"))
    assert killed["results"] == whole["results"] and killed["n-samples"]["piqa"]["effective"] == 150


def test_answers_of_another_evaluation_or_damaged_ones_are_refused(run, documents, tmp_path):
    from lte_jax.evaluate.answers import Answers, AnswersError

    path = tmp_path / "answers.jsonl"
    Answers(path, {"model": "a", "reading": "prompt"}).add("generation", ["x", {}], "y")
    assert Answers(path, {"model": "a", "reading": "prompt"}).find("generation", ("x", {})) == "y"
    with pytest.raises(AnswersError, match="another evaluation; differing: reading"):
        Answers(path, {"model": "a", "reading": "streaming"})
    with pytest.raises(AnswersError, match="another evaluation; differing: add_bos_token, dtype, "):
        evaluate_tasks(str(run), ["piqa"], local_data=str(documents), adapter={"answers": str(path)})
    path.write_text(path.read_text() + "garbage\n")
    with pytest.raises(AnswersError, match="line 3: damaged"):
        Answers(path, {"model": "a", "reading": "prompt"})
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(AnswersError, match="no file of answers can be read"):
        Answers(path, {})
    (tmp_path / "notes.jsonl").write_text('{"some": "notes"}\n')
    with pytest.raises(AnswersError, match="not a file of answers"):
        Answers(tmp_path / "notes.jsonl", {})
    assert not (run / "tasks.json").exists()


def test_a_mesh_answers_as_one_device_does(run, documents, tmp_path):
    options = dict(local_data=str(documents))
    alone = evaluate_tasks(str(run), ["piqa", "fda_v0"], str(tmp_path / "one.json"), **options)
    shared = evaluate_tasks(
        str(run), ["piqa", "fda_v0"], str(tmp_path / "two.json"), adapter={"devices": 2, "batch_size": 8}, **options
    )
    assert shared["results"] == alone["results"]
    with pytest.raises(ValueError, match="batch_size=3 is not a multiple of the 2 devices"):
        evaluate_tasks(str(run), ["piqa"], adapter={"devices": 2, "batch_size": 3}, **options)
    with pytest.raises(ValueError, match=r"--devices=9: it must lie in \[1, 8\]"):
        evaluate_tasks(str(run), ["piqa"], adapter={"devices": 9}, **options)


def test_lengths_beyond_the_models_are_said_and_empty_contexts_begin_a_text():
    with pytest.warns(LengthWarning, match="longer than the 96 tokens that the model was made for"):
        asked = adapter(max_length=200, add_bos_token=False)
    (value, _) = asked.loglikelihood(instances("loglikelihood", [("", "abc")]), disable_tqdm=True)[0]
    np.testing.assert_allclose(value, log_probs([256, *b"abc"], "prompt").sum(), atol=1e-4)
    options = {"until": ["\n"], "max_gen_toks": 16}
    (text,) = asked.generate_until(instances("generate_until", [("", options)]), disable_tqdm=True)
    assert text == adapter(max_length=200).generate_until(instances("generate_until", [("", options)]), True)[0]


def test_names_for_several_tasks():
    from lte_jax.evaluate.tasks import SETS, expand

    assert expand(["retrieval", "piqa", "short_context"])[:5] == [
        "swde_v0",
        "fda_v0",
        "squad_completion_v0",
        "piqa",
        "wikitext",
    ]
    assert len(set(expand(list(SETS)))) == len(expand(list(SETS)))


def test_the_adapter_refuses_what_cannot_work(run, tmp_path, monkeypatch):
    # Without waiting for a network that is not there.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    restore.save_model(build(), tmp_path / "bare")
    with pytest.raises(ValueError, match="holds no tokenizer"):
        evaluate_tasks(str(tmp_path / "bare"), ["piqa"])
    with pytest.raises(ValueError, match="leaves no room"):
        adapter(max_length=8).generate_until(instances("generate_until", [("a", {"until": ["\n"]})]), disable_tqdm=True)
    with pytest.raises(ValueError, match="at most max_length=8"):
        adapter(max_length=8).loglikelihood(instances("loglikelihood", [("a", "b" * 9)]), disable_tqdm=True)
    with pytest.raises(ValueError, match=r"--lengths=300000000: every such sample would be cut to max_length=96"):
        evaluate_tasks(str(run), ["niah_single_1"], lengths=[1024, 300_000_000])
    with pytest.raises(ValueError, match=r"8 rows of 1,000,000,000,000 tokens: .* GiB, and the device has"):
        evaluate_tasks(str(run), ["niah_single_1"], adapter={"max_length": 10**12})
    with pytest.raises(ValueError, match="no task 'piqaa'; near: piqa"):
        evaluate_tasks(str(run), ["piqaa"])
    with pytest.raises(ValueError, match=r"piqa: its documents cannot be read from the hub .*; give local files"):
        evaluate_tasks(str(run), ["piqa"])
    with pytest.raises(ValueError, match="no such folder"):
        evaluate_tasks(str(run), ["piqa"], local_data=str(tmp_path / "nowhere"))
    (tmp_path / "tokenizer").mkdir()
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({str(n): n for n in range(300)}, unk_token="0")).save(
        str(tmp_path / "tokenizer/tokenizer.json")
    )
    with pytest.raises(ValueError, match="300 ids: they must be below the model's vocab_size 260"):
        evaluate_tasks(str(run), ["piqa"], tokenizer=str(tmp_path / "tokenizer"))
    assert not (run / "tasks.json").exists()
