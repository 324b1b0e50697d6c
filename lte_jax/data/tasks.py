"""Which synthetic recall tasks are there, and what does row number ``index`` of one of them hold?

A task is a frozen record of settings. ``task.rows(split)`` is a grain ``MapDataset`` whose row is a function of
(seed, split, index) alone: a dict of int32 arrays of length T

* ``input_ids``;
* ``labels``: the target of the logits at the same position, ``IGNORE`` where nothing is asked;
* ``distance``: at a query, how many tokens back the answer was written; 0 elsewhere.

The rows of text tasks (needles hidden in sentences) are in ``needles.py``.
"""

from __future__ import annotations

import abc
import dataclasses
import sys
from typing import Literal

import grain
import numpy as np

from lte_jax.data.packing import IGNORE, DataError, Row
from lte_jax.data.pipeline import endless, mix_seed

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")


@dataclasses.dataclass(frozen=True)
class Task(abc.ABC):
    """What every task has: a row length, a seed, and how many rows it makes.

    ``train_rows`` = 0 makes fresh rows for ever; another number makes that many, shuffled anew in each epoch.
    """

    length: int = 96
    seed: int = 0
    train_rows: int = 0
    heldout_rows: int = 1000

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int:
        """One more than the largest token id."""

    @abc.abstractmethod
    def check(self) -> None:
        """Raises DataError (value, rule, fix) where the settings cannot make a row."""

    @abc.abstractmethod
    def row(self, rng: np.random.Generator) -> Row:
        """One row, drawn with ``rng`` alone."""

    def rows(self, split: Split = "train", *, batch_size: int | None = None) -> grain.MapDataset:
        """The rows of a split in training order: without end for "train", ``heldout_rows`` of them for "heldout"."""
        require(self.seed >= 0, f"seed={self.seed}", "it must not be negative", "raise it")
        self.check()
        if split == "heldout":
            return grain.MapDataset.source(TaskRows(self, split, self.heldout_rows))
        if not self.train_rows:
            return grain.MapDataset.source(TaskRows(self, split, sys.maxsize))
        return endless(grain.MapDataset.source(TaskRows(self, split, self.train_rows)), self.seed, batch_size)


class TaskRows:
    """Random access to the rows of a task: row ``index`` does not depend on which rows were read before."""

    def __init__(self, task: Task, split: Split, count: int):
        self.task, self.split, self.count = task, split, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Row:
        sequence = np.random.SeedSequence(self.task.seed, spawn_key=(SPLITS.index(self.split), int(index)))
        return self.task.row(np.random.default_rng(sequence))

    def __repr__(self) -> str:
        return f"TaskRows({self.task}, {self.split}, {self.count})"


def require(holds: bool, value: str, rule: str, fix: str) -> None:
    """Raises DataError with one line unless ``holds``."""
    if not holds:
        raise DataError(f"{value}: {rule}; {fix}")


def empty_row(length: int) -> Row:
    """A row of T zeros in which nothing is asked."""
    return {
        "input_ids": np.zeros(length, np.int32),
        "labels": np.full(length, IGNORE, np.int32),
        "distance": np.zeros(length, np.int32),
    }


