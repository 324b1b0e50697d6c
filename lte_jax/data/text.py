"""How do local documents become training rows: tokenised, split into training and held-out parts, packed in memory?

For corpora that do not fit in memory, ``experiments.prepare`` does the same into shards.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import grain
import numpy as np

from lte_jax.data.packing import DataError, Packing, Row, pack, row_of_segments, with_labels
from lte_jax.data.pipeline import endless, once, split_rows
from lte_jax.data.sources import Unit, find_units, read_documents
from lte_jax.data.tasks import Split
from lte_jax.data.tokenizer import BYTES, Tokenizer, load_tokenizer

IN_MEMORY_BYTES = 2**30
"""More text than this is refused here and belongs into shards."""


@dataclasses.dataclass(frozen=True)
class Text:
    """Documents on this machine and how they become rows.

    Attributes:
      path: a file, a folder or a glob (txt, jsonl, parquet, ArrayRecord of text).
      field: the text's field in jsonl, or its column in parquet.
      tokenizer: ``"bytes"``, a tokenizer.json, or a folder with one.
      packing: row length and rule.
      add_bos, add_eos: whether each document starts with and ends in its special token; add_bos=None: where the
        tokenizer has one, as generation and evaluation begin a text, and as the authors train.
      heldout: the fraction held out.
      heldout_by: "document": those chosen by a hash of their text and ``seed``, so that equal documents fall on one
        side; "row": the last of every 1 / heldout, for text of one or a few documents.
      undecodable: whether bytes that are not UTF-8 are an error or become U+FFFD.
      seed: of the rows' order and of which documents are held out.
    """

    path: str = ""
    field: str = "text"
    tokenizer: str = BYTES
    packing: Packing = dataclasses.field(default_factory=Packing)
    add_bos: bool | None = None
    add_eos: bool = True
    heldout: float = 0.0
    heldout_by: Literal["document", "row"] = "document"
    undecodable: Literal["error", "replace"] = "error"
    seed: int = 0

    @property
    def length(self) -> int:
        return self.packing.length

    @property
    def vocab_size(self) -> int:
        return load_tokenizer(self.tokenizer).vocab_size

    def check(self) -> Tokenizer:
        """Raises DataError (value, rule, fix) where these settings cannot work; else the tokenizer."""
        self.packing.check()
        tokenizer = load_tokenizer(self.tokenizer)
        for role, wanted, token in (
            ("bos", self.add_bos, tokenizer.bos_id),
            ("eos", self.add_eos, tokenizer.eos_id),
        ):
            if wanted and token is None:
                raise DataError(
                    f"add_{role}=true: tokenizer {tokenizer.name!r} has no such token; set add_{role}=false"
                )
        for name, value, choices in (
            ("heldout_by", self.heldout_by, ("document", "row")),
            ("undecodable", self.undecodable, ("error", "replace")),
        ):
            if value not in choices:
                raise DataError(f"{name}={value!r}: unknown; use {' or '.join(map(repr, choices))}")
        if not 0 <= self.heldout <= 0.5:
            raise DataError(f"heldout={self.heldout}: the held-out fraction must lie in [0, 0.5]; change it")
        return tokenizer

    def is_heldout(self, document: str) -> bool:
        """Whether this document is held out: a function of its text and the seed."""
        if not self.heldout or self.heldout_by != "document":
            return False
        digest = hashlib.blake2b(document.encode(), digest_size=8, key=b"%d" % self.seed)
        return int.from_bytes(digest.digest(), "little") < self.heldout * 2**64

    def pack_units(self, units: Iterable[Unit], tokenizer: Tokenizer) -> dict[Split, Iterator[list[np.ndarray]]]:
        """The packed rows of both splits of some units, packed by themselves."""
        parts: dict[Split, list[np.ndarray]] = {"train": [], "heldout": []}
        add_bos = tokenizer.bos_id is not None if self.add_bos is None else self.add_bos
        for unit in units:
            for document in read_documents(unit, self.field, self.undecodable):
                ids = tokenizer.encode(document, add_bos=add_bos, add_eos=self.add_eos)
                parts["heldout" if self.is_heldout(document) else "train"].append(np.array(ids, np.int32))
        return {split: pack(documents, self.packing) for split, documents in parts.items()}

    def rows(self, split: Split = "train", *, batch_size: int | None = None) -> grain.MapDataset:
        """The rows of a split in reading order: without end for "train", once for "heldout"."""
        self.check()
        units = tuple(find_units(self.path))
        size = sum(unit.size for unit in units)
        if size > IN_MEMORY_BYTES:
            raise DataError(
                f"path={self.path!r}: {size / 2**30:.1f} GiB of text is more than the "
                f"{IN_MEMORY_BYTES / 2**30:.0f} GiB packed in memory; "
                "write shards with `python -m experiments.prepare` and train from them"
            )
        changed = tuple(Path(unit.path).stat().st_mtime_ns for unit in units)
        parts = _load(self, units, changed)
        rows = grain.MapDataset.source(parts["train"])
        if self.heldout and self.heldout_by == "row":
            rows, heldout = split_rows(rows, self.heldout)
        else:
            heldout = grain.MapDataset.source(parts["heldout"])
        if self.heldout and not (len(rows) and len(heldout)):
            raise DataError(
                f"heldout={self.heldout}: {len(rows)} training rows and {len(heldout)} held-out rows; both need some: "
                "set data.heldout_by=row, change data.heldout, or give more documents"
            )
        return endless(rows, self.seed, batch_size) if split == "train" else once(heldout, self.seed)


class MemoryRows:
    """Random access to packed rows in memory, with labels; stored as one array of tokens."""

    def __init__(self, rows: Iterable[list[np.ndarray]], length: int, pad_id: int):
        self._length, self._pad_id = length, pad_id
        kept = [(np.concatenate(row), np.array([len(segment) for segment in row])) for row in rows]
        self._starts = np.cumsum([0, *(len(tokens) for tokens, _ in kept)])
        self._lengths = [lengths for _, lengths in kept]
        self._tokens = np.concatenate([tokens for tokens, _ in kept]) if kept else np.zeros(0, np.int32)

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, index: int) -> Row:
        tokens = self._tokens[self._starts[index] : self._starts[index + 1]]
        segments = np.split(tokens, np.cumsum(self._lengths[index])[:-1])
        return with_labels(row_of_segments(segments, self._length, self._pad_id))

    def __repr__(self) -> str:
        return f"MemoryRows({len(self)} rows of {self._length})"


def padding_id(tokenizer: Tokenizer) -> int:
    """The id written where there is no token: padding's, else the end's, else 0. Nothing reads it: segment_ids is 0."""
    return next((token for token in (tokenizer.pad_id, tokenizer.eos_id) if token is not None), 0)


@functools.lru_cache(maxsize=2)
def _load(settings: Text, units: tuple[Unit, ...], changed: tuple[int, ...]) -> dict[Split, MemoryRows]:
    del changed  # part of the cache's key: a changed file is read again
    tokenizer = settings.check()
    packed = settings.pack_units(units, tokenizer)
    return {split: MemoryRows(rows, settings.length, padding_id(tokenizer)) for split, rows in packed.items()}
