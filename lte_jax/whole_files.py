"""How is a file written so that it is there whole or not at all, whatever ends the process or the machine?"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A place to write a file's contents to, in its folder, which is made; they replace the file when the block ends.

    A block that raises, a full disk or a kill leaves the old file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(path)
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())  # else a rename may outlive its contents
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def check_target(path: Path) -> None:
    """Raises ValueError where a file could not be written: known before hours of work, not after. Makes nothing.

    What is there and no file, such as /dev/null, would be replaced by one.
    """
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if (path.exists() and not path.is_file()) or not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{path} cannot be written; name another file with --output")


def partial_of(path: Path) -> Path:
    """Where a file lies until it is whole; a kill may leave it there."""
    return path.with_name(f".{path.name}.partial")


def copy_file(source: str | Path, target: str | Path) -> None:
    """Copies a file's contents."""
    with whole_file(target) as partial:
        shutil.copyfile(source, partial)


def write_text(path: str | Path, text: str) -> None:
    """Writes a whole file of UTF-8."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | Path, values: Any) -> None:
    """Writes a whole file of JSON; what JSON does not know, as its text."""
    write_text(path, json.dumps(values, indent=2, default=str) + "\n")
