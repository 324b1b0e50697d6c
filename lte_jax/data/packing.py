"""How are documents packed into rows of T tokens, and what is the label of each token?

A row is a dict of int32 arrays of length T: ``input_ids`` and ``segment_ids`` (1, 2, ... in order of place; 0 is
padding, only at the end). Every token of every document stands in exactly one row, once. A document that is cut
becomes several pieces, each a segment of its own: no label crosses the cut.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import numpy as np

IGNORE = -1
"""The label of a position whose loss is not counted."""

Row = dict[str, np.ndarray]


class DataError(ValueError):
    """Data or settings that cannot be used; the message is one line: the value, the rule, the fix."""


class UnreadableError(DataError):
    """A file that the system could not read, though it may be whole; ``bad_rows=skip`` does not pass over it."""


@dataclasses.dataclass(frozen=True)
class Packing:
    """How documents become rows.

    ``best_fit``: pieces of at most T tokens, longest first, each into the fullest row that still holds it; a document
    of at most T tokens is never cut. ``greedy``: documents in their order, one after the other; with ``split`` they
    are cut where a row ends (no padding but in the last row), without it a document that does not fit starts the next
    row. Without ``split``, a document of more than T tokens is an error.
    """

    length: int = 1024
    method: Literal["best_fit", "greedy"] = "best_fit"
    split: bool = True

    def check(self) -> None:
        """Raises DataError unless rows can be made."""
        if self.length < 2:
            raise DataError(f"length={self.length}: a row needs 2 tokens to predict one; raise length")
        if self.method not in ("best_fit", "greedy"):
            raise DataError(f"method={self.method!r}: unknown packing; use 'best_fit' or 'greedy'")


def pack(documents: Iterable[Sequence[int] | np.ndarray], packing: Packing) -> Iterator[list[np.ndarray]]:
    """Packs token sequences into rows, each a list of segments (int32 arrays) of at most T tokens together.

    Empty documents are dropped. ``best_fit`` reads all documents first; ``greedy`` needs one row of memory.
    """
    packing.check()
    arrays = (np.asarray(document, np.int32) for document in documents)
    pieces = (_check_length(array, number, packing) for number, array in enumerate(arrays) if array.size)
    if packing.method == "best_fit":
        return _best_fit(pieces, packing.length)
    return _greedy(pieces, packing.length, packing.split)


def row_of_segments(segments: Sequence[np.ndarray], length: int, pad_id: int) -> Row:
    """The arrays of one row: segments side by side, padding after them."""
    input_ids = np.full(length, pad_id, np.int32)
    segment_ids = np.zeros(length, np.int32)
    end = 0
    for number, segment in enumerate(segments, start=1):
        start, end = end, end + len(segment)
        input_ids[start:end] = segment
        segment_ids[start:end] = number
    return {"input_ids": input_ids, "segment_ids": segment_ids}


def with_labels(row: Row) -> Row:
    """Adds next-token labels: labels[t] = input_ids[t+1] where both are of one segment, else IGNORE."""
    input_ids, segment_ids = row["input_ids"], row["segment_ids"]
    labels = np.full(input_ids.shape, IGNORE, np.int32)
    inside = (segment_ids[:-1] == segment_ids[1:]) & (segment_ids[1:] != 0)
    labels[:-1] = np.where(inside, input_ids[1:], IGNORE)
    return {**row, "labels": labels}


def _check_length(document: np.ndarray, number: int, packing: Packing) -> np.ndarray:
    if document.size > packing.length and not packing.split:
        raise DataError(
            f"document {number} has {document.size} tokens: with split=false it must fit a row of {packing.length}; "
            "raise length or set split=true"
        )
    return document


def _best_fit(documents: Iterable[np.ndarray], length: int) -> Iterator[list[np.ndarray]]:
    pieces = [document[start : start + length] for document in documents for start in range(0, len(document), length)]
    pieces.sort(key=len, reverse=True)  # stable: equal lengths keep their order
    rows: list[list[np.ndarray]] = []
    rows_with: dict[int, list[int]] = defaultdict(list)  # free places -> rows
    free: list[int] = []  # the keys of rows_with, sorted
    for piece in pieces:
        place = bisect.bisect_left(free, len(piece))
        if place == len(free):
            rows.append([piece])
            row, space = len(rows) - 1, length - len(piece)
        else:
            space = free[place]
            row = rows_with[space].pop()
            if not rows_with[space]:
                free.pop(place)
            rows[row].append(piece)
            space -= len(piece)
        if space:
            if not rows_with[space]:
                bisect.insort(free, space)
            rows_with[space].append(row)
    yield from rows


def _greedy(documents: Iterable[np.ndarray], length: int, split: bool) -> Iterator[list[np.ndarray]]:
    row: list[np.ndarray] = []
    space = length
    for document in documents:
        if not split and len(document) > space:
            yield row
            row, space = [], length
        while len(document):
            piece, document = document[:space], document[space:]
            row.append(piece)
            space -= len(piece)
            if not space:
                yield row
                row, space = [], length
    if row:
        yield row
