"""How well does a model find, copy and predict, on tasks that need no download?

Every task is a function of (model, settings, number of samples, seed) that gives a :class:`Result`: a table whose rows
say a length, a second axis (depth, pairs, ...) and a score.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from lte_jax.data import MQAR, Batches, Copying, DataError, SymbolNeedles, TextNeedles
from lte_jax.data.sources import find_units, read_documents
from lte_jax.data.tasks import Task
from lte_jax.data.tokenizer import Tokenizer, check_fits
from lte_jax.evaluate.scores import score_tokens
from lte_jax.lengths import check_lengths
from lte_jax.mixers.base import Reading
from lte_jax.model import LanguageModel


@dataclasses.dataclass(frozen=True)
class Result:
    """What a task gave.

    Attributes:
      axes: names of the two columns that a score belongs to; the second is None where there is one only.
      score: the name of the score. rows: one dictionary for each cell: axes, score and ``samples``.
      total: over everything. settings: of the task.
    """

    task: str
    axes: tuple[str, str | None]
    score: str
    rows: tuple[dict[str, float], ...]
    total: dict[str, float]
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Options:
    """How a task is run.

    Attributes:
      num_samples: rows of each cell. seed: of the rows. batch_size: rows at a time. reading: how LTE reads.
    """

    num_samples: int = 100
    seed: int = 0
    batch_size: int = 8
    reading: Reading = "streaming"

    def __post_init__(self) -> None:
        for name in ("num_samples", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: it must be at least 1")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: it must not be negative")


def needles(
    model: LanguageModel,
    task: SymbolNeedles | TextNeedles,
    options: Options,
    *,
    lengths: Sequence[int] | None = None,
    depths: int = 5,
) -> Result:
    """Accuracy by length and depth: 0 is the haystack's start, 1 its end.

    Text needles are placed at ``depths`` even depths, and a row counts if every token of the answer is right. Symbols
    lie where the task draws them: a question counts in the depth's range that its needle fell into.
    """
    if depths < 1:
        raise ValueError(f"depths={depths}: it must be at least 1")
    rows = []
    check_lengths(model, options.batch_size, max(lengths or [task.length]))
    for length in lengths or [task.length]:
        if isinstance(task, TextNeedles):
            for depth in np.linspace(0, 1, depths) if depths > 1 else [0.5]:
                placed = dataclasses.replace(task, length=length, depth=float(depth))
                found = [all(hits) for hits, _ in _answers(model, placed, options)]
                rows.append(_cell("length", length, "depth", round(float(depth), 3), found))
        else:
            cells: dict[int, list[bool]] = {}
            for hits, distances in _answers(model, dataclasses.replace(task, length=length), options):
                for hit, distance in zip(hits, distances, strict=True):
                    cells.setdefault(min(int((1 - distance / length) * depths), depths - 1), []).append(hit)
            rows += [_cell("length", length, "depth", (k + 0.5) / depths, cells[k]) for k in sorted(cells)]
    return _result("needles", ("length", "depth"), rows, task)


def mqar(
    model: LanguageModel,
    options: Options,
    *,
    parts: Sequence[tuple[int, int]],
    vocabulary: int,
    power: float = MQAR.power,
) -> Result:
    """Accuracy of multi-query recall for each (length, pairs)."""
    rows = []
    check_lengths(model, options.batch_size, max(length for length, _ in parts))
    for length, pairs in parts:
        task = MQAR(length=length, pairs=pairs, vocabulary=vocabulary, power=power)
        found = [hit for hits, _ in _answers(model, task, options) for hit in hits]
        rows.append(_cell("length", length, "pairs", pairs, found))
    return _result("mqar", ("length", "pairs"), rows, task)


def copying(model: LanguageModel, task: Copying, options: Options, *, lengths: Sequence[int] | None = None) -> Result:
    """Share of symbols that are copied right, by the row's length."""
    rows = []
    check_lengths(model, options.batch_size, max(lengths or [task.length]))
    for length in lengths or [task.length]:
        longer = dataclasses.replace(task, length=length)
        found = [hit for hits, _ in _answers(model, longer, options) for hit in hits]
        rows.append(_cell("length", length, None, None, found))
    return _result("copying", ("length", None), rows, task)


def positions(
    model: LanguageModel, tokenizer: Tokenizer, path: str, options: Options, *, length: int, ranges: int = 16
) -> Result:
    """Perplexity of the first ``length`` tokens of documents, by ranges of position; shorter documents are left out."""
    check_fits(tokenizer, model.config.vocab_size)
    if not 1 <= ranges <= length - 1:
        raise ValueError(f"ranges={ranges}: it must be at least 1 and below length={length}")
    long_enough = (ids[:length] for ids in _documents(tokenizer, path) if len(ids) >= length)
    rows = list(itertools.islice(long_enough, options.num_samples))  # of a large corpus no more is read
    if not rows:
        raise DataError(f"{path}: no document has {length} tokens; shorten --lengths or give longer ones")
    check_lengths(model, options.batch_size, length)
    losses = np.concatenate(
        [loss for loss, _ in _losses(model, [row[:-1] for row in rows], [row[1:] for row in rows], options)]
    )
    edges = np.unique(np.linspace(0, length - 1, ranges + 1).round().astype(int))
    cells: list[dict[str, float]] = [
        {
            "position": int(high),
            "perplexity": math.exp(min(float(losses[:, low:high].mean(dtype=np.float64)), 700.0)),
            "samples": losses[:, low:high].size,
        }
        for low, high in itertools.pairwise(edges)
    ]
    total = {"perplexity": math.exp(min(float(losses.mean(dtype=np.float64)), 700.0)), "samples": losses.size}
    settings = {"path": path, "length": length, "tokenizer": tokenizer.name}
    return Result("positions", ("position", None), "perplexity", tuple(cells), total, settings)


