"""Which documents does a path hold: txt, jsonl, parquet or ArrayRecord, one file, a folder or a glob?

A path is cut into *units* (a file, a byte range of a jsonl file, a row group, a range of records), so that a large
corpus is read in parallel, and so that a restart reads the same pieces.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from lte_jax.data.packing import DataError
from lte_jax.data.readers import open_records, read_records

Kind = Literal["text", "jsonl", "parquet", "array_record"]

KINDS: dict[str, Kind] = {
    ".txt": "text",
    ".md": "text",
    ".rst": "text",
    ".py": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".array_record": "array_record",
    ".arrayrecord": "array_record",
}
"""What is read in a folder, by suffix. A file named directly or by a glob is read as text if its suffix is unknown, and
as JSON lines if it is .json, of which a folder may hold other ones."""

COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip")
"""Suffixes of files that are not read, and never passed over in silence."""

UNIT_BYTES = 32 * 2**20
"""About how many bytes of a jsonl file, or of an ArrayRecord file, make a unit."""


@dataclasses.dataclass(frozen=True)
class Unit:
    """A piece of a corpus: [start, stop) counts bytes (jsonl, text), row groups (parquet) or records (ArrayRecord)."""

    path: str
    kind: Kind
    start: int
    stop: int
    size: int
    """About how many bytes of text it holds."""


def find_files(path: str) -> list[Path]:
    """The files of a path, sorted by name: itself, all known files below a folder, or the matches of a glob.

    Raises:
      DataError: if there are none, or one is compressed.
    """
    files = _find_files(path)
    packed = next((file for file in files if file.suffix.lower() in COMPRESSED), None)
    if packed is not None:
        raise DataError(f"path={path!r}: {packed} is compressed, which is not read; unpack such files, or name others")
    return files


def _find_files(path: str) -> list[Path]:
    if not path:
        raise DataError("path='': no data path was given; name a file, a folder or a glob")
    given = Path(path).expanduser()
    if given.is_file():
        return [given]
    if given.is_dir():
        files = [file for file in _below(given) if file.suffix.lower() in (*KINDS, *COMPRESSED) and file.is_file()]
        if not files:
            raise DataError(
                f"path={path!r}: the folder holds no {', '.join(KINDS)} file; name another, or a glob for other files"
            )
        return sorted(files)
    matches = sorted(Path(match) for match in glob.glob(str(given), recursive=True) if Path(match).is_file())
    if not matches:
        raise DataError(f"path={path!r}: no such file or folder, and no file matches it as a glob; correct the path")
    return matches


def _below(folder: Path) -> Iterator[Path]:
    """All files below a folder, in linked folders too, of which each is read once."""
    seen = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        if (real := os.path.realpath(root)) in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(root) / name for name in files)


def find_units(path: str, unit_bytes: int = UNIT_BYTES) -> list[Unit]:
    """All units of a path in order.

    Raises:
      DataError: for a missing path, an empty or an unreadable file.
    """
    units = []
    for file in find_files(path):
        kind = KINDS.get(file.suffix.lower(), "jsonl" if file.suffix.lower() == ".json" else "text")
        try:
            size = file.stat().st_size
            units += _units_of(file, kind, size, unit_bytes)
        except OSError as error:
            raise DataError(f"{file}: cannot be read ({error.strerror}); give a readable file") from error
    if not units:
        raise DataError(f"path={path!r}: every file is empty; give files that hold text")
    return units


def read_documents(
    unit: Unit, field: str = "text", undecodable: Literal["error", "replace"] = "error"
) -> Iterator[str]:
    """The documents of a unit in order; empty ones and nulls are left out, and so is the mark of a file's encoding.

    Args:
      field: the text's field (jsonl) or column (parquet).
      undecodable: whether bytes that are not UTF-8, and halves of surrogate pairs in JSON, are an error or become
        U+FFFD.
    """
    reader = {"text": _read_text, "jsonl": _read_jsonl, "parquet": _read_parquet, "array_record": _read_records}
    try:
        yield from (text for text in reader[unit.kind](unit, field, undecodable) if text)
    except OSError as error:
        raise DataError(f"{unit.path}: cannot be read ({error.strerror or error}); give a readable file") from error


def _units_of(file: Path, kind: Kind, size: int, unit_bytes: int) -> list[Unit]:
    if not size:
        return []
    if kind == "text":
        with file.open("rb"):
            return [Unit(str(file), kind, 0, size, size)]
    if kind == "jsonl":
        with file.open("rb"):
            return [
                Unit(str(file), kind, start, min(start + unit_bytes, size), min(unit_bytes, size - start))
                for start in range(0, size, unit_bytes)
            ]
    if kind == "parquet":
        metadata = _open_parquet(str(file)).metadata
        sizes = [metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups)]
        return [Unit(str(file), kind, index, index + 1, size) for index, size in enumerate(sizes)]
    count = open_records(file).num_records()
    step = max(1, count * unit_bytes // max(size, 1))
    return [
        Unit(str(file), kind, start, min(start + step, count), size * min(step, count - start) // count)
        for start in range(0, count, step)
    ]


def _decode(raw: bytes, where: str, undecodable: str) -> str:
    try:
        return raw.decode("utf-8-sig", errors="strict" if undecodable == "error" else "replace")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: byte {error.start} is not UTF-8; convert the file, leave it out, or set undecodable=replace"
        ) from error


def _read_text(unit: Unit, field: str, undecodable: str) -> Iterator[str]:
    del field
    yield _decode(Path(unit.path).read_bytes(), unit.path, undecodable)


def _read_jsonl(unit: Unit, field: str, undecodable: str) -> Iterator[str]:
    with open(unit.path, "rb") as file:
        if unit.start:  # a line belongs to the unit that holds its first byte
            file.seek(unit.start - 1)
            file.readline()
        while (at := file.tell()) < unit.stop:
            line = file.readline()
            if not line.strip():
                continue
            where = f"{unit.path} at byte {at}"
            try:
                values = json.loads(_decode(line, where, undecodable))
            except ValueError as error:
                if isinstance(error, DataError):
                    raise
                raise DataError(f"{where}: the line is not JSON ({error}); repair the file") from error
            yield _text_of(values, field, where, undecodable)


def _text_of(values: object, field: str, where: str, undecodable: str) -> str:
    if not isinstance(values, dict) or field not in values:
        names = ", ".join(values) if isinstance(values, dict) else "no fields"
        raise DataError(f"{where}: no field {field!r} (it has {names}); set field to the name of the text")
    text = values[field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise DataError(
            f"{where}: field {field!r} is {type(text).__name__}, not text; set field to the name of the text"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        if undecodable == "error":
            raise DataError(
                f"{where}: character {error.start} of {field!r} is half of a surrogate pair; repair the file, or set "
                "undecodable=replace"
            ) from error
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _open_parquet(path: str):
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path}: not a whole parquet file ({str(error).splitlines()[0]}); write it again") from error


def _read_parquet(unit: Unit, field: str, undecodable: str) -> Iterator[str]:
    file = _open_parquet(unit.path)
    if field not in file.schema_arrow.names:
        names = ", ".join(file.schema_arrow.names)
        raise DataError(f"{unit.path}: no column {field!r} (it has {names}); set field to the name of the text")
    groups = list(range(unit.start, unit.stop))
    for batch in file.iter_batches(batch_size=256, row_groups=groups, columns=[field]):
        for value in batch.column(0):
            yield _text_of({field: value.as_py()}, field, unit.path, undecodable)


def _read_records(unit: Unit, field: str, undecodable: str) -> Iterator[str]:
    del field
    reader = open_records(unit.path)
    for start in range(unit.start, unit.stop, 256):
        for raw in read_records(reader, unit.path, start, min(start + 256, unit.stop)):
            yield _decode(raw, unit.path, undecodable)
