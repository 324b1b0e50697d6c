"""Do the tasks of our own score what the model says, by length and depth, and do they repeat from their seed?"""

from __future__ import annotations

import functools
import itertools
import json
import math
import warnings

import jax
import numpy as np
import pytest
from flax import nnx

from experiments.evaluations import evaluate_own, evaluate_text
from experiments.warned import say_warnings
from lte_jax import LTE, GatedDeltaNet, LanguageModel, ModelConfig, restore
from lte_jax.data import Copying, SymbolNeedles, TextNeedles
from lte_jax.data.tokenizer import load_tokenizer
from lte_jax.evaluate import own
from lte_jax.lengths import LengthWarning

OPTIONS = own.Options(num_samples=6, seed=3, batch_size=4)


@functools.cache
def build() -> LanguageModel:
    pattern = (
        GatedDeltaNet(num_heads=2, head_dim=8, expand_v=1),
        LTE(num_heads=2, num_kv_heads=1, window=13, budget=6, sinks=2),
    )
    config = ModelConfig(vocab_size=260, width=16, num_layers=2, pattern=pattern, init_std=0.3, max_length=128)
    return LanguageModel(config, rngs=nnx.Rngs(0))


@functools.cache
def loss(tokens: tuple[int, ...]) -> np.ndarray:
    """Of each next token, in nats; padded to 64 tokens by a document of its own."""
    ids, segments = np.zeros((1, 64), np.int32), np.full((1, 64), 2, np.int32)
    ids[0, : len(tokens)], segments[0, : len(tokens)] = tokens, 1
    logits = build()(ids, segment_ids=segments, reading="streaming").logits[0, : len(tokens) - 1]
    return -np.asarray(jax.nn.log_softmax(logits))[np.arange(len(tokens) - 1), tokens[1:]]


def test_needles_are_counted_in_the_depth_where_they_lie():
    task = SymbolNeedles(length=64, needles=4, keys=4, values=4, queries=4, min_distance=16)
    found = own.needles(build(), task, OPTIONS, depths=4)
    assert sum(row["samples"] for row in found.rows) == 6 * 4 == found.total["samples"]
    expected: dict[float, list[bool]] = {}
    rows = SymbolNeedles(length=64, needles=4, keys=4, values=4, queries=4, min_distance=16, seed=3).rows("heldout")
    for index in range(6):
        row = rows[index]
        first = build()(row["input_ids"][None], reading="streaming").logits[0].argmax(-1)
        for at in np.flatnonzero(row["labels"] >= 0):
            depth = int((1 - row["distance"][at] / 64) * 4)
            expected.setdefault(depth, []).append(bool(first[at] == row["labels"][at]))
    assert {row["depth"]: row["accuracy"] for row in found.rows} == {
        (depth + 0.5) / 4: np.mean(hits) for depth, hits in expected.items()
    }
    assert own.needles(build(), task, OPTIONS, depths=4) == found
    with pytest.raises(ValueError, match="depths=0: it must be at least 1"):
        own.needles(build(), task, OPTIONS, depths=0)


def test_text_needles_lie_at_the_depths_asked_for():
    found = own.needles(build(), TextNeedles(), OPTIONS, lengths=[128], depths=2)
    assert [(row["length"], row["depth"], row["samples"]) for row in found.rows] == [(128, 0, 6), (128, 1, 6)]
    assert found.total["accuracy"] == 0.0


def test_recall_and_copying_have_a_cell_for_each_length():
    found = own.mqar(build(), OPTIONS, parts=((64, 4), (64, 2)), vocabulary=128)
    assert [(row["length"], row["pairs"], row["samples"]) for row in found.rows] == [(64, 4, 24), (64, 2, 12)]
    near = own.mqar(build(), OPTIONS, parts=((64, 2),), vocabulary=128, power=3.0)
    assert near.settings["power"] == 3.0 and found.settings["power"] == 0.01
    copied = own.copying(build(), Copying(length=64, symbols=4), OPTIONS)
    assert [row["samples"] for row in copied.rows] == [24]
    assert {"length", "accuracy", "samples"} == set(copied.rows[0])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "a.txt").write_text("a first text, longer than one window of the model is; it goes on and on, and on. é")
    (folder / "b.txt").write_text("a second text, " * 8)
    return folder


