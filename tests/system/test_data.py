"""Do the data keep their promises: every token once, rows by (seed, index), one position for any process count?"""

import dataclasses
import json

import numpy as np
import pytest

from lte_jax import configs, data
from lte_jax.data import packing, pipeline, sources, tokenizer
from tests.system.data_samples import batches, same, small_text, write_jsonl

# --- packing


@pytest.mark.parametrize(("method", "split"), [("best_fit", True), ("greedy", True), ("greedy", False)])
def test_packing_keeps_every_token_once(method, split):
    rng = np.random.default_rng(3)
    sizes = rng.integers(0, 90 if split else 32, 60)
    texts, start = [], 0
    for size in sizes:
        texts.append(np.arange(start, start + size))
        start += size
    document_of = np.repeat(np.arange(len(sizes)), sizes)
    rows = list(packing.pack(texts, packing.Packing(31, method, split)))
    tokens = np.concatenate([np.concatenate(row) for row in rows])
    assert np.array_equal(np.sort(tokens), np.arange(start))
    for segments in rows:
        row = packing.with_labels(packing.row_of_segments(segments, 31, pad_id=7))
        ids, segment, labels = row["input_ids"], row["segment_ids"], row["labels"]
        asked = labels != data.IGNORE
        assert np.array_equal(labels[asked], ids[asked] + 1)  # tokens are numbered in reading order
        assert np.array_equal(document_of[labels[asked]], document_of[ids[asked]])
        assert asked.sum() == sum(len(piece) - 1 for piece in segments)
        assert (ids[segment == 0] == 7).all() and (labels[segment == 0] == data.IGNORE).all()
        assert list(dict.fromkeys(segment[segment > 0])) == list(range(1, len(segments) + 1))
    if method == "best_fit":
        pieces = sum(-(-size // 31) for size in sizes)
        assert sum(map(len, rows)) == pieces
    elif split:
        assert len(rows) == -(-start // 31)


def test_packing_refuses_what_it_cannot_do():
    with pytest.raises(data.DataError, match=r"document 1 has 9 tokens.*split=true"):
        list(packing.pack([[1], range(9)], packing.Packing(8, "greedy", split=False)))
    with pytest.raises(data.DataError, match="unknown packing"):
        packing.pack([], packing.Packing(8, "worst_fit"))  # type: ignore[arg-type]


# --- tasks

TASKS = [
    data.SymbolNeedles(),
    data.MQAR(length=64, pairs=8),
    data.Copying(),
    data.TextNeedles(length=400, keys=3, values=2, min_distance=40),
]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: type(task).__name__)
def test_task_rows_depend_on_seed_and_index_alone(task):
    rows = task.rows()
    forward = [rows[index] for index in range(5)]
    assert all(same(task.rows()[index], forward[index]) for index in reversed(range(5)))
    assert not same(forward[0], forward[1])
    assert not same(dataclasses.replace(task, seed=1).rows()[0], forward[0])
    assert not same(task.rows("heldout")[0], forward[0])
    for row in forward:
        assert all(array.shape == (task.length,) and array.dtype == np.int32 for array in row.values())
        assert row["input_ids"].min() >= 0 and max(row["input_ids"].max(), row["labels"].max()) < task.vocab_size
        assert np.array_equal(row["distance"] > 0, row["labels"] != data.IGNORE)


def test_symbol_needles_are_answerable_and_far():
    task = data.SymbolNeedles(min_distance=30)
    answers = []
    for index in range(200):
        row = task.rows()[index]
        at = np.nonzero(row["distance"])[0]
        assert list(at) == list(range(88, 96)) and row["distance"].max() < 96
        assert (row["distance"][at] >= 30).all()
        key, value = np.divmod(row["input_ids"][at - row["distance"][at]] - task.fillers, task.values)
        assert np.array_equal(row["input_ids"][at], task.fillers + 64 + key)
        assert np.array_equal(row["labels"][at], task.fillers + 72 + value)
        assert len(set(key)) == 8
        answers.extend(value)
    assert abs(np.bincount(answers, minlength=8) / len(answers) - task.chance).max() < 0.04


def test_mqar_follows_the_recipe():
    task = data.MQAR(length=128, pairs=16)
    gaps = []
    for index in range(200):
        row = task.rows()[index]
        keys, values = row["input_ids"][0:32:2], row["input_ids"][1:32:2]
        assert len(set(keys)) == len(set(values)) == 16
        assert keys.min() >= 1 and keys.max() < 4096 and values.min() >= 4096
        at = np.nonzero(row["labels"] != data.IGNORE)[0]
        assert len(at) == 16 and (at >= 32).all() and (at % 2 == 0).all()
        table = dict(zip(keys, values, strict=True))
        assert [table[key] for key in row["input_ids"][at]] == list(row["labels"][at])
        assert np.array_equal(row["input_ids"][at - row["distance"][at]], row["labels"][at])
        gaps.extend((at - 32) // 2)
    counts = np.bincount(gaps, minlength=48)
    assert counts[0] > 195 and counts[:8].sum() > 2.5 * counts[-8:].sum()  # p(i) ~ i^-0.99 without replacement


def test_mqar_mix_never_mixes_lengths():
    mix = data.MQARMix(train=((64, 4, 30), (128, 8, 20)), test=((64, 4, 8),))
    found = batches(16, mix.rows(batch_size=8), 8)
    assert {batch["input_ids"].shape for batch in found} == {(8, 64), (8, 128)}
    first, second = found[:5], found[5:10]  # two epochs: the same batches in another order
    keys = [[batch["input_ids"].tobytes() for batch in epoch] for epoch in (first, second)]
    assert sorted(keys[0]) == sorted(keys[1]) and keys[0] != keys[1]


def test_text_needles_stand_at_the_depth_and_in_any_text(tmp_path):
    (tmp_path / "hay.txt").write_text("hay " * 100)
    for depth, low, high in ((0.0, 300, 400), (1.0, 30, 130)):
        task = data.TextNeedles(length=400, haystack=str(tmp_path), depth=depth)
        row = task.rows()[0]
        at = np.nonzero(row["distance"])[0]
        assert np.array_equal(row["input_ids"][at - row["distance"][at]], row["labels"][at])
        assert low < row["distance"][at[0]] < high
        assert "hay hay" in tokenizer.ByteTokenizer().decode(row["input_ids"])


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (data.SymbolNeedles(length=40), "needles need length"),
        (data.SymbolNeedles(needles=9), "queries <= needles <= keys"),
        (data.SymbolNeedles(min_distance=0), "min_distance=0"),
        (data.SymbolNeedles(values=0), "values=0"),
        (data.MQAR(length=64, pairs=17), "at least 4"),
        (data.Copying(symbols=60), "2 \\* symbols"),
        (data.TextNeedles(length=50), "raise length"),
        (data.SymbolNeedles(seed=-1), "seed=-1"),
    ],
)
def test_task_errors_name_value_rule_and_fix(task, message):
    with pytest.raises(data.DataError, match=message) as caught:
        task.rows()
    assert "\n" not in str(caught.value) and ";" in str(caught.value)


# --- batches


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return small_text(tmp_path_factory.mktemp("text"))


def test_any_number_of_processes_reads_the_same_global_batches(text):
    rows = text.rows(batch_size=12)
    whole = batches(20, rows, 12)
    for count in (2, 3):
        parts = [batches(20, rows, 12, shard_index=index, shard_count=count) for index in range(count)]
        for step, expected in enumerate(whole):
            joined = {name: np.concatenate([part[step][name] for part in parts]) for name in expected}
            assert same(joined, expected)


def test_resume_continues_with_other_processes_and_batch_sizes(text):
    rows = text.rows(batch_size=12)
    whole = batches(12, rows, 12)
    started = [pipeline.Batches(rows, 12, shard_index=index, shard_count=2) for index in range(2)]
    for source in started:
        for _ in range(5):
            next(source)
    (state,) = {json.dumps(source.get_state()) for source in started}
    assert json.loads(state) == {"rows": 60}
    for count in (1, 2, 3):
        resumed = [pipeline.Batches(rows, 12, shard_index=index, shard_count=count) for index in range(count)]
        for source in resumed:
            source.set_state(json.loads(state))
        for expected in whole[5:]:
            found = [next(source) for source in resumed]
            assert same({name: np.concatenate([part[name] for part in found]) for name in expected}, expected)
    halves = pipeline.Batches(rows, 6)
    halves.set_state(json.loads(state))
    assert np.array_equal(np.concatenate([next(halves)["labels"] for _ in range(2)]), whole[5]["labels"])
    for source in started:  # going back is the same as never having gone on
        source.set_state({"rows": 0})
    assert np.array_equal(next(started[0])["labels"], whole[0]["labels"][:6])


def test_epochs_hold_every_row_once_and_differ(text):
    rows = text.rows()
    packed = text.pack_units(sources.find_units(text.path), tokenizer.ByteTokenizer())["train"]
    expected = [packing.row_of_segments(row, 64, pad_id=258)["input_ids"].tobytes() for row in packed]
    size = len(expected)
    first, second = ([rows[i]["input_ids"].tobytes() for i in range(e * size, (e + 1) * size)] for e in (0, 1))
    assert sorted(first) == sorted(second) == sorted(expected)
    assert first != second and first != expected


def test_workers_and_threads_change_nothing():
    rows = data.SymbolNeedles().rows()
    expected = batches(4, rows, 6, reading=data.ReadingConfig(threads=0))
    source = pipeline.Batches(rows, 6, reading=data.ReadingConfig(workers=2, threads=1, ahead=1))
    assert all(same(next(source), batch) for batch in expected)
    state = source.get_state()
    source.set_state({"rows": 6})
    assert same(next(source), expected[1])
    source.close()
    after = pipeline.Batches(rows, 6, reading=data.ReadingConfig(workers=0))
    after.set_state(state)
    assert same(next(after), batches(5, rows, 6)[4])


def test_last_batch_is_filled_with_rows_that_ask_nothing():
    rows = data.SymbolNeedles(heldout_rows=10).rows("heldout")
    assert len(list(pipeline.Batches(rows, 4))) == 2
    found = list(pipeline.Batches(rows, 4, pad_last=True))
    assert len(found) == 3
    assert sum(int((batch["labels"] != data.IGNORE).sum()) for batch in found) == 10 * 8
    assert (found[2]["labels"][2:] == data.IGNORE).all()


def test_mixture_follows_its_weights(text):
    needles = data.SymbolNeedles(length=96)
    mixture = data.Mixture((needles, data.Copying(length=96)), (3.0, 1.0))
    rows = mixture.rows()
    copies = sum(int(rows[index]["input_ids"][80] == 1) for index in range(400))  # Copying's "repeat" mark
    assert 100 <= copies <= 100 + 40
    assert len(mixture.rows("heldout")) == 2000
    with pytest.raises(data.DataError, match="same"):
        data.Mixture((needles, data.Copying(length=90)), (1.0, 1.0)).rows()
    with pytest.raises(data.DataError, match="above 0"):
        data.Mixture((needles, needles), (1.0, 0.0)).rows()
    with pytest.raises(data.DataError, match="mix text with text"):
        data.Mixture((text, data.Copying(length=64)), (1.0, 1.0)).rows()


def test_the_first_held_out_rows_are_a_sample_of_all(tmp_path):
    """An evaluation of a few batches reads no more of them."""
    words = [400] * 20 + [4] * 2000  # packing lays the pieces of long documents first
    texts = ["".join(f"{number}:{word} " for word in range(count)) for number, count in enumerate(words)]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    text = data.Text(path=str(path), packing=data.Packing(256), heldout=0.5)
    for part in (text, dataclasses.replace(text, heldout_by="row")):
        rows = part.rows("heldout")
        several = [int(row["segment_ids"].max() > 1) for row in rows]
        assert len(rows) > 100 and abs(np.mean(several[:40]) - np.mean(several)) < 0.25
        assert len({row["input_ids"].tobytes() for row in rows}) == len(rows)

    parts = (data.SymbolNeedles(length=64, min_distance=20, heldout_rows=100), data.Copying(length=64))
    rows = data.Mixture(parts, (1.0, 1.0)).rows("heldout")
    copying = [int(row["input_ids"][48] == 1 and not row["input_ids"][16:48].any()) for row in rows]
    assert sum(copying) == 1000 and 70 < sum(copying[:88]) < 88

    mix = data.MQARMix(train=((64, 4, 8),), test=((64, 4, 80), (128, 8, 80)))
    rows = mix.rows("heldout", batch_size=8)
    sizes = [len(rows[index]["labels"]) for index in range(0, len(rows), 8)]
    assert sorted(sizes) == [64] * 10 + [128] * 10 and len(set(sizes[:6])) == 2


def test_bad_batches_are_refused(text):
    rows = text.rows()
    for options, message in (
        ({"batch_size": 7, "shard_count": 2}, "multiple of the 2"),
        ({"batch_size": 4, "shard_count": 2, "shard_index": 2}, "shard_index=2"),
        ({"batch_size": 4, "reading": data.ReadingConfig(ahead=0)}, "ahead=0"),
    ):
        with pytest.raises(data.DataError, match=message):
            pipeline.Batches(rows, **options)
    with pytest.raises(data.DataError, match="fewer than one batch"):
        text.rows(batch_size=10**6)
    for state in ({"rows": -1}, {"next_index": 3}, {"rows": True}):
        with pytest.raises(data.DataError, match="data position"):
            pipeline.Batches(rows, 4).set_state(state)


@dataclasses.dataclass(frozen=True)
class Holder:
    """An experiment's settings, as far as data go."""

    dataset: data.DataSet


def test_settings_travel_as_json(text):
    for dataset in (*TASKS, text, data.Mixture((text, TASKS[0]), (1.0, 2.0)), data.MQARMix(), data.PackedRows("x")):
        holder = Holder(dataset)
        assert configs.from_dict(Holder, json.loads(configs.to_json(holder))) == holder
