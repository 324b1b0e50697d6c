"""How does text become token ids and back: by bytes, by a ``tokenizers`` JSON file, or by a Hugging Face folder?

A tokenizer travels with a checkpoint: ``save(folder)`` copies what ``load_tokenizer(folder)`` reads.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from lte_jax.data.packing import DataError
from lte_jax.whole_files import copy_file, write_json

BYTES = "bytes"
"""The name of the tokenizer that needs no file."""

_BYTE_CLASS = "ByteTokenizer"


class Stream(Protocol):
    """Decodes token by token: the pieces together equal ``decode`` of all ids, and none ends inside a character."""

    def push(self, token: int) -> str:
        """The text that became certain with this token (often "")."""

    def finish(self) -> str:
        """What is left; an unfinished character becomes U+FFFD."""


class Tokenizer(Protocol):
    """What the project needs of a tokenizer. ``bos_id``, ``eos_id`` and ``pad_id`` are None where there is none."""

    @property
    def name(self) -> str:
        """What ``load_tokenizer`` takes to make it again."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def bos_id(self) -> int | None: ...

    @property
    def eos_id(self) -> int | None: ...

    @property
    def pad_id(self) -> int | None: ...

    def encode(self, text: str, *, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        """Token ids; special tokens only where they are asked for."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text without special tokens."""

    def stream(self) -> Stream: ...

    def fingerprint(self) -> str:
        """The same for two tokenizers that give the same ids, wherever their files lie."""

    def save(self, folder: str | Path) -> None:
        """Writes into ``folder`` what ``load_tokenizer(folder)`` needs."""


def load_tokenizer(name: str | Path) -> Tokenizer:
    """The tokenizer called ``"bytes"``, of a tokenizer JSON file, or of a folder (Hugging Face's, or one of ``save``).

    A folder's beginning and end tokens are those of its ``tokenizer_config.json``, ``special_tokens_map.json`` or
    ``config.json``, in this order. A JSON file alone names none: its special tokens ``<s>``, ``<|begin_of_text|>``,
    ``[BOS]`` and ``</s>``, ``<|end_of_text|>``, ``<|endoftext|>``, ``[EOS]`` are taken where they exist.

    Raises:
      DataError: if there is no such file, or it is not a tokenizer.
    """
    if str(name) == BYTES:
        return ByteTokenizer()
    path = Path(name).expanduser()
    if not path.exists():
        raise DataError(
            f"tokenizer={str(name)!r}: no such file or folder; give 'bytes', a tokenizer.json or its folder"
        )
    if path.is_file():
        return FileTokenizer(path)
    if _read_json(path / "tokenizer_config.json").get("tokenizer_class") == _BYTE_CLASS:
        return ByteTokenizer()
    if not (path / "tokenizer.json").is_file():
        raise DataError(
            f"tokenizer={str(name)!r}: the folder holds no tokenizer.json; "
            "save the tokenizer in the fast format (tokenizer.json) or use 'bytes'"
        )
    return FileTokenizer(path / "tokenizer.json")


def check_fits(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises DataError if the tokenizer can give ids that a model of ``vocab_size`` entries does not have."""
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"tokenizer {tokenizer.name!r} has {tokenizer.vocab_size} ids: they must be below the model's vocab_size "
            f"{vocab_size}; use the model's own tokenizer or raise vocab_size"
        )


def known_text(tokenizer: Tokenizer) -> Callable[[Iterable[int]], str]:
    """``decode`` for what a model says: its vocabulary may be padded, and ids beyond the tokenizer's are no text."""
    return lambda ids: tokenizer.decode([token for token in ids if token < tokenizer.vocab_size])


class ByteTokenizer:
    """Ids 0-255 are the bytes of UTF-8; 256 begins a document, 257 ends it, 258 pads."""

    name = BYTES
    vocab_size = 259
    bos_id: int | None = 256
    eos_id: int | None = 257
    pad_id: int | None = 258

    def encode(self, text: str, *, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        return [256] * add_bos + list(text.encode("utf-8")) + [257] * add_eos

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(_checked(ids, self.vocab_size, special=256)).decode("utf-8", errors="replace")

    def stream(self) -> Stream:
        return _ByteStream(self.vocab_size)

    def fingerprint(self) -> str:
        return BYTES

    def save(self, folder: str | Path) -> None:
        write_json(Path(folder) / "tokenizer_config.json", {"tokenizer_class": _BYTE_CLASS})


class FileTokenizer:
    """A ``tokenizers`` JSON file, with the special tokens that the files beside it name."""

    def __init__(self, path: str | Path):
        import tokenizers

        self._path = Path(path)
        self.name = str(self._path)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(self._path))
        except Exception as error:  # the library raises bare Exception
            raise DataError(
                f"tokenizer={self.name!r}: not a tokenizer file ({_first_line(error)}); give a tokenizer.json"
            ) from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        self.vocab_size = max(ids, default=-1) + 1
        special = {token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special}
        self.bos_id = self._find("bos", special, ("<s>", "<|begin_of_text|>", "[BOS]"))
        self.eos_id = self._find("eos", special, ("</s>", "<|end_of_text|>", "<|endoftext|>", "[EOS]"))
        self.pad_id = self._find("pad", special, ("<pad>", "[PAD]"))

    def _find(self, role: str, special: set[str], usual: tuple[str, ...]) -> int | None:
        folder = self._path.parent
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            values = _read_json(folder / file)
            if f"{role}_token" in values:
                token = values[f"{role}_token"]
                content = token.get("content") if isinstance(token, dict) else token
                if content is None:
                    return None
                found = self._tokenizer.token_to_id(content)
                if found is None:
                    raise DataError(
                        f"{file}: {role}_token={content!r} is not in {self.name}; take both files from one tokenizer"
                    )
                return found
        number = _read_json(folder / "config.json").get(f"{role}_token_id")
        if isinstance(number, int):
            return number if number < self.vocab_size else None
        if (folder / "tokenizer_config.json").exists():
            return None
        return next((self._tokenizer.token_to_id(token) for token in usual if token in special), None)

    def encode(self, text: str, *, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        ids = list(self._tokenizer.encode(text, add_special_tokens=False).ids)
        if add_bos:
            ids.insert(0, self._special("bos", self.bos_id))
        if add_eos:
            ids.append(self._special("eos", self.eos_id))
        return ids

    def _special(self, role: str, token: int | None) -> int:
        if token is None:
            raise DataError(f"add_{role}=true: tokenizer {self.name!r} has no {role} token; set add_{role}=false")
        return token

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode(_checked(ids, self.vocab_size), skip_special_tokens=True)

    def stream(self) -> Stream:
        return PieceStream(self.decode)

    def fingerprint(self) -> str:
        known = json.dumps(
            [json.loads(self._tokenizer.to_str()), self.bos_id, self.eos_id, self.pad_id], sort_keys=True
        )
        return hashlib.sha256(known.encode()).hexdigest()

    def save(self, folder: str | Path) -> None:
        folder = Path(folder)
        if folder.resolve() == self._path.parent.resolve() and self._path.name == "tokenizer.json":
            return
        copy_file(self._path, folder / "tokenizer.json")
        settings = _read_json(self._path.parent / "tokenizer_config.json")
        for role, token in (("bos", self.bos_id), ("eos", self.eos_id), ("pad", self.pad_id)):
            settings.setdefault(f"{role}_token", None if token is None else self._tokenizer.id_to_token(token))
        write_json(folder / "tokenizer_config.json", settings)
        extra = self._path.parent / "special_tokens_map.json"
        if extra.is_file():
            copy_file(extra, folder / extra.name)


class _ByteStream:
    def __init__(self, vocab_size: int):
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._vocab_size = vocab_size

    def push(self, token: int) -> str:
        return self._decoder.decode(bytes(_checked([token], self._vocab_size, special=256)))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class PieceStream:
    """A ``Stream`` over any ``decode``: decodes a short tail again with each token, never the whole text.

    Text that ends in U+FFFD (an unfinished character) is held back, for at most ``PATIENCE`` tokens: no character is
    that long, so that what follows is no text. The tail starts at the last piece that was given out, because decoders
    treat the first piece of a text differently (leading spaces); what is new is what the longer tail decodes to beyond
    the shorter one.
    """

    PATIENCE = 8

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        self._decode = decode
        self._tail: list[int] = []
        self._given = 0  # tokens at the start of the tail whose text is out

    def push(self, token: int) -> str:
        self._tail.append(int(token))
        text = self._decode(self._tail)
        if text.endswith("\ufffd") and len(self._tail) - self._given < self.PATIENCE:
            return ""
        return self._release(text)

    def finish(self) -> str:
        return self._release(self._decode(self._tail)) if self._tail else ""

    def _release(self, text: str) -> str:
        before = self._decode(self._tail[: self._given])
        if len(text) <= len(before):  # a special token, or a piece that shows only with the next one
            if len(self._tail) - self._given >= self.PATIENCE:
                del self._tail[self._given :]
            return ""
        self._tail = self._tail[self._given :]
        self._given = len(self._tail)
        return text[len(before) :]


def _checked(ids: Iterable[int], vocab_size: int, special: int | None = None) -> list[int]:
    ids = [int(token) for token in ids]
    wrong = next((token for token in ids if not 0 <= token < vocab_size), None)
    if wrong is not None:
        raise DataError(f"token id {wrong}: ids must lie in [0, {vocab_size}); use the model's own tokenizer")
    return ids if special is None else [token for token in ids if token < special]


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({_first_line(error)}); repair or remove the file") from error
    return values if isinstance(values, dict) else {}


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