def bytes_perplexity(
    model: LanguageModel, tokenizer: Tokenizer, path: str, options: Options, *, length: int | None = None
) -> Result:
    """Perplexity per byte of every text below a folder, and bits per byte; the numbers of tokenizers compare.

    A document is read in windows of ``length`` tokens (default the model's) that do not overlap; each begins with the
    token before it, the first with the tokenizer's bos token.
    """
    check_fits(tokenizer, model.config.vocab_size)
    first = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    if first is None:
        raise DataError(f"tokenizer {tokenizer.name!r} has no token to begin a text with; give one with bos or eos")
    length = model.config.max_length if length is None else length
    check_lengths(model, options.batch_size, length)
    rows = []
    for unit in find_units(path):
        nll, size = 0.0, 0
        for text in read_documents(unit):
            ids = [first, *tokenizer.encode(text)]
            windows = [ids[start : start + length + 1] for start in range(0, len(ids) - 1, length)]
            size += len(text.encode())
            inputs, labels = [window[:-1] for window in windows], [window[1:] for window in windows]
            nll += sum(
                float(loss[asked].sum(dtype=np.float64)) for loss, asked in _losses(model, inputs, labels, options)
            )
        rows.append((unit.path, nll, size))
    count = sum(size for _, _, size in rows)
    if not count:
        raise DataError(f"{path}: the files hold no text; give others")
    cells = [_per_byte({"file": file}, nll, size) for file, nll, size in rows if size]
    total = _per_byte({}, sum(nll for _, nll, _ in rows), count)
    settings = {"path": path, "length": length, "tokenizer": tokenizer.name}
    return Result("bytes", ("file", None), "perplexity", tuple(cells), total, settings)


def _per_byte(start: dict[str, Any], nll: float, count: int) -> dict[str, Any]:
    return {
        **start,
        "perplexity": math.exp(min(nll / count, 700.0)),
        "bits_per_byte": nll / count / math.log(2),
        "samples": count,
    }


def _documents(tokenizer: Tokenizer, path: str) -> Iterator[list[int]]:
    for unit in find_units(path):
        for text in read_documents(unit):
            yield tokenizer.encode(text, add_bos=tokenizer.bos_id is not None)


def _losses(
    model: LanguageModel, inputs: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], options: Options
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(loss [B, T], which positions count) of batches of rows, padded at the right to multiples of 64 tokens."""
    graph, state = nnx.split(model)
    longest = max(map(len, inputs), default=0)
    for start in range(0, len(inputs), options.batch_size):
        batch = range(start, min(start + options.batch_size, len(inputs)))
        ids, wanted, segments = (
            np.full((options.batch_size, -(-longest // 64) * 64), fill, np.int32) for fill in (0, -1, 0)
        )
        for row, index in enumerate(batch):
            size = len(inputs[index])
            ids[row, :size], wanted[row, :size], segments[row, :size] = inputs[index], labels[index], 1
        loss, _ = jax.device_get(score_tokens(graph, state, ids, wanted, segments, reading=options.reading))
        yield loss[: len(batch), :longest], (wanted >= 0)[: len(batch), :longest]


def _answers(model: LanguageModel, task: Task, options: Options) -> Iterator[tuple[list[bool], list[int]]]:
    """For each row: whether each asked token is the model's first choice, and how far back its answer lies."""
    if task.vocab_size > model.config.vocab_size:
        raise DataError(
            f"the task has token ids up to {task.vocab_size - 1}: they must be below the model's vocab_size "
            f"{model.config.vocab_size}; use the model's own task settings or tokenizer"
        )
    graph, state = nnx.split(model)
    task = dataclasses.replace(task, heldout_rows=options.num_samples, seed=options.seed)
    left = options.num_samples
    source = Batches(task.rows("heldout"), options.batch_size, pad_last=True)
    try:
        for batch in source:
            labels = np.asarray(batch["labels"])
            segments = batch.get("segment_ids")
            _, right = jax.device_get(
                score_tokens(graph, state, batch["input_ids"], labels, segments, reading=options.reading)
            )
            for row in range(min(left, len(labels))):
                asked = labels[row] >= 0
                yield (right[row][asked] > 0).tolist(), np.asarray(batch["distance"])[row][asked].tolist()
            left -= len(labels)
    finally:
        source.close()


def _cell(first: str, at: float, second: str | None, depth: float | None, found: Sequence[bool]) -> dict[str, float]:
    where = {first: at} if second is None or depth is None else {first: at, second: depth}
    return {**where, "accuracy": float(np.mean(found)), "samples": len(found)}


def _result(name: str, axes: tuple[str, str | None], rows: list[dict[str, float]], task: Task) -> Result:
    count = sum(row["samples"] for row in rows)
    total = {"accuracy": sum(row["accuracy"] * row["samples"] for row in rows) / count, "samples": count}
    settings = {"kind": type(task).__name__, **dataclasses.asdict(task)}
    return Result(name, axes, "accuracy", tuple(rows), total, settings)


def table(result: Result) -> str:
    """The rows as text."""
    names = [name for name in (*result.axes, result.score) if name is not None] + ["samples"]
    lines = ["".join(f"{name:>14}" for name in names)]
    for row in result.rows:
        cells = [row[name] for name in names]
        lines.append("".join(f"{Path(cell).name if isinstance(cell, str) else f'{cell:.4g}':>14}" for cell in cells))
    lines.append(f"all: {', '.join(f'{name} {value:.4g}' for name, value in result.total.items())}")
    return "\n".join(lines)
