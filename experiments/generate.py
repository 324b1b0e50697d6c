"""Continues text with a trained model: a prompt, a file of prompts, or a conversation on the terminal.

python -m experiments.generate --checkpoint=runs/text --prompt="def main(" --temperature=0.8 --top_p=0.95
python -m experiments.generate --checkpoint=runs/text --prompts_file=prompts.txt --output=answers.jsonl
python -m experiments.generate --checkpoint=runs/text --interactive
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from absl import app, flags, logging
from jax.sharding import Mesh
from tqdm import tqdm

from experiments.paths import define_path
from experiments.warned import said_in_one_line
from lte_jax import restore
from lte_jax.continuations import Generation, StopFilter
from lte_jax.conversation import Conversation
from lte_jax.data.tokenizer import Tokenizer, known_text
from lte_jax.generate import generate
from lte_jax.mixers.base import Reading
from lte_jax.model import LanguageModel
from lte_jax.sampling import Sampling
from lte_jax.sharding import rows_mesh
from lte_jax.whole_files import check_target

FLAGS = flags.FLAGS


def define_flags() -> None:
    define_path("checkpoint", None, "A training run's folder, or a Hugging Face folder of the authors' format.")
    flags.DEFINE_integer("step", None, "Which checkpoint of a run; default the newest.")
    define_path("tokenizer", None, "'bytes', a tokenizer.json or its folder, in place of the checkpoint's own.")
    flags.DEFINE_string("prompt", None, "The text to continue.")
    define_path("prompts_file", None, 'Prompts: one a line, or JSON lines with "prompt" (*.jsonl).')
    flags.DEFINE_bool(
        "interactive",
        False,
        "A conversation: each line typed is answered by at most --max_new_tokens tokens; /new begins anew. Where the "
        "cache grows (full attention, NSA), the whole conversation has room for the model's max_length tokens.",
    )
    define_path("output", None, "Where the answers to a file of prompts go, as JSON lines; default the screen.")
    flags.DEFINE_bool("log_probs", False, "With --output: each answer's token ids and their log-probabilities too.")
    flags.DEFINE_integer("max_new_tokens", 128, "At most so many tokens for each prompt, or line of a conversation.")
    flags.DEFINE_float("temperature", 0.0, "0 takes the most likely token.")
    flags.DEFINE_integer("top_k", 0, "Draw among the k most likely tokens; 0 is no limit.")
    flags.DEFINE_float("top_p", 1.0, "Draw among the fewest tokens whose probabilities reach p; 1 is no limit.")
    flags.DEFINE_float("repetition_penalty", 1.0, "Above 1: tokens that have occurred become less likely.")
    flags.DEFINE_integer("seed", 0, "Of the draws; the prompts of a file count up from it.")
    flags.DEFINE_multi_string("stop", [], "Text that ends the answer; it is not shown.")
    flags.DEFINE_bool("add_bos", None, "Whether the begin token goes first; default where the tokenizer has one.")
    flags.DEFINE_enum("reading", "prompt", ["prompt", "streaming"], "How LTE reads the prompt.")
    flags.DEFINE_integer("chunk", None, "Read prompts in pieces of so many tokens; needs --reading=streaming.")
    flags.DEFINE_integer("batch_size", 8, "Prompts of a file at a time.")
    flags.DEFINE_integer("devices", 1, "Share the prompts of a file over so many devices, each with whole weights.")
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the computation.")
    flags.DEFINE_string("implementation", None, "Of every operation: xla, triton or pallas; default the fastest.")
    flags.mark_flag_as_required("checkpoint")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How answers are drawn."""

    max_new_tokens: int = 128
    sampling: Sampling = Sampling()  # noqa: RUF009 - frozen
    seed: int = 0
    stop: tuple[str, ...] = ()
    add_bos: bool | None = None
    reading: Reading = "prompt"
    chunk: int | None = None