@dataclasses.dataclass(frozen=True)
class SymbolNeedles(Task):
    """Needles of one token each, a key and its value in one symbol, asked for at the end of the row.

    Token ids: filler ``0 .. fillers-1``; the needle of (key, value) is ``fillers + values * key + value``; then
    ``keys`` query tokens, then ``values`` answer tokens (labels only). A row is filler with ``needles`` needles of
    different keys, and in its last ``queries`` positions the query tokens of keys that occurred, in random order; the
    label there is the answer token of the key's value. Every answer lies at least ``min_distance`` tokens before its
    query: choose it larger than what any window of the compared models reaches. Chance is 1 / values.
    """

    length: int = 96
    needles: int = 8
    keys: int = 8
    values: int = 8
    queries: int = 8
    fillers: int = 16
    min_distance: int = 30

    @property
    def vocab_size(self) -> int:
        return self.fillers + self.keys * self.values + self.keys + self.values

    @property
    def chance(self) -> float:
        return 1.0 / self.values

    def check(self) -> None:
        room = self.length - self.queries - self.min_distance + 1
        require(self.fillers >= 1, f"fillers={self.fillers}", "a row needs at least 1 filler token", "raise fillers")
        require(
            1 <= self.queries <= self.needles <= self.keys,
            f"queries={self.queries}, needles={self.needles}, keys={self.keys}",
            "1 <= queries <= needles <= keys (keys differ within a row)",
            "lower queries or needles, or raise keys",
        )
        require(self.values >= 1, f"values={self.values}", "a key needs at least 1 value", "raise values")
        require(
            self.min_distance >= 1,
            f"min_distance={self.min_distance}",
            "a needle stands at least 1 token before its query",
            "raise min_distance",
        )
        require(
            self.needles <= room,
            f"length={self.length}, min_distance={self.min_distance}",
            f"{self.needles} needles need length - queries - min_distance + 1 = {room} >= {self.needles} places",
            "raise length or lower min_distance",
        )

    def row(self, rng: np.random.Generator) -> Row:
        row = empty_row(self.length)
        first_query = self.length - self.queries
        row["input_ids"][:] = rng.integers(self.fillers, size=self.length)
        places = rng.choice(first_query - self.min_distance + 1, self.needles, replace=False)
        keys = rng.choice(self.keys, self.needles, replace=False)
        values = rng.integers(self.values, size=self.needles)
        row["input_ids"][places] = self.fillers + self.values * keys + values
        asked = rng.choice(self.needles, self.queries, replace=False)
        at = np.arange(first_query, self.length)
        query_base = self.fillers + self.keys * self.values
        row["input_ids"][at] = query_base + keys[asked]
        row["labels"][at] = query_base + self.keys + values[asked]
        row["distance"][at] = at - places[asked]
        return row


@dataclasses.dataclass(frozen=True)
class MQAR(Task):
    """Multi-query associative recall, Zoology's recipe.

    The first 2n tokens are ``k v k v ...`` with different keys from 1 .. L/2 - 1 and different values from L/2 .. L -
    1; each key is asked once, at position 2n + 2 (i - 1), with i drawn without replacement from p(i) ~ a i^(a-1), i = 1
    .. (T - 2n) / 2. The label at a query is its value. All other positions hold random tokens of the vocabulary.
    """

    length: int = 64
    pairs: int = 4
    vocabulary: int = 8192
    power: float = 0.01

    @property
    def vocab_size(self) -> int:
        return self.vocabulary

    def check(self) -> None:
        require(
            self.length % 2 == 0 and 4 * self.pairs <= self.length,
            f"length={self.length}, pairs={self.pairs}",
            "length must be even and at least 4 * pairs",
            f"set length >= {4 * self.pairs}",
        )
        require(
            self.vocabulary % 2 == 0 and self.vocabulary > max(self.length, 2 * self.pairs + 1),
            f"vocabulary={self.vocabulary}",
            "it must be even and larger than length",
            "raise vocabulary",
        )

    def row(self, rng: np.random.Generator) -> Row:
        row = empty_row(self.length)
        half, context = self.vocabulary // 2, 2 * self.pairs
        keys = 1 + rng.choice(half - 1, self.pairs, replace=False)
        values = half + rng.choice(half, self.pairs, replace=False)
        places = (self.length - context) // 2
        weight = self.power * np.arange(1, places + 1) ** (self.power - 1)
        at = context + 2 * rng.choice(places, self.pairs, replace=False, p=weight / weight.sum())
        row["input_ids"][:] = rng.integers(self.vocabulary, size=self.length)
        row["input_ids"][0:context:2] = keys
        row["input_ids"][1:context:2] = values
        row["input_ids"][at] = keys
        row["labels"][at] = values
        row["distance"][at] = at - np.arange(1, context, 2)
        return row


ZOOLOGY_TRAIN = ((64, 4, 100_000), (128, 8, 20_000), (256, 16, 20_000), (256, 32, 20_000), (256, 64, 20_000))
ZOOLOGY_TEST = tuple(
    (length, pairs, 1000)
    for length, pairs in ((64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256))
)


