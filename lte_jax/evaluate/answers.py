"""Which requests of an evaluation have been answered already, so that a killed one goes on where it stopped?

A file of JSON lines: the first says whose answers these are, each further one is an answer. Lines are only added, so
that a kill loses at most the batch in work; half a line at the end is dropped.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lte_jax.whole_files import write_text


class AnswersError(ValueError):
    """A file of answers that cannot be used; the message says why and what to do."""


class Answers:
    """The answers in a file, and a place for new ones.

    Args:
      path: of the file; made when the first answer comes.
      owner: what the answers depend on (model, tokenizer, settings), as JSON values.

    Raises:
      AnswersError: the file is no such file, is damaged, or holds the answers of another owner (named).
    """

    def __init__(self, path: str | os.PathLike[str], owner: Mapping[str, Any]):
        self._path = Path(path)
        self._owner = json.loads(json.dumps(dict(owner), sort_keys=True, default=str))
        self._known: dict[str, Any] = {}
        if self._path.exists():
            self._read()

    def __len__(self) -> int:
        return len(self._known)

    def find(self, kind: str, request: Any) -> Any | None:
        """The answer to a request, or None."""
        return self._known.get(_key(kind, request))

    def add(self, kind: str, request: Any, answer: Any) -> None:
        """Writes one answer; it is on the disk when the call returns."""
        key = _key(kind, request)
        self._known[key] = answer
        new = not self._path.exists()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            if new:
                file.write(json.dumps({"owner": self._owner}) + "\n")
            file.write(json.dumps({"key": key, "answer": answer}) + "\n")

    def _read(self) -> None:
        try:
            text = self._path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise AnswersError(f"{self._path}: no file of answers can be read there ({error}); name another") from None
        whole, _, half = text.rpartition("\n")
        lines = whole.split("\n") if whole else []
        records = [self._parse(number, line) for number, line in enumerate(lines, 1)]
        if not records:
            raise AnswersError(f"{self._path}: it holds no answers, not even whose they would be; remove it")
        if "owner" not in records[0] or not all("key" in record and "answer" in record for record in records[1:]):
            raise AnswersError(f"{self._path}: not a file of answers; name another, or remove it")
        old = records[0]["owner"]
        differing = sorted(name for name in {*old, *self._owner} if old.get(name) != self._owner.get(name))
        if differing:
            raise AnswersError(
                f"{self._path} holds the answers of another evaluation; differing: {', '.join(differing)}. Name "
                "another file, or remove it"
            )
        self._known = {record["key"]: record["answer"] for record in records[1:]}
        if half:  # a kill in the middle of a write
            write_text(self._path, whole + "\n")

    def _parse(self, number: int, line: str) -> dict[str, Any]:
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise AnswersError(f"{self._path}, line {number}: damaged; remove the file to answer everything anew")
        return record


def _key(kind: str, request: Any) -> str:
    return hashlib.sha256(json.dumps([kind, request], sort_keys=True, default=str).encode()).hexdigest()[:32]
