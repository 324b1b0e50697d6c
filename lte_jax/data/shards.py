"""How do packed rows lie on disk, and how are they checked and read again?

A folder of shards holds ``train-00000.array_record``, ..., ``heldout-00000.array_record``, ... and ``manifest.json``,
which is written last: a folder without it is unfinished. One record is one row without its padding: ``uint32 n, uint32
bytes per id, uint32 lengths[n], ids`` (little-endian), n segments side by side.
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np

from lte_jax.data.packing import DataError, Row, row_of_segments, with_labels
from lte_jax.data.pipeline import endless, once, split_rows
from lte_jax.data.readers import FILES
from lte_jax.data.tasks import Split
from lte_jax.whole_files import whole_file

MANIFEST = "manifest.json"
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of the manifest."""

    name: str
    rows: int
    tokens: int
    segments: int
    size: int
    sha256: str


def encode_row(segments: Sequence[np.ndarray], id_bytes: int) -> bytes:
    """The record of a row."""
    lengths = np.array([len(segments), id_bytes, *map(len, segments)], "<u4")
    return lengths.tobytes() + np.concatenate(segments).astype(f"<u{id_bytes}").tobytes()


def decode_row(record: bytes) -> list[np.ndarray]:
    """The segments of a record."""
    count, id_bytes = (int(number) for number in np.frombuffer(record, "<u4", 2))
    lengths = np.frombuffer(record, "<u4", count, offset=8)
    ids = np.frombuffer(record, f"<u{id_bytes}", offset=8 + 4 * count).astype(np.int32)
    return np.split(ids, np.cumsum(lengths)[:-1])


def write_shard(path: Path, rows: Iterable[Sequence[np.ndarray]], id_bytes: int) -> Shard | None:
    """Writes a whole file; None, and no file, without rows."""
    from array_record.python import array_record_module

    rows = iter(rows)
    first = next(rows, None)
    if first is None:
        return None
    counts = np.zeros(3, np.int64)
    with whole_file(path) as partial:
        partial.unlink(missing_ok=True)
        # One record per chunk: training reads rows at random.
        writer = array_record_module.ArrayRecordWriter(str(partial), "group_size:1,zstd:3,max_parallelism:1")
        try:
            for segments in itertools.chain([first], rows):
                writer.write(encode_row(segments, id_bytes))
                counts += (1, sum(map(len, segments)), len(segments))
        finally:
            writer.close()
        size, digest = partial.stat().st_size, file_digest(partial)
    row_count, tokens, pieces = (int(count) for count in counts)
    return Shard(path.name, row_count, tokens, pieces, size, digest)


def file_digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a folder of shards, checked.

    Raises:
      DataError: if it is missing, damaged, or of another format.
    """
    path = Path(folder).expanduser() / MANIFEST
    if not path.is_file():
        raise DataError(
            f"path={str(folder)!r}: no {MANIFEST} there, so no finished shards; "
            "run `python -m experiments.prepare` (again: it continues where it stopped)"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        found = manifest["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a manifest of shards; prepare the folder again") from error
    if found != FORMAT:
        raise DataError(f"{path}: format {found}, but this version reads {FORMAT}; prepare the folder again")
    return manifest


class ShardRows:
    """Random access to the rows of several shards, in the manifest's order, with labels."""

    def __init__(self, folder: Path, shards: Sequence[Shard], length: int, pad_id: int, *, verify: bool):
        self._folder, self._shards, self._length, self._pad_id = folder, list(shards), length, pad_id
        self._starts = [0, *itertools.accumulate(shard.rows for shard in shards)]
        self._written = [check_shard(folder, shard, verify=verify) for shard in shards]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Row:
        number = bisect.bisect_right(self._starts, index) - 1
        path = self._folder / self._shards[number].name
        record = FILES.read(path, index - self._starts[number], self._written[number])
        return with_labels(row_of_segments(decode_row(record), self._length, self._pad_id))

    def __repr__(self) -> str:
        return f"ShardRows({self._folder}, {len(self._shards)} shards, {len(self)} rows)"


def check_shard(folder: Path, shard: Shard, *, verify: bool) -> int:
    """When the file was written; DataError unless it is there with its size and, if ``verify``, its checksum."""
    path = folder / shard.name
    if not path.is_file():
        raise DataError(f"{path}: the shard is missing; copy it again or prepare the folder again")
    found = path.stat()
    if found.st_size != shard.size:
        raise DataError(
            f"{path}: {found.st_size} bytes, but the manifest says {shard.size}; "
            "copy it again or prepare the folder again"
        )
    if verify and file_digest(path) != shard.sha256:
        raise DataError(f"{path}: its checksum differs from the manifest's; copy it again or prepare the folder again")
    return found.st_mtime_ns


@dataclasses.dataclass(frozen=True)
class PackedRows:
    """A folder of packed rows as training data.

    ``heldout`` is the fraction of rows held out if the shards were written without a held-out part. ``verify`` reads
    every file once at the start and compares checksums (sizes are always compared).
    """

    path: str = ""
    heldout: float = 0.0
    seed: int = 0
    verify: bool = False

    @property
    def length(self) -> int:
        return int(read_manifest(self.path)["length"])

    @property
    def vocab_size(self) -> int:
        return int(read_manifest(self.path)["vocab_size"])

    @property
    def tokenizer(self) -> str:
        """The tokenizer's files travel with the shards."""
        read_manifest(self.path)  # where there are no shards, that is said, and not that their tokenizer is missing
        return str(Path(self.path).expanduser() / "tokenizer")

    def rows(self, split: Split = "train", *, batch_size: int | None = None) -> grain.MapDataset:
        """The rows of a split in reading order: without end for "train", once for "heldout"."""
        manifest = read_manifest(self.path)
        if manifest["heldout"]:
            if self.heldout:
                raise DataError(f"heldout={self.heldout}: {self.path} has a held-out part of its own; leave it out")
            rows = self._open(manifest, split)
        else:
            rows = split_rows(self._open(manifest, "train"), self.heldout)[0 if split == "train" else 1]
        return endless(rows, self.seed, batch_size) if split == "train" else once(rows, self.seed)

    def _open(self, manifest: dict[str, Any], split: Split) -> grain.MapDataset:
        folder = Path(self.path).expanduser()
        shards = [Shard(**shard) for shard in manifest[split]]
        return grain.MapDataset.source(
            ShardRows(folder, shards, manifest["length"], manifest["pad_id"], verify=self.verify)
        )