def test_byte_perplexity_is_that_of_all_windows(corpus):
    found = own.bytes_perplexity(build(), load_tokenizer("bytes"), str(corpus), OPTIONS, length=40)
    total, count = 0.0, 0
    for name in ("a.txt", "b.txt"):
        text = (corpus / name).read_bytes()
        ids = [256, *text]
        nll = sum(loss(tuple(ids[at : at + 41])).sum() for at in range(0, len(ids) - 1, 40))
        row = next(row for row in found.rows if str(row["file"]).endswith(name))
        assert row["samples"] == len(text) and row["bits_per_byte"] == pytest.approx(
            nll / len(text) / math.log(2), rel=1e-4
        )
        total, count = total + nll, count + len(text)
    assert found.total["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)


def test_perplexity_by_position_is_the_models_own(corpus):
    found = own.positions(build(), load_tokenizer("bytes"), str(corpus), OPTIONS, length=60, ranges=3)
    rows = np.stack([loss((256, *(corpus / name).read_bytes()[:59])) for name in ("a.txt", "b.txt")])
    edges = [0, 20, 39, 59]
    expected = [np.exp(rows[:, low:high].mean()) for low, high in itertools.pairwise(edges)]
    np.testing.assert_allclose([row["perplexity"] for row in found.rows], expected, rtol=1e-4)
    with pytest.raises(ValueError, match="no document has 5000 tokens"):
        own.positions(build(), load_tokenizer("bytes"), str(corpus), OPTIONS, length=5000)


def test_the_program_writes_numbers_and_a_picture(corpus, tmp_path, capsys):
    restore.save_model(build(), tmp_path / "run", tokenizer=load_tokenizer("bytes"))
    run, chosen = str(tmp_path / "run"), dict(num_samples=4, batch_size=4)
    record = evaluate_own(run, "copying", assignments=["length=64", "symbols=4"], **chosen)
    assert json.loads((tmp_path / "run" / "copying.json").read_text()) == json.loads(json.dumps(record))
    evaluate_own(run, "needles", str(tmp_path / "n.json"), lengths=[128], depths=2, text=str(corpus), **chosen)
    evaluate_text(run, "bytes", str(tmp_path / "b.json"), text=str(corpus), length=40, **chosen)
    for path in (tmp_path / "run" / "copying.png", tmp_path / "n.png", tmp_path / "b.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    assert "bits_per_byte" in capsys.readouterr().out
    for message, name, options in (
        ("takes TextNeedles or SymbolNeedles", "needles", {"kind": "MQAR"}),
        ("draws its own tokens; drop it", "copying", {"text": str(corpus)}),
        ("has no such length", "mqar", {"lengths": [7]}),
        ("num_samples=0", "copying", {"num_samples": 0}),
        ("GiB, and the device has .* shorten the rows", "needles", {"lengths": [10**12]}),
        ("a row needs 4.. of hay, and none stands there twice", "needles", {"text": str(corpus), "lengths": [500]}),
        ("below the model's vocab_size 260", "mqar", {"kind": "MQAR"}),
        ("--set seed=3: --own draws its own samples; say --seed", "needles", {"assignments": ["seed=3"]}),
    ):
        with pytest.raises(ValueError, match=message), warnings.catch_warnings():
            warnings.simplefilter("ignore", LengthWarning)
            evaluate_own(run, name, str(tmp_path / "none.json"), **{**chosen, **options})
    with pytest.raises(ValueError, match="needs --text"):
        evaluate_text(run, "bytes", str(tmp_path / "none.json"), **chosen)
    assert not list(tmp_path.glob("none*"))


def test_needles_in_text_are_written_with_the_checkpoints_tokenizer(tmp_path, monkeypatch):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = Tokenizer(
        models.BPE({piece: n for n, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    pieces.save(str(tmp_path / "tokenizer.json"))
    restore.save_model(build(), tmp_path / "run", tokenizer=load_tokenizer(tmp_path))
    restore.save_model(build(), tmp_path / "bare")
    asked: list[str] = []
    needles = own.needles
    monkeypatch.setattr(
        own, "needles", lambda model, task, *a, **k: asked.append(task.tokenizer) or needles(model, task, *a, **k)
    )
    options = dict(lengths=[128], depths=1, num_samples=2, batch_size=2)
    evaluate_own(str(tmp_path / "run"), "needles", str(tmp_path / "a.json"), **options)
    evaluate_own(str(tmp_path / "run"), "needles", str(tmp_path / "b.json"), tokenizer="bytes", **options)
    assert asked == [str(tmp_path / "run" / "tokenizer" / "tokenizer.json"), "bytes"]
    with pytest.raises(ValueError, match="holds no tokenizer: name one"):
        evaluate_own(str(tmp_path / "bare"), "needles", **options)


def test_lengths_beyond_the_models_are_one_warning_and_no_stop(tmp_path, capsys):
    restore.save_model(build(), tmp_path / "run", tokenizer=load_tokenizer("bytes"))
    with warnings.catch_warnings():
        warnings.simplefilter("always", LengthWarning)
        say_warnings()
        for length in (192, 256):
            evaluate_own(str(tmp_path / "run"), "needles", lengths=[length], depths=1, num_samples=2, batch_size=2)
    assert (tmp_path / "run" / "needles.json").exists()
    assert capsys.readouterr().err.count("warning: sequences may be longer than the 128 tokens") == 1
