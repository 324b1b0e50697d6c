"""Which row hides sentences with numbers in a long text and asks for one of them at the end?

Single needles (one key, one value), several keys (only one is asked for) and several values of one key, in noise
sentences or in any text, through any tokenizer.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from lte_jax.data.packing import DataError, Row
from lte_jax.data.sources import find_units, read_documents
from lte_jax.data.tasks import Task, empty_row, require
from lte_jax.data.tokenizer import BYTES, Tokenizer, load_tokenizer

NOISE = "noise"
_NOISE_SENTENCES = (
    "The road runs along the river.",
    "Rain fell on the old roof all night.",
    "A cat sleeps by the open window.",
    "The market closes early on Sundays.",
    "Snow covers the hills in winter.",
    "Bread is baked before the sun rises.",
)


@dataclasses.dataclass(frozen=True)
class TextNeedles(Task):
    """``keys`` * ``values`` sentences "The secret number of KEY is VALUE." in a haystack, and a question about one key.

    The row ends in "The secret number of KEY is V1, V2, ..." with the values in their order in the text; the tokens of
    the values are labelled, everything else is ignored. ``distance`` at a labelled position counts back to the same
    token in the needle. Keys are made-up words, values are numbers of ``digits`` digits.

    Attributes:
      haystack: ``"noise"``, or the path of documents whose tokens are the haystack.
      depth: where the asked needles stand, as a fraction of the haystack from its start; negative: anywhere.
      min_distance: at least this many haystack tokens lie between any needle and the question.
    """

    length: int = 512
    tokenizer: str = BYTES
    keys: int = 1
    values: int = 1
    digits: int = 4
    haystack: str = NOISE
    depth: float = -1.0
    min_distance: int = 0

    @property
    def vocab_size(self) -> int:
        return load_tokenizer(self.tokenizer).vocab_size

    def check(self) -> None:
        for name in ("keys", "values", "digits"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)}", "it must be at least 1", "raise it")
        require(self.depth <= 1, f"depth={self.depth}", "a depth is at most 1 (negative: anywhere)", "lower it")
        require(
            self.keys * self.values <= 10 ** (self.digits - 1),
            f"digits={self.digits}",
            f"{self.keys * self.values} different numbers need more digits",
            "raise digits",
        )
        self.row(np.random.default_rng(0))  # raises if a row has no room

    def row(self, rng: np.random.Generator) -> Row:
        tokenizer = _tokenizer(self.tokenizer)
        encode = tokenizer.encode
        names = _names(rng, self.keys)
        first = 10 ** (self.digits - 1)
        drawn = rng.choice(9 * first, self.keys * self.values, replace=False) + first
        numbers = [encode(f" {number}") for number in drawn]
        stop, comma = encode(". "), encode(",")
        needles = [
            encode(f" The secret number of {names[number // self.values]} is") + digits + stop
            for number, digits in enumerate(numbers)
        ]
        asked = int(rng.integers(self.keys)) * self.values  # the first needle of the asked key
        question = encode(f" The secret number of {names[asked // self.values]} is")
        answers = numbers[asked : asked + self.values]
        answer_size = sum(map(len, answers)) + len(comma) * (self.values - 1)
        room = self.length + 1 - sum(map(len, needles)) - len(question) - answer_size
        limit = room - self.min_distance
        require(
            limit >= 1,
            f"length={self.length}",
            f"needles, question, answer and min_distance need at least {self.length + 1 - limit} tokens",
            "raise length, or lower keys, values, digits or min_distance",
        )
        cuts = rng.integers(limit + 1, size=len(needles))
        if self.depth >= 0:
            cuts[asked : asked + self.values] = round(self.depth * limit)

        tokens: list[int] = []
        hay, done = self._hay(rng, room, tokenizer), 0
        value_at: dict[int, int] = {}
        for number in np.argsort(cuts, kind="stable"):
            tokens += hay[done : cuts[number]]
            done = int(cuts[number])
            tokens += needles[number]
            value_at[int(number)] = len(tokens) - len(stop) - len(numbers[number])
        tokens += hay[done:] + question

        row = empty_row(self.length)
        order = sorted(range(asked, asked + self.values), key=value_at.__getitem__)
        for place, number in enumerate(order):
            tokens += comma if place else []
            at = len(tokens) - 1 + np.arange(len(numbers[number]))  # each label stands one position before its token
            row["labels"][at] = numbers[number]
            row["distance"][at] = at - value_at[number] - np.arange(len(numbers[number]))
            tokens += numbers[number]
        row["input_ids"][:] = tokens[: self.length]
        return row

    def _hay(self, rng: np.random.Generator, size: int, tokenizer: Tokenizer) -> list[int]:
        if self.haystack == NOISE:
            sentences = _noise(self.tokenizer)
            hay: list[int] = []
            while len(hay) < size:
                hay += sentences[int(rng.integers(len(sentences)))]
            return hay[:size]
        text = _text_tokens(self.haystack, self.tokenizer)
        require(
            len(text) >= size,
            f"length={self.length}",
            f"{self.haystack} has {len(text)} tokens, a row needs {size} of hay, and none stands there twice",
            "shorten length (--lengths), or give more text",
        )
        start = int(rng.integers(len(text)))
        return [int(token) for token in text[(start + np.arange(size)) % len(text)]]


def _names(rng: np.random.Generator, count: int) -> list[str]:
    """Different made-up words of four syllables."""
    names: list[str] = []
    while len(names) < count:
        syllables = zip(rng.integers(16, size=4), rng.integers(5, size=4), strict=True)
        name = "".join("bdfghklmnprstvwz"[consonant] + "aeiou"[vowel] for consonant, vowel in syllables)
        if name not in names:
            names.append(name)
    return names


@functools.lru_cache(maxsize=4)
def _tokenizer(name: str) -> Tokenizer:
    return load_tokenizer(name)


@functools.lru_cache(maxsize=4)
def _noise(tokenizer: str) -> list[list[int]]:
    return [_tokenizer(tokenizer).encode(f" {sentence}") for sentence in _NOISE_SENTENCES]


@functools.lru_cache(maxsize=2)
def _text_tokens(path: str, tokenizer: str) -> np.ndarray:
    encode = _tokenizer(tokenizer).encode
    parts = [encode(document) for unit in find_units(path) for document in read_documents(unit)]
    if not any(parts):
        raise DataError(f"haystack={path!r}: the files hold no text; give others")
    return np.concatenate([np.array(part, np.int32) for part in parts])
