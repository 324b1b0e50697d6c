"""Which errors prove that a checkpoint is damaged, and which may be the machine's or the code's?

A step is put aside for what its files say, never because this process could not read them: memory that ran out, a
device or a network that failed, or a model whose tree is another one would otherwise cost a run all its steps.
"""

from __future__ import annotations

import json
import re

PROOFS = ("DATA_LOSS", "OUT_OF_RANGE", "NOT_FOUND")
"""Codes of tensorstore: a checksum of its own is wrong, a file is shorter than its index says, a file is missing."""

UNDECODABLE = re.compile(r"Error decoding|ZSTD_decompress\w*\(\) failed: (?!Allocation)")


def proof(error: BaseException) -> str | None:
    """The first line of what in an error, or in what caused it, proves damage; None without a proof."""
    found: BaseException | None = error
    while found is not None:
        if _proves(found):
            return first_line(found)
        found = found.__cause__
    return None


def _proves(error: BaseException) -> bool:
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError | FileNotFoundError):
        return True
    code = re.match(r"([A-Z][A-Z_]+): ", str(error))
    if code is not None and code[1] in PROOFS:
        return True
    # What cannot be decoded comes without a code, or with one that other errors have too.
    named = None if code is None else code[1]
    return named in (None, "INVALID_ARGUMENT", "FAILED_PRECONDITION") and bool(UNDECODABLE.search(str(error)))


def first_line(error: BaseException) -> str:
    """The kind of what caused an error and the beginning of its text, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