@dataclasses.dataclass(frozen=True)
class Speaker:
    """A model with its tokenizer and settings."""

    model: LanguageModel
    tokenizer: Tokenizer
    settings: Settings
    mesh: Mesh | None = None

    def encode(self, text: str) -> list[int]:
        add_bos = self.settings.add_bos
        ids = self.tokenizer.encode(text, add_bos=self.tokenizer.bos_id is not None if add_bos is None else add_bos)
        if not ids:
            raise ValueError("the prompt is empty, and the tokenizer adds no begin token: give some text")
        return ids

    def answer(
        self, prompts: Sequence[Sequence[int]], first: int = 0, on_tokens: Callable[[int, list[int]], Any] | None = None
    ) -> list[Generation]:
        """Continues token ids; prompt i draws from seed + first + i."""
        settings = self.settings
        return generate(
            self.model,
            prompts,
            max_new_tokens=settings.max_new_tokens,
            sampling=settings.sampling,
            seeds=[settings.seed + first + row for row in range(len(prompts))],
            eos_id=self.tokenizer.eos_id,
            stop=settings.stop,
            decode=known_text(self.tokenizer),
            reading=settings.reading,
            chunk=settings.chunk,
            steps_per_call=8,
            on_tokens=on_tokens,
            mesh=self.mesh,
        )

    def say(self, prompt: Sequence[int], write: Callable[[str], Any], before: str = "") -> tuple[Generation, str]:
        """Continues one prompt, writing text as it comes, after ``before``; also returns a line about its speed."""
        show = Show(self, write, before)
        (generation,) = self.answer([prompt], on_tokens=show.on_tokens)
        show.finish()
        return generation, f"{len(prompt)} tokens in, {show.clock}; ended by {generation.finish_reason}"


class Show:
    """Writes one answer's text as its tokens come, up to a stop string, and counts them.

    ``before`` is written with the first of them: not at all before a request that is refused.
    """

    def __init__(self, speaker: Speaker, write: Callable[[str], Any], before: str = ""):
        self._stream, self._filter = speaker.tokenizer.stream(), StopFilter(speaker.settings.stop)
        self._vocabulary, self._write, self.clock = speaker.tokenizer.vocab_size, write, Clock()
        self._before = before

    def _begin(self) -> None:
        self._write(self._before)
        self._before = ""

    def on_tokens(self, row: int, tokens: list[int]) -> None:
        self._begin()
        self.clock.count(row, len(tokens))
        for token in tokens:
            if token < self._vocabulary:  # a model's vocabulary may be padded
                self._write(self._filter.push(self._stream.push(token)))

    def finish(self) -> None:
        self._begin()
        self._write(self._filter.push(self._stream.finish()) + self._filter.finish())


