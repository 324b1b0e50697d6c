"""How do rows become batches on every process, in an order that a restart continues exactly?

Global batch i is rows [i B, (i+1) B) of one row order; shard p of P takes its p-th contiguous piece, so the batches of
all shards side by side are the same arrays for any P. The state is one number, the rows consumed by all shards
together: restoring is immediate and may change the number of shards, workers, or the batch size.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Literal

import grain
import numpy as np
from absl import flags

from lte_jax.data.packing import IGNORE, DataError, Row, UnreadableError


def mix_seed(*seeds: int) -> int:
    """A 32-bit seed from several: grain shuffles epoch e with seed + e, so neighbouring seeds must not be used raw."""
    if min(seeds) < 0:
        raise DataError(f"seed={min(seeds)}: it must not be negative; raise it")
    return int(np.random.SeedSequence(seeds).generate_state(1)[0])


FREE_BAD_ROWS = 16
"""So many damaged rows may be left out whatever their share: one of the first few rows is no large share."""


@dataclasses.dataclass(frozen=True)
class ReadingConfig:
    """How batches are read ahead: in ``workers`` processes if there are any, each with ``threads`` threads.

    ``ahead`` batches wait in memory (per worker). Nothing of this changes the batches or their order, but for
    ``bad_rows``: a damaged row stops the run, or becomes one that asks nothing, said loudly. Of the rows read since a
    start, at most the share ``bad_share`` may be left out so, and always the first ``FREE_BAD_ROWS``; one more stops
    the run. A row that the system cannot read, though it may be whole, always does.
    """

    threads: int = 2
    workers: int = 0
    ahead: int = 4
    bad_rows: Literal["stop", "skip"] = "stop"
    bad_share: float = 0.01

    def check(self) -> None:
        for name, least in (("threads", 0), ("workers", 0), ("ahead", 1)):
            if getattr(self, name) < least:
                raise DataError(f"{name}={getattr(self, name)}: it must be at least {least}; raise it")
        if self.bad_rows not in ("stop", "skip"):
            raise DataError(f"bad_rows={self.bad_rows!r}: unknown; use 'stop' or 'skip'")
        if not 0 <= self.bad_share <= 1:
            raise DataError(f"bad_share={self.bad_share}: it must lie in [0, 1]; change it")


def endless(rows: grain.MapDataset, seed: int, batch_size: int | None = None) -> grain.MapDataset:
    """The training order of a finite set of rows: shuffled anew in each epoch, without end.

    Raises:
      DataError: without rows, or with fewer than ``batch_size`` (a batch would hold a row twice).
    """
    if not len(rows):
        raise DataError(
            "rows=0: there is nothing to train on; give more documents, shorter rows or a smaller held-out part"
        )
    if batch_size is not None and len(rows) < batch_size:
        raise DataError(
            f"batch_size={batch_size}: the data hold only {len(rows)} rows, fewer than one batch; "
            "lower batch_size, shorten the rows or give more data"
        )
    return rows.shuffle(seed=mix_seed(seed)).repeat()


def once(rows: grain.MapDataset, seed: int) -> grain.MapDataset:
    """The held-out order of a finite set of rows: mixed once, so that the first few are a sample of all.

    Packing puts the longest documents first, and a mixture one part after the other.
    """
    return rows.shuffle(seed=mix_seed(seed)) if len(rows) else rows


def mix(parts: Sequence[grain.MapDataset], weights: Sequence[float]) -> grain.MapDataset:
    """Interleaves endless row orders so that any long stretch holds them in proportion to ``weights``."""
    if len(parts) != len(weights) or not parts:
        raise DataError(f"weights={tuple(weights)}: one weight for each of {len(parts)} data sets; give as many")
    if any(not weight > 0 for weight in weights):
        raise DataError(f"weights={tuple(weights)}: every weight must be above 0; leave out what is not wanted")
    if len(parts) == 1:
        return parts[0]
    return grain.MapDataset.mix(parts, weights=[float(weight) for weight in weights])


def split_rows(rows: grain.MapDataset, fraction: float) -> tuple[grain.MapDataset, grain.MapDataset]:
    """(training rows, held-out rows): of every k = round(1 / fraction) rows the last is held out; 0 holds out none.

    Rows that share a cut document may fall on both sides; splitting by document (before packing) avoids that.
    """
    if not 0 <= fraction <= 0.5:
        raise DataError(f"heldout={fraction}: the held-out fraction must lie in [0, 0.5]; change it")
    if not fraction:
        return rows, rows[:0]
    every = round(1 / fraction)
    count = len(rows) // every
    if not count:
        raise DataError(f"heldout={fraction}: {len(rows)} rows hold out none; raise it or give more documents")
    heldout = _Picked(rows, every, inside=False, count=count)
    return _Picked(rows, every, inside=True, count=len(rows) - count), heldout


class _Picked(grain.MapDataset):
    """The rows i with i % every < every - 1 (inside) or the others, by arithmetic: nothing is stored."""

    def __init__(self, parent: grain.MapDataset, every: int, *, inside: bool, count: int):
        super().__init__(parent)
        self._every, self._inside, self._count = every, inside, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        index %= self._count
        if self._inside:
            return self._parent[index + index // (self._every - 1)]
        return self._parent[index * self._every + self._every - 1]


class _ShardRows(grain.MapDataset):
    """The rows of one shard, from global row ``first`` on: local row n is first + (n // b) B + p b + n % b, b = B / P.

    A finite order ends with its last whole batch, or, with ``pad_last``, with a batch filled up by rows that ask
    nothing.
    """

    def __init__(
        self,
        parent: grain.MapDataset,
        first: int,
        batch_size: int,
        shard_index: int,
        shard_count: int,
        pad_last: bool,
        reading: ReadingConfig,
    ):
        super().__init__(parent)
        self._reading = reading
        self._left_out: list[int] = []  # appended to by threads; each worker process has its own
        self._first, self._batch_size = first, batch_size
        self._local = batch_size // shard_count
        self._offset = shard_index * self._local
        self._total = len(parent)
        rest = max(self._total - first, 0)
        self._batches = -(-rest // batch_size) if pad_last else rest // batch_size

    def __len__(self) -> int:
        return min(self._batches * self._local, sys.maxsize)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        batch, inside = divmod(index, self._local)
        row = self._first + batch * self._batch_size + self._offset + inside
        if row >= self._total:
            return blank(self._parent[self._total - 1])
        if self._reading.bad_rows == "stop":
            return self._parent[row]
        try:
            return self._parent[row]
        except UnreadableError:
            raise
        except DataError as error:
            self._left_out.append(row)
            self._check_share(index + 1, error)
            print(f"WARNING: row {row} of the reading order is left out: {error}", flush=True)
            return blank(self._whole_row(row))

    def _check_share(self, rows: int, error: DataError) -> None:
        seen = -(-rows // max(self._reading.workers, 1))
        count, share = len(self._left_out), self._reading.bad_share
        if count > max(FREE_BAD_ROWS, share * seen):
            raise DataError(
                f"{count} of {seen} rows cannot be read, more than reading.bad_share={share} allows; copy the data "
                f"again, or raise it. The last one: {error}"
            ) from error

    def _whole_row(self, bad: int) -> Row:
        """A row that can be read, for its shapes: the next one in the order."""
        for row in range(bad + 1, bad + 101):
            try:
                return self._parent[row % self._total]
            except UnreadableError:
                raise
            except DataError:
                continue
        raise DataError(f"row {bad} of the reading order and the next 100 cannot be read; copy the shards again")


def blank(row: Row) -> Row:
    """A row of the same shapes in which nothing is asked."""
    row = {name: np.zeros_like(array) for name, array in row.items()}
    row["labels"] = np.full_like(row["labels"], IGNORE)
    return row


class Batches(Iterator[Row]):
    """Batches of this shard, as dicts of int32 arrays [B / P, T].

    Args:
      rows: the row order, as ``rows(...)`` of a task or a text data set gives it (endless for training).
      batch_size: B, the global batch; a multiple of ``shard_count``.
      shard_index, shard_count: which piece of each batch this process loads.
      reading: threads and worker processes.
      pad_last: whether a finite order ends with a partly blank batch instead of dropping what is left.

    Raises:
      DataError: for sizes that do not divide, or fewer rows than one batch.
    """

    def __init__(
        self,
        rows: grain.MapDataset,
        batch_size: int,
        *,
        shard_index: int = 0,
        shard_count: int = 1,
        reading: ReadingConfig | None = None,
        pad_last: bool = False,
    ):
        reading = reading or ReadingConfig()
        reading.check()
        if batch_size < 1 or batch_size % shard_count:
            raise DataError(
                f"batch_size={batch_size}: it must be a positive multiple of the {shard_count} data shards; change it"
            )
        if not 0 <= shard_index < shard_count:
            raise DataError(f"shard_index={shard_index}: it must lie in [0, {shard_count}); change it")
        if not len(rows) or (len(rows) < batch_size and not pad_last):
            raise DataError(
                f"batch_size={batch_size}: the data hold only {len(rows)} rows, fewer than one batch; "
                "lower batch_size, shorten the rows or give more data"
            )
        self._rows, self._batch_size, self._reading, self._pad_last = rows, batch_size, reading, pad_last
        self._shard_index, self._shard_count = shard_index, shard_count
        self._consumed = 0
        self._source: grain.DatasetIterator | None = None

    def __next__(self) -> Row:
        if self._source is None:
            self._source = self._open()
        batch = next(self._source)
        if self._reading.workers:  # workers hand over shared memory: a copy frees it at once
            batch = {name: np.array(array) for name, array in batch.items()}
        self._consumed += self._batch_size
        return batch

    def get_state(self) -> dict[str, int]:
        """``{"rows": n}``: the rows that all shards together have consumed; the same on every process."""
        return {"rows": self._consumed}

    def set_state(self, state: dict[str, int]) -> None:
        """Continues after ``state["rows"]`` rows, whichever shards, workers or batch size brought them there."""
        rows = state.get("rows") if isinstance(state, dict) else None
        if isinstance(rows, bool) or not isinstance(rows, int) or not 0 <= rows <= sys.maxsize:
            raise DataError(
                f"state={state!r}: a data position is {{'rows': n}} with n >= 0; restore another checkpoint"
            )
        self.close()
        self._consumed = rows

    def close(self) -> None:
        """Stops threads and workers; the next ``next`` starts them again."""
        if self._source is not None:
            self._source.close()
            self._source = None

    def _open(self) -> grain.DatasetIterator:
        local = self._batch_size // self._shard_count
        rows = _ShardRows(
            self._rows,
            self._consumed,
            self._batch_size,
            self._shard_index,
            self._shard_count,
            self._pad_last,
            self._reading,
        )
        options = grain.ReadOptions(num_threads=self._reading.threads, prefetch_buffer_size=self._reading.ahead)
        batches = rows.batch(local, drop_remainder=True).to_iter_dataset(options)
        if self._reading.workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # grain reads its own flags to start workers; a library has parsed none
            batches = batches.mp_prefetch(
                grain.MultiprocessingOptions(
                    num_workers=self._reading.workers, per_worker_buffer_size=self._reading.ahead
                ),
                worker_init_fn=functools.partial(_init_worker, os.getpid()),
            )
        return iter(batches)


def _init_worker(parent: int, worker_index: int, worker_count: int) -> None:
    del worker_index, worker_count
    exit_with_parent(parent)


def exit_with_parent(parent: int) -> None:
    """Ends this worker process soon after process ``parent`` is gone, even if it was killed: no orphans stay."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="exit-with-parent").start()
