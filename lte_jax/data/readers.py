"""How are single records of many ArrayRecord files read, with a bounded number of files open?

A corpus may have more shards than a process may open files. And not every file that cannot be read is damaged: only
what its bytes prove is a ``DataError`` that ``bad_rows=skip`` may pass over, the rest is an ``UnreadableError``.
"""

from __future__ import annotations

import collections
import errno
import re
import resource
import threading
from pathlib import Path
from typing import Any

from lte_jax.data.packing import DataError, UnreadableError

TAIL_BYTES = 2**16
"""So many bytes of a file's end are read to see whether the system can read it: the format begins reading there."""

SYSTEM_CALL = re.compile(r"\b(?:open|pread|read|fstat|lseek|mmap)\(\) failed: ([^;]*)")
"""How a reader says that the system, and not the file's contents, is the cause."""


def open_records(path: Path | str) -> Any:
    """A random-access reader of an ArrayRecord file (sequential reads are cached by the operating system).

    Raises:
      DataError: it is not a whole ArrayRecord file. UnreadableError: the system cannot read it.
    """
    for _ in range(2):  # again, where what was short (descriptors) is there when it is looked at
        reader = _try_open(path)
        if reader.ok():  # the reader of a damaged file says 0 records and raises nothing
            return reader
        _check_readable(Path(path))
    raise DataError(f"{path}: not a whole ArrayRecord file; copy or write it again")


def _try_open(path: Path | str) -> Any:
    from array_record.python import array_record_module

    try:
        return array_record_module.ArrayRecordReader(str(path), "readahead_buffer_size:0,max_parallelism:0")
    except (ValueError, RuntimeError, OSError) as error:
        raise DataError(f"{path}: not an ArrayRecord file ({str(error)[:100]}); write it again") from error


def _check_readable(path: Path) -> None:
    try:
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - TAIL_BYTES, 0))
            file.read(TAIL_BYTES)
    except OSError as error:
        raise unreadable(path, error.strerror or str(error), error.errno) from error


def unreadable(path: Path | str, cause: str, number: int | None = None) -> UnreadableError:
    """The error of a file that the system cannot read."""
    if number in (errno.EMFILE, errno.ENFILE):
        fix = "raise the limit of open files (ulimit -n)"
    else:
        fix = "nothing says that it is damaged: mend the disk, network or rights, and start again"
    return UnreadableError(f"{path}: cannot be read ({cause}); {fix}")


def read_records(reader: Any, path: Path | str, start: int, stop: int) -> list[bytes]:
    """Records [start, stop) of an open file.

    Raises:
      DataError: they are damaged. UnreadableError: the system cannot read them.
    """
    try:
        records = reader.read(start, stop)
    except (ValueError, RuntimeError, IndexError) as error:
        failed = SYSTEM_CALL.search(str(error))
        if failed:
            raise unreadable(path, failed[1]) from error
        raise DataError(f"{path}: records from {start} on are damaged; copy or write the file again") from error
    if len(records) != stop - start:
        raise DataError(f"{path}: records from {start} on are missing; copy or write the file again")
    return records


class RecordFiles:
    """Files that are opened when first read; the one that has rested longest is closed for a new one.

    Threads take turns on a file and not on the whole.

    Args:
      limit: how many are open at a time; default half of what this process may open.
    """

    def __init__(self, limit: int | None = None):
        self._limit = limit
        self._files: collections.OrderedDict[tuple[Path, int], _File] = collections.OrderedDict()
        self._lock = threading.Lock()

    def read(self, path: Path, index: int, version: int = 0) -> bytes:
        """One record; errors as of ``read_records``. ``version`` tells files apart that have had the same name."""
        while True:
            file = self._take(path, version)
            with file.lock:
                if file.reader is not None:  # else it was closed for another since it was taken
                    return read_records(file.reader, path, index, index + 1)[0]

    def _take(self, path: Path, version: int) -> _File:
        rested = None
        with self._lock:
            key = path, version
            if key not in self._files:
                self._files[key] = _File(open_records(path))
                if len(self._files) > (self._limit or max(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2, 1)):
                    rested = self._files.popitem(last=False)[1]
            self._files.move_to_end(key)
            found = self._files[key]
        if rested is not None:
            with rested.lock:
                rested.reader.close()
                rested.reader = None
        return found


class _File:
    def __init__(self, reader: Any):
        self.reader = reader
        self.lock = threading.Lock()


FILES = RecordFiles()
"""Of this process: all its data sets together stay under the limit."""
