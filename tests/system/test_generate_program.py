"""Does the program of generation stream, count, converse and answer files as the engine says, and refuse bad input?"""

from __future__ import annotations

import functools
import json
import warnings

import pytest

from experiments.generate import Clock, Settings, Speaker, answer_file, converse, load_speaker, read_prompts
from experiments.warned import say_warnings
from lte_jax import conversation, restore
from lte_jax.continuations import Generation, StopFilter
from lte_jax.data.tokenizer import known_text, load_tokenizer
from lte_jax.generate import read_chunk
from lte_jax.lengths import LengthWarning
from lte_jax.sampling import Sampling
from tests.system.test_generate import NEW, build


@pytest.mark.parametrize("size", [1, 2, 5])
def test_no_start_of_a_stop_string_is_shown(size):
    text, stop = "abcabdabcabcd and more", ("abcd", "zz")
    shown, given = StopFilter(stop), ""
    for start in range(0, len(text), size):
        given += shown.push(text[start : start + size])
        assert "abcabdabcabcd".startswith(given) and "abcd" not in given
    assert given + shown.finish() == "abcabdabc"
    kept = StopFilter(stop)
    assert kept.push("xyab") + kept.finish() == "xyab"


@functools.cache
def speaker(**changes) -> Speaker:
    return Speaker(build(), load_tokenizer("bytes"), Settings(**{"max_new_tokens": NEW, **changes}))


def test_the_program_streams_what_the_engine_says():
    written: list[str] = []
    found, speed = speaker().say(speaker().encode("hello"), written.append)
    (expected,) = speaker().answer([[256, *b"hello"]])
    assert found.tokens == expected.tokens and "".join(written) == expected.text
    assert len(written) > 2 and f"6 tokens in, {NEW} out" in speed and "tokens/s" in speed


def test_a_refused_request_writes_nothing():
    written: list[str] = []
    with pytest.raises(ValueError, match="max_new_tokens=-1"):
        speaker(max_new_tokens=-1).say([256, *b"hello"], written.append, before="the prompt")
    assert not written
    speaker().say([256, *b"hello"], written.append, before="the prompt")  # a program that is compiled already
    assert written[0] == "the prompt" and "the prompt" not in "".join(written[1:])


def test_rows_that_come_at_once_are_one_measurement(monkeypatch):
    times = iter([0.0, 2.0, 3.0, 5.0])  # the start, and three calls
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    clock = Clock()
    for row in (0, 1, 2):
        clock.count(row, 8)
    assert str(clock) == "24 out, the first after 2.00 s"
    for row, tokens in ((0, 8), (2, 4), (0, 6)):  # row 1 has ended; then the next batch begins
        clock.count(row, tokens)
    assert str(clock) == "42 out, the first after 2.00 s, then 6.0 tokens/s"


def test_ids_beyond_the_tokenizer_are_no_text():
    assert known_text(load_tokenizer("bytes"))([104, 300, 105, 257]) == "hi"  # a vocabulary may be padded


def test_a_file_of_prompts_does_not_depend_on_the_batch(tmp_path):
    rule = Settings(max_new_tokens=NEW, sampling=Sampling(temperature=1.0))
    drawing = Speaker(build(), load_tokenizer("bytes"), rule)
    (tmp_path / "prompts.txt").write_text("one\nand two\nthree\n")
    answers = []
    for size in (2, 1):  # the first leaves a batch of one for the end
        answer_file(drawing, str(tmp_path / "prompts.txt"), str(tmp_path / "out.jsonl"), size)
        answers.append([json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()])
    assert answers[0] == answers[1] and [record["prompt"] for record in answers[0]] == ["one", "and two", "three"]
    assert not list(tmp_path.glob("*.partial"))
    answer_file(drawing, str(tmp_path / "prompts.txt"), str(tmp_path / "out.jsonl"), 2, log_probs=True)
    record = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[1])
    (own,) = drawing.answer([drawing.encode("and two")], first=1)
    assert record.pop("tokens") == own.tokens and record["log_probs"] == pytest.approx(own.log_probs, abs=1e-5)