@dataclasses.dataclass(frozen=True)
class MQARMix:
    """MQAR rows of several (length, pairs, rows): no batch mixes two of them; the batches are shuffled each epoch.

    Rows of a batch share their length, so the row order depends on the batch size; rows left over when a part is not a
    multiple of the batch size are not used. The held-out split takes the batches of ``test`` once, in a mixed order.
    """

    train: tuple[tuple[int, int, int], ...] = ZOOLOGY_TRAIN
    test: tuple[tuple[int, int, int], ...] = ZOOLOGY_TEST
    vocabulary: int = 8192
    power: float = 0.01
    seed: int = 0

    @property
    def length(self) -> int:
        """The longest row."""
        return max(length for length, _, _ in (*self.train, *self.test))

    @property
    def vocab_size(self) -> int:
        return self.vocabulary

    def part(self, split: Split, index: int) -> MQAR:
        """The task of one (length, pairs, rows) of a split."""
        length, pairs, count = (self.train if split == "train" else self.test)[index]
        return MQAR(
            length=length,
            pairs=pairs,
            vocabulary=self.vocabulary,
            power=self.power,
            seed=mix_seed(self.seed, index),
            train_rows=count,
            heldout_rows=count,
        )

    def rows(self, split: Split = "train", *, batch_size: int | None = None) -> grain.MapDataset:
        """Rows in batches of one length each; ``batch_size`` is the global batch."""
        if batch_size is None:
            raise DataError("batch_size=None: a mix of lengths needs the global batch size; pass batch_size")
        parts = [self.part(split, index) for index in range(len(self.train if split == "train" else self.test))]
        for part in parts:
            part.check()
        return BatchwiseRows(parts, split, batch_size, mix_seed(self.seed))


class BatchwiseRows(grain.MapDataset):
    """Rows of several tasks, laid out so that rows [i B, (i+1) B) are of one; whole batches shuffled per epoch, in
    training without end."""

    def __init__(self, parts: list[MQAR], split: Split, batch_size: int, seed: int):
        super().__init__()
        self._batch_size = batch_size
        self._endless = split == "train"
        self._sources = [TaskRows(part, split, part.train_rows) for part in parts]
        batches = [(index, start) for index, part in enumerate(parts) for start in range(part.train_rows // batch_size)]
        if not batches:
            raise DataError(f"batch_size={batch_size}: larger than every part of the mix; lower it or add rows")
        self._batches = np.array(batches)
        order = grain.MapDataset.range(len(batches)).shuffle(seed=seed)
        self._order = order.repeat() if self._endless else order

    def __len__(self) -> int:
        return sys.maxsize if self._endless else self._batch_size * len(self._order)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        part, start = self._batches[self._order[index // self._batch_size]]
        return self._sources[part][start * self._batch_size + index % self._batch_size]


@dataclasses.dataclass(frozen=True)
class Copying(Task):
    """Repeat ``symbols`` random tokens after ``length - 2 * symbols`` tokens of delay.

    Token ids: 0 is blank, 1 says "repeat", symbols are 2 .. vocab_size - 1. The row is: symbols, blanks, "repeat",
    the symbols but the last; every position from "repeat" on is labelled with the symbol to write next.
    """

    length: int = 96
    symbols: int = 16
    alphabet: int = 8

    @property
    def vocab_size(self) -> int:
        return self.alphabet + 2

    def check(self) -> None:
        require(
            2 <= 2 * self.symbols <= self.length,
            f"length={self.length}, symbols={self.symbols}",
            "length must be at least 2 * symbols, with at least 1 symbol",
            "raise length or lower symbols",
        )
        require(self.alphabet >= 2, f"alphabet={self.alphabet}", "at least 2 symbols are needed", "raise alphabet")

    def row(self, rng: np.random.Generator) -> Row:
        row = empty_row(self.length)
        symbols = 2 + rng.integers(self.alphabet, size=self.symbols)
        start = self.length - self.symbols
        row["input_ids"][: self.symbols] = symbols
        row["input_ids"][start] = 1
        row["input_ids"][start + 1 :] = symbols[:-1]
        row["labels"][start:] = symbols
        row["distance"][start:] = start
        return row
