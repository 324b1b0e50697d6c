"""What has each row of a batch said so far, where does its text end, and what of it may be shown already?"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from lte_jax.data.tokenizer import PieceStream


@dataclasses.dataclass(frozen=True)
class Generation:
    """One sequence's continuation.

    Attributes:
      tokens: the new tokens; the end-of-sequence token is not among them.
      log_probs: of each, under the model itself.
      finish_reason: "length", "eos" or "stop" (a stop string; ``text`` ends before it).
      text: the tokens as text, where a ``decode`` was given.
    """

    tokens: list[int]
    log_probs: list[float]
    finish_reason: Literal["length", "eos", "stop"]
    text: str | None = None


def _stop_at(text: str, stop: Sequence[str]) -> int | None:
    """Where the first stop string begins; None where there is none."""
    return min((text.index(string) for string in stop if string in text), default=None)


class StopFilter:
    """Lets text pass up to the first stop string, and holds back an end that may be the start of one."""

    def __init__(self, stop: Sequence[str]):
        self._stop = tuple(stop)
        self._held = ""
        self.ended = False

    def push(self, text: str) -> str:
        """What of the text so far may be shown and has not been."""
        if self.ended:
            return ""
        text = self._held + text
        end = _stop_at(text, self._stop)
        if end is not None:
            self.ended, self._held = True, ""
            return text[:end]
        starts = [size for string in self._stop for size in range(1, len(string)) if text.endswith(string[:size])]
        shown = len(text) - max(starts, default=0)
        self._held = text[shown:]
        return text[:shown]

    def finish(self) -> str:
        """What was held back, when no more text comes."""
        text, self._held = self._held, ""
        return text


class _StopWatch:
    """Looks for stop strings in a row's text, at a cost per token that does not grow with the row."""

    def __init__(self, stop: Sequence[str], decode: Callable[[Sequence[int]], str]):
        self._stream, self._filter = PieceStream(decode), StopFilter(stop)
        self._shown: list[str] = []

    def push(self, token: int) -> str | None:
        """The row's text, if it ends with this token."""
        self._shown.append(self._filter.push(self._stream.push(token)))
        return "".join(self._shown) if self._filter.ended else None


class Rows:
    """The host's side: what each row has said, and whether it has ended."""

    def __init__(
        self,
        count: int,
        eos_id: int | None,
        stop: tuple[str, ...],
        decode: Callable[[Sequence[int]], str] | None,
        on_tokens: Callable[[int, list[int]], Any] | None,
    ):
        self._tokens: list[list[int]] = [[] for _ in range(count)]
        self._log_probs: list[list[float]] = [[] for _ in range(count)]
        self._reasons: list[Literal["eos", "stop"] | None] = [None] * count
        self._texts: list[str | None] = [None] * count
        self._eos_id, self._stop, self._decode, self._on_tokens = eos_id, stop, decode, on_tokens
        self._watches = [_StopWatch(stop, decode) for _ in range(count)] if decode is not None and stop else []

    def add(self, tokens: np.ndarray, log_probs: np.ndarray) -> None:
        """Takes new tokens and their log-probabilities, both [B, steps]; of rows that have ended, nothing."""
        for row in range(len(self._tokens)):
            if self._reasons[row] is not None:
                continue
            new = self._take(row, tokens[row].tolist(), log_probs[row].tolist())
            if new and self._on_tokens is not None:
                self._on_tokens(row, new)

    def _take(self, row: int, tokens: list[int], log_probs: list[float]) -> list[int]:
        new = []
        for token, log_prob in zip(tokens, log_probs, strict=True):
            if token == self._eos_id:
                self._reasons[row] = "eos"
                break
            new.append(token)
            self._tokens[row].append(token)
            self._log_probs[row].append(log_prob)
            if self._watches and (text := self._watches[row].push(token)) is not None:
                self._reasons[row], self._texts[row] = "stop", text
                break
        return new

    def done(self) -> bool:
        return all(reason is not None for reason in self._reasons)

    def results(self) -> list[Generation]:
        results = []
        for tokens, log_probs, reason, text in zip(
            self._tokens, self._log_probs, self._reasons, self._texts, strict=True
        ):
            if text is None and self._decode is not None:
                text = self._decode(tokens)
                if (end := _stop_at(text, self._stop)) is not None:  # before an unfinished character at the end
                    reason, text = "stop", text[:end]
            results.append(Generation(tokens, log_probs, reason or "length", text))
        return results