def test_what_was_answered_before_a_program_ended_is_kept(tmp_path, monkeypatch):
    """And a whole file of before stays until the new one is whole."""
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\xe2\x80\xa8three\r\n")
    assert read_prompts(str(tmp_path / "prompts.txt")) == ["one", "two\u2028three"], "lines end where files say so"
    (tmp_path / "out.jsonl").write_text("of before")
    answered = []

    def answer(self, prompts, first=0, on_tokens=None):
        answered.append(first)
        if first:
            raise KeyboardInterrupt
        return [Generation([65], [-1.0], "length", "A")]

    monkeypatch.setattr(Speaker, "answer", answer)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            answer_file(speaker(), str(tmp_path / "prompts.txt"), str(tmp_path / "out.jsonl"), 1)
        assert (tmp_path / "out.jsonl").read_text() == "of before"
        assert json.loads((tmp_path / "out.jsonl.partial").read_text())["text"] == "A"


def test_a_length_beyond_the_models_is_one_warning_and_no_stop(tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text(f"{'a' * 130}\n{'b' * 140}\n")
    with warnings.catch_warnings():
        warnings.simplefilter("always", LengthWarning)
        say_warnings()
        answer_file(speaker(), str(tmp_path / "prompts.txt"), str(tmp_path / "out.jsonl"), 1)
        converse(speaker(), ["c" * 150], lambda text: None)
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2
    assert capsys.readouterr().err.count("warning: sequences may be longer than the 128 tokens") == 1


def test_a_conversation_goes_on_and_begins_anew(monkeypatch):
    written: list[str] = []
    streaming, read = speaker(reading="streaming"), []
    monkeypatch.setattr(
        conversation, "read_chunk", lambda *args, **kw: read.append(args[3].sum()) or read_chunk(*args, **kw)
    )
    converse(streaming, ["hi\n", "you\n", "/new\n", "hi\n"], written.append)
    turns = "".join(written).split("> ")
    first = streaming.answer([[256, *b"hi\n"]])[0]
    assert turns[0].startswith(first.text) and turns[3].startswith(first.text)
    second = streaming.answer([[256, *b"hi\n", *first.tokens, *b"you\n"]])[0]
    assert turns[1].startswith(second.text) and second.text != first.text
    left = NEW % 8  # said in a call that drew more: read again
    assert read == [4, left, 4, left, 4, left], "a turn reads what is new, and not the history"


def test_a_conversation_ends_where_its_cache_does():
    talk = conversation.Conversation(build("all others"), max_length=64)
    with pytest.raises(ValueError, match="may reach 68 tokens, and its cache holds max_length=64; begin a new one"):
        talk.say([66] * 40, 20)
    assert talk.length == 0
    with pytest.raises(ValueError, match="the turn is empty"):
        talk.say([], 4)
    with pytest.raises(ValueError, match="token id 300 is outside"):
        talk.say([300], 4)
    with pytest.raises(ValueError, match="keeps no list of what was said"):
        conversation.Conversation(build(), sampling=Sampling(repetition_penalty=1.2))


def test_bad_files_and_folders_are_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "gap.txt").write_text("one\n\n")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x"}\n{"text": "y"}\n')
    for name, message in (
        ("none.txt", "no such file"),
        ("empty.txt", "no prompts"),
        ("gap.txt", "line 2: the prompt is empty"),
        ("bad.jsonl", 'line 2: not a JSON object with "prompt"'),
    ):
        with pytest.raises(ValueError, match=message):
            answer_file(speaker(), str(tmp_path / name), None, 2)
    (tmp_path / "one.txt").write_text("one\n")
    with pytest.raises(ValueError, match=r"gap.txt/out.jsonl cannot be written; name another file with --output"):
        answer_file(speaker(), str(tmp_path / "one.txt"), str(tmp_path / "gap.txt" / "out.jsonl"), 2)
    restore.save_model(build(), tmp_path / "run")
    with pytest.raises(ValueError, match="holds no tokenizer: name one with --tokenizer"):
        load_speaker(str(tmp_path / "run"), Settings())
    loaded = load_speaker(str(tmp_path / "run"), Settings(add_bos=False), tokenizer="bytes")
    with pytest.raises(ValueError, match="the prompt is empty"):
        loaded.encode("")
