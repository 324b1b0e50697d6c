"""Are documents, tokenizers and shards read as they are written, and is damage seen before it is trained on?"""

import dataclasses
import fcntl
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tokenizers
from array_record.python import array_record_module

from experiments.generate import Settings, Speaker
from lte_jax import data
from lte_jax.data import corpus, pipeline, shards, sources, tokenizer
from tests.system.data_samples import batches, documents, same, small_text, write_jsonl


@pytest.fixture(scope="module")
def bpe_file(tmp_path_factory):
    """A byte-level BPE tokenizer whose pieces split characters."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(documents(20), trainer)
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    model.save(str(path))
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return small_text(tmp_path_factory.mktemp("text"))


# --- documents


def test_held_out_documents_are_fixed_and_disjoint(text):
    parts = text.pack_units(sources.find_units(text.path), tokenizer.ByteTokenizer())
    decode = tokenizer.ByteTokenizer().decode
    names = {
        split: {int(decode(piece).split(":")[0]) for row in rows for piece in row if b":" in bytes(piece[:5] % 256)}
        for split, rows in parts.items()
    }
    assert names["train"] | names["heldout"] >= set(range(120)) and not names["train"] & names["heldout"]
    assert 10 <= len(names["heldout"]) <= 40


def test_a_document_begins_as_generation_begins_one(tmp_path, bpe_file):
    """With the begin token, where there is one: a model would never have seen it otherwise."""
    (tmp_path / "a.txt").write_text("some text")
    bare = tokenizers.Tokenizer(tokenizers.models.WordLevel({"some text": 0, "</s>": 1}))
    bare.add_special_tokens(["</s>"])
    bare.save(str(tmp_path / "bare.json"))
    for name, begins in (("bytes", 256), (str(bpe_file), 0), (str(tmp_path / "bare.json"), None)):
        text = data.Text(path=str(tmp_path / "a.txt"), tokenizer=name, packing=data.Packing(32))
        first = text.rows()[0]["input_ids"][0]
        speaker = Speaker(None, tokenizer.load_tokenizer(name), Settings())
        assert first == speaker.encode("some text")[0] and (first == begins or begins is None)
        plain = dataclasses.replace(text, add_bos=False).rows()[0]["input_ids"]
        assert plain[0] == tokenizer.load_tokenizer(name).encode("some text")[0]


def test_split_by_rows_takes_each_row_once():
    train, heldout = pipeline.split_rows(data.SymbolNeedles(heldout_rows=23).rows("heldout"), 0.25)
    keys = [row["input_ids"].tobytes() for part in (train, heldout) for row in part]
    assert (len(train), len(heldout)) == (18, 5) and len(set(keys)) == 23


def test_all_formats_give_the_same_documents(tmp_path, bpe_file):
    import pyarrow
    import pyarrow.parquet

    texts = documents(40)
    for name in ("txt", "jsonl", "parquet", "records"):
        (tmp_path / name).mkdir()
    for number, item in enumerate(texts):
        (tmp_path / "txt" / f"{number:03d}.txt").write_text(item, encoding="utf-8", newline="")
    write_jsonl(tmp_path / "jsonl" / "a.jsonl", texts, field="body")
    pyarrow.parquet.write_table(pyarrow.table({"body": texts}), tmp_path / "parquet" / "a.parquet", row_group_size=7)
    writer = array_record_module.ArrayRecordWriter(str(tmp_path / "records" / "a.array_record"), "group_size:1")
    for item in texts:
        writer.write(item.encode())
    writer.close()
    for name in ("txt", "jsonl", "parquet", "records", "txt/*.txt"):
        for unit_bytes in (50, 10**6):  # jsonl and records are cut anywhere
            units = sources.find_units(str(tmp_path / name), unit_bytes)
            assert [text for unit in units for text in sources.read_documents(unit, "body")] == texts


def test_what_corpora_of_others_hold_is_read_or_named(tmp_path):
    """Nulls, marks of encoding, JSON lines called .json, halves of characters, and files that are compressed."""
    import pyarrow
    import pyarrow.parquet

    def read(name, **options):
        units = sources.find_units(str(tmp_path / name))
        return [text for unit in units for text in sources.read_documents(unit, **options)]

    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None, "b"]}), tmp_path / "nulls.parquet")
    (tmp_path / "lines.json").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n{"text": null}\r\n{"text": "b"}')
    (tmp_path / "marked.txt").write_bytes(b"\xef\xbb\xbfa")
    assert read("nulls.parquet") == read("lines.json") == ["a", "b"] and read("marked.txt") == ["a"]
    (tmp_path / "half.jsonl").write_text('{"text": "\\ud83d\\ude00 \\ud83d!"}\n')
    with pytest.raises(data.DataError, match=r"half.jsonl at byte 0: character 2 .* set undecodable=replace"):
        read("half.jsonl")
    assert read("half.jsonl", undecodable="replace") == ["\U0001f600 \ufffd!"]

    (tmp_path / "hub" / "data").mkdir(parents=True)
    (tmp_path / "hub" / "README.md").write_text("about this corpus")
    assert read("hub") == ["about this corpus"]
    (tmp_path / "hub" / "data" / "train.jsonl.zst").write_bytes(b"123")
    for name in ("hub", "hub/data/train.jsonl.zst", "hub/*/*"):
        with pytest.raises(data.DataError, match=r"train.jsonl.zst is compressed, which is not read; unpack"):
            read(name)


def test_linked_folders_are_read_and_each_once(tmp_path):
    """Where data lie on several disks."""
    (tmp_path / "disk" / "part").mkdir(parents=True)
    (tmp_path / "corpus").mkdir()
    for name in ("corpus/a.txt", "disk/b.txt", "disk/part/c.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "corpus" / "more").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "back").symlink_to(tmp_path / "corpus")
    found = [str(file.relative_to(tmp_path / "corpus")) for file in sources.find_files(str(tmp_path / "corpus"))]
    assert found == ["a.txt", "more/b.txt", "more/part/c.txt"]


def test_bad_paths_are_one_line_errors(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "none.txt").touch()
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "field.jsonl").write_text('{"body": "a"}\n')
    (tmp_path / "cut.parquet").write_bytes(b"PAR1xx")
    (tmp_path / "cut.array_record").write_bytes(b"12345")
    cases = {
        "": "no data path",
        "missing": "no such file",
        "empty": "holds no",
        "none.txt": "empty",
        "latin.txt": "byte 3 is not UTF-8",
        "bad.jsonl": "at byte 14: the line is not JSON",
        "field.jsonl": "no field 'text' \\(it has body\\)",
        "cut.parquet": "not a whole parquet",
        "cut.array_record": "not a whole ArrayRecord",
    }
    for name, message in cases.items():
        with pytest.raises(data.DataError, match=message) as caught:
            data.Text(path=str(tmp_path / name) if name else "").rows()
        assert "\n" not in str(caught.value) and ";" in str(caught.value)
    assert len(data.Text(path=str(tmp_path / "latin.txt"), undecodable="replace").rows())
    with pytest.raises(data.DataError, match=r"data\.heldout_by=row"):
        (tmp_path / "one.txt").write_text("one document " * 500)
        data.Text(path=str(tmp_path / "one.txt"), heldout=0.1).rows()


# --- tokenizers


def test_tokenizers_round_trip_and_stream(tmp_path, bpe_file):
    text = " ".join(documents(8)) + "é"
    for number, name in enumerate((tokenizer.BYTES, bpe_file)):
        found = tokenizer.load_tokenizer(name)
        found.save(tmp_path / str(number))
        for each in (found, tokenizer.load_tokenizer(tmp_path / str(number))):
            ids = each.encode(text, add_bos=True, add_eos=True)
            assert (ids[0], ids[-1]) == (found.bos_id, found.eos_id) and max(ids) < each.vocab_size
            assert each.decode(ids) == text
            stream = each.stream()
            pieces = [stream.push(token) for token in ids]
            assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
            assert any(len(piece) == 0 for piece in pieces[1:-1])  # characters of several tokens were held back
            stream = each.stream()
            cut = each.encode("a😀")[:-1]
            assert "".join(map(stream.push, cut)) == "a" and "\ufffd" in stream.finish()


def test_hugging_face_folder_names_its_special_tokens(tmp_path, bpe_file):
    (tmp_path / "tokenizer.json").write_bytes(bpe_file.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": None, "eos_token": {"content": "<s>"}}))
    found = tokenizer.load_tokenizer(tmp_path)
    assert (found.bos_id, found.eos_id) == (None, 0)
    with pytest.raises(data.DataError, match="has no bos token"):
        found.encode("a", add_bos=True)
    with pytest.raises(data.DataError, match="vocab_size 100"):
        tokenizer.check_fits(found, 100)
    with pytest.raises(data.DataError, match="ids must lie in"):
        found.decode([10**6])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<nope>"}))
    with pytest.raises(data.DataError, match="'<nope>' is not in"):
        tokenizer.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(data.DataError, match="not a tokenizer file"):
        tokenizer.load_tokenizer(tmp_path)
    for name in ("nowhere", tmp_path / ".."):
        with pytest.raises(data.DataError, match="tokenizer"):
            tokenizer.load_tokenizer(name)


# --- shards


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_shards_hold_the_rows_and_damage_is_seen(tmp_path, text):
    plan = corpus.make_plan(text, tmp_path / "shards", part_bytes=2**20)
    for read in (data.PackedRows.rows, lambda packed: packed.tokenizer):
        with pytest.raises(data.DataError, match=r"no manifest\.json.*experiments\.prepare"):
            read(data.PackedRows(str(tmp_path / "shards")))
    assert list(corpus.write_parts(plan, 0)) == [0]
    manifest = corpus.finish(plan)
    packed = data.PackedRows(str(tmp_path / "shards"), verify=True)
    assert (packed.length, packed.vocab_size) == (64, 259)
    assert tokenizer.load_tokenizer(packed.tokenizer).vocab_size == 259
    assert all(same(packed.rows()[index], text.rows()[index]) for index in range(manifest["rows"]["train"]))
    assert len(packed.rows("heldout")) == len(text.rows("heldout")) == manifest["rows"]["heldout"]
    expected = batches(3, packed.rows(), 4, reading=data.ReadingConfig(threads=4))
    assert all(map(same, expected, batches(3, packed.rows(), 4, reading=data.ReadingConfig(threads=0))))

    with pytest.raises(data.DataError, match=r"heldout=0.01: .*shards has a held-out part of its own; leave it out"):
        dataclasses.replace(packed, heldout=0.01).rows()
    with pytest.raises(data.DataError, match="other settings"):
        corpus.make_plan(dataclasses.replace(text, heldout=0.1), tmp_path / "shards", part_bytes=2**20)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(data.DataError, match="never overwritten"):
        corpus.make_plan(text, tmp_path / "other")

    shard = tmp_path / "shards" / manifest["train"][0]["name"]
    whole = bytearray(shard.read_bytes())
    whole[len(whole) // 2] ^= 1
    shard.write_bytes(whole)
    with pytest.raises(data.DataError, match="checksum"):
        packed.rows()
    damaged = shards.ShardRows(tmp_path / "shards", [shards.Shard(**manifest["train"][0])], 64, 258, verify=False)
    with pytest.raises(data.DataError, match=r"damaged|not a whole"):
        list(map(damaged.__getitem__, range(len(damaged))))
    shard.write_bytes(whole[:-9])
    with pytest.raises(data.DataError, match="the manifest says"):
        data.PackedRows(str(tmp_path / "shards")).rows()
    shard.unlink()
    with pytest.raises(data.DataError, match="missing"):
        data.PackedRows(str(tmp_path / "shards")).rows()
    assert not corpus.is_done(plan, 0)


def test_a_split_that_would_be_empty_is_refused_before_anything_is_packed(tmp_path):
    texts = [f"story {index}" for index in range(20)]
    source = write_jsonl(tmp_path / "few.jsonl", texts)
    text = data.Text(path=str(source), packing=data.Packing(8), heldout=0.001)
    assert not any(map(text.is_heldout, texts))
    with pytest.raises(data.DataError, match=r"heldout=0.001: of 20 documents none falls into the heldout part"):
        corpus.make_plan(text, tmp_path / "shards")
    assert not (tmp_path / "shards").exists()
    # Without a held-out part the first document is enough, and no other is read.
    with source.open("a") as file:
        file.write("no JSON")
    corpus.make_plan(dataclasses.replace(text, heldout=0.0), tmp_path / "shards")


def test_shards_are_mixed_by_weight_and_continue_from_one_position(tmp_path):
    parts = []
    for seed, letter in enumerate("ab"):
        texts = [f"{letter}{index:02d}," * (5 + 2 * index) for index in range(40)]
        source = write_jsonl(tmp_path / f"{letter}.jsonl", texts)
        corpus_text = data.Text(path=str(source), packing=data.Packing(64), heldout=0.2, seed=seed)
        plan = corpus.make_plan(corpus_text, tmp_path / letter, part_bytes=1000)
        list(corpus.write_parts(plan, 0))
        corpus.finish(plan)
        parts.append(data.PackedRows(str(tmp_path / letter)))
    mixture = data.Mixture(tuple(parts), (3.0, 1.0))
    rows = mixture.rows(batch_size=8)
    whole = batches(25, rows, 8)
    share = np.mean([(batch["input_ids"] == ord("a")).any(axis=1).mean() for batch in whole])
    assert abs(share - 0.75) < 0.03
    assert all((batch["segment_ids"].max(1) >= 1).all() for batch in whole)
    heldout = mixture.rows("heldout")
    assert len(heldout) == sum(len(part.rows("heldout")) for part in parts)
    trained = {bytes(row["input_ids"].astype("<u2")) for batch in whole for row in _rows_of(batch)}
    assert not trained & {bytes(heldout[index]["input_ids"].astype("<u2")) for index in range(len(heldout))}
    for count in (2, 4):  # after 10 batches of one process, on more
        resumed = [pipeline.Batches(rows, 8, shard_index=index, shard_count=count) for index in range(count)]
        for source in resumed:
            source.set_state({"rows": 80})
        for expected in whole[10:13]:
            found = [next(source) for source in resumed]
            assert same({name: np.concatenate([part[name] for part in found]) for name in expected}, expected)
        for source in resumed:
            source.close()


def _rows_of(batch):
    return [{name: array[index] for name, array in batch.items()} for index in range(len(batch["labels"]))]


def test_shards_do_not_lie_among_the_documents(tmp_path):
    """Where a second start would read them as text."""
    (tmp_path / "a.txt").write_text("some text")
    for path, out in (
        (tmp_path, tmp_path / "shards"),
        (f"{tmp_path}/", tmp_path),
        (tmp_path, tmp_path / "b" / ".." / "c"),
    ):
        with pytest.raises(data.DataError, match=r"it lies in path=.*, where its shards would be read as documents"):
            corpus.make_plan(data.Text(path=str(path), packing=data.Packing(8)), out)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    corpus.make_plan(data.Text(path=str(tmp_path / "a.txt"), packing=data.Packing(8)), tmp_path / "shards")


def test_record_round_trip():
    segments = [np.arange(3), np.array([70_000]), np.arange(5)]
    for found, expected in zip(shards.decode_row(shards.encode_row(segments, 4)), segments, strict=True):
        assert np.array_equal(found, expected)


def test_prepare_killed_and_resumed_writes_the_same_shards(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", documents(12_000))

    def command(out, workers):
        return [
            *(sys.executable, "-m", "experiments.prepare", f"--path={source}", f"--out={tmp_path / out}"),
            *("--set=packing.length=128", "--set=heldout=0.1", "--part_mb=1", f"--workers={workers}"),
        ]

    options = {"env": {**os.environ, "JAX_PLATFORMS": "cpu"}, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command("killed", 2), stdout=subprocess.PIPE, start_new_session=True, **options)
    while process.poll() is None and not list((tmp_path / "killed").glob("parts/*.json")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()  # returns when the workers, which hold the pipe, are gone too: no orphans
    assert process.returncode == -signal.SIGKILL, "it ended before it could be killed: give it more to do"
    assert not (tmp_path / "killed" / "manifest.json").exists()
    for out in ("killed", "whole"):
        done = subprocess.run(command(out, 0), check=True, stdout=subprocess.PIPE, **options)
        assert "training rows" in done.stdout and "shards: 100%" in done.stderr
    killed, whole = tree(tmp_path / "killed"), tree(tmp_path / "whole")
    assert {name for name in killed if not name.endswith(".partial")} == set(whole)
    assert all(killed[name] == whole[name] for name in whole if name != ".lock")
    assert len([name for name in whole if name.startswith("train-")]) > 3
    failed = subprocess.run(command("whole", -1), stdout=subprocess.PIPE, check=False, **options)
    assert failed.returncode == 1 and "workers=-1" in failed.stderr
    with (tmp_path / "whole" / ".lock").open() as lock:  # as another prepare that is at work there
        fcntl.flock(lock, fcntl.LOCK_EX)
        failed = subprocess.run(command("whole", 0), stdout=subprocess.PIPE, check=False, **options)
    assert failed.returncode == 1 and "whole is in use by process" in failed.stderr
    assert "two launches would overwrite each other" in failed.stderr and "or name another --out" in failed.stderr