class Clock:
    """Counts tokens; the first that come, which wait for compilation and the prompt, are told apart."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._row = 0
        self._times: list[float] = []
        self._counts: list[int] = []

    def count(self, row: int, tokens: int) -> None:
        """The rows of one call come in order and at once: together they are one entry."""
        if self._counts and row > self._row:
            self._counts[-1] += tokens
        else:
            self._times.append(time.perf_counter())
            self._counts.append(tokens)
        self._row = row

    def __str__(self) -> str:
        if not self._counts:
            return "0 out"
        text = f"{sum(self._counts)} out, the first after {self._times[0] - self._start:.2f} s"
        if len(self._counts) > 1:
            rate = sum(self._counts[1:]) / max(self._times[-1] - self._times[0], 1e-9)
            text += f", then {rate:.1f} tokens/s"
        return text


def read_prompts(path: str) -> list[str]:
    """The prompts of a file: its lines, or the field "prompt" of JSON lines.

    Raises:
      ValueError: an empty file or prompt, or a line that is not what is wanted (named).
    """
    if not Path(path).is_file():
        raise ValueError(f"--prompts_file={path}: no such file")
    lines = Path(path).read_text(encoding="utf-8-sig").split("\n")  # and not where Unicode has further ends of lines
    lines = lines[:-1] if not lines[-1] else lines
    prompts = []
    for number, line in enumerate(lines, 1):
        prompt: Any = line
        if path.endswith(".jsonl"):
            try:
                prompt = json.loads(line)["prompt"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(f'{path}, line {number}: not a JSON object with "prompt"') from None
        if not isinstance(prompt, str) or not prompt:
            raise ValueError(f"{path}, line {number}: the prompt is empty or no text")
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"--prompts_file={path}: it holds no prompts")
    return prompts


@contextlib.contextmanager
def _growing(target: Path | None) -> Iterator[IO[str] | None]:
    """A file, or none for None, that has its name only when it is whole: until then ``.partial`` holds the lines."""
    if target is None:
        yield None
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial")
    with partial.open("w", encoding="utf-8", buffering=1) as file:
        yield file
    partial.replace(target)


def answer_file(speaker: Speaker, path: str, output: str | None, batch_size: int, log_probs: bool = False) -> str:
    """Answers every prompt of a file; returns a line about the speed."""
    if batch_size < 1:
        raise ValueError(f"--batch_size={batch_size}: it must be at least 1")
    target = None if output is None else Path(output)
    if target is not None:
        check_target(target)
    prompts = read_prompts(path)
    encoded = [speaker.encode(prompt) for prompt in prompts]
    clock = Clock()
    with _growing(target) as file, tqdm(total=len(prompts), unit="prompt", disable=None) as bar:
        for start in range(0, len(prompts), batch_size):
            batch = encoded[start : start + batch_size]
            answers = speaker.answer(batch, start, lambda row, tokens: clock.count(row, len(tokens)))
            for row, found in enumerate(answers):
                text, ended = found.text, found.finish_reason
                record: dict[str, Any] = {"prompt": prompts[start + row], "text": text, "finish_reason": ended}
                if log_probs:
                    record |= {"tokens": found.tokens, "log_probs": found.log_probs}
                if file is None:
                    tqdm.write(f"{prompts[start + row]}{text}\n")
                else:
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
            bar.update(len(batch))
    return f"{len(prompts)} prompts, {clock}"


def converse(speaker: Speaker, lines: Iterable[str], write: Callable[[str], Any]) -> None:
    """Each line, with its line break, is added to the text so far, and so is the answer; nothing is read twice."""
    settings, tokenizer = speaker.settings, speaker.tokenizer

    def begin() -> Conversation:
        return Conversation(
            speaker.model,
            sampling=settings.sampling,
            seed=settings.seed,
            eos_id=tokenizer.eos_id,
            stop=settings.stop,
            decode=known_text(tokenizer),
            reading=settings.reading,
        )

    conversation = begin()
    for line in lines:
        if line.strip() == "/new":
            conversation = begin()
            write("(a new conversation)\n> ")
            continue
        text = line.rstrip("\n") + "\n"
        tokens = tokenizer.encode(text) if conversation.length else speaker.encode(text)
        show = Show(speaker, write)
        try:
            generation = conversation.say(tokens, settings.max_new_tokens, show.on_tokens)
        except ValueError as error:
            write(f"error: {error}; /new begins anew\n> ")
            continue
        show.finish()
        write(f"\n[{len(tokens)} tokens in, {show.clock}; ended by {generation.finish_reason}]\n> ")


def load_speaker(
    checkpoint: str,
    settings: Settings,
    *,
    tokenizer: str | None = None,
    step: int | None = None,
    devices: int = 1,
    **types: Any,
) -> Speaker:
    """A model and its tokenizer; raises ValueError where there is none, or too few devices."""
    mesh = rows_mesh(devices)
    loaded = restore.load(checkpoint, tokenizer=tokenizer, needs_tokenizer=True, step=step, **types)
    return Speaker(loaded.model, loaded.tokenizer, settings, mesh)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def check_flags(given: Any) -> None:
    """Raises ValueError for flags that do not go together."""
    if sum((given.prompt is not None, given.prompts_file is not None, given.interactive)) != 1:
        raise ValueError("give one of --prompt, --prompts_file and --interactive")
    if given.output is not None and given.prompts_file is None:
        raise ValueError("--output is for --prompts_file; redirect the screen otherwise")
    if given.log_probs and given.output is None:
        raise ValueError("--log_probs is for --output, whose lines hold them")
    if given.interactive and given.chunk is not None:
        raise ValueError(f"--chunk={given.chunk}: a conversation reads each line as it comes; leave it out")
    if given.devices != 1 and given.prompts_file is None:
        raise ValueError(
            f"--devices={given.devices}: the rows of --prompts_file are shared, one prompt is not; leave it out"
        )


def _run() -> None:
    check_flags(FLAGS)
    sampling = Sampling(FLAGS.temperature, FLAGS.top_k, FLAGS.top_p, FLAGS.repetition_penalty)
    settings = Settings(
        FLAGS.max_new_tokens, sampling, FLAGS.seed, tuple(FLAGS.stop), FLAGS.add_bos, FLAGS.reading, FLAGS.chunk
    )
    speaker = load_speaker(
        FLAGS.checkpoint,
        settings,
        tokenizer=FLAGS.tokenizer,
        step=FLAGS.step,
        dtype=FLAGS.dtype,
        implementation=FLAGS.implementation,
        devices=FLAGS.devices,
    )
    if FLAGS.interactive:
        _write("each line is continued; /new begins anew, Ctrl-D ends\n> ")
        converse(speaker, sys.stdin, _write)
    elif FLAGS.prompts_file is not None:
        print(
            answer_file(speaker, FLAGS.prompts_file, FLAGS.output, FLAGS.batch_size, FLAGS.log_probs), file=sys.stderr
        )
    else:
        _, speed = speaker.say(speaker.encode(FLAGS.prompt), _write, before=FLAGS.prompt)
        print(f"\n[{speed}]", file=sys.stderr)


def main(argv: list[str]) -> None:
    logging.set_verbosity(logging.ERROR)  # at lower levels orbax tells its whole life
    with said_in_one_line(argv):
        _run()


if __name__ == "__main__":
    define_flags()
    app.run(main)
