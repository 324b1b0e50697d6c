"""How does RULER, whose samples are made when a task is loaded, count tokens with the project's tokenizers?"""

from __future__ import annotations

import contextlib
import inspect
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lte_jax.data.tokenizer import BYTES, Tokenizer, load_tokenizer


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Within it, an attribute of a module or class is another."""
    before = inspect.getattr_static(owner, name)  # of a class method, the method and not its bound call
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


class _Counted:
    """A tokenizer as RULER calls it: ``tokenizer(text).input_ids``."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.input_ids: list[int] = []

    def __call__(self, text: str) -> _Counted:
        found = _Counted(self._tokenizer)
        found.input_ids = self._tokenizer.encode(text)
        return found


@contextlib.contextmanager
def own_tokenizers() -> Iterator[None]:
    """Within it, RULER finds the project's tokenizers by name, and others as ever.

    Replaced is what its modules call in the end: the harness loads them anew from their files, one from another.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError:
        yield  # no RULER then: a task that needs it will say so
        return
    original = AutoTokenizer.from_pretrained

    def find(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == BYTES or Path(name).exists():
            return _Counted(load_tokenizer(name))
        return original(name, *args, **kwargs)

    with replaced(AutoTokenizer, "from_pretrained", find):
        yield


def check_variable_tracking(tokenizer: Tokenizer, lengths: Sequence[int]) -> None:
    """RULER draws samples of ``ruler_vt`` anew until one is short enough: for ever, where none is.

    Each holds an example of at most 500 tokens with 5 sentences of noise, and itself at least 10, and 30 are answered.

    Raises:
      ValueError: the example, or a sample of the shortest length, does not fit.
    """
    try:
        from lm_eval.tasks.ruler import vt_utils
    except ImportError:
        return  # loading the task says what to install

    def tokens(noise: int, example: bool) -> int:
        with contextlib.redirect_stdout(io.StringIO()):
            text, answer = vt_utils.generate_input_output(noise, 1, 4, is_icl=example)
        return len(tokenizer.encode(f"{text} {answer}"))

    example, shortest = tokens(5, True), min(lengths)
    for size, most, what in (
        (example + 30, 500, "its example"),
        (example + tokens(10, False) + 30, shortest, f"a sample of length {shortest}"),
    ):
        if size > most:
            raise ValueError(
                f"ruler_vt: {what} has room for {most} tokens, and takes {size} of tokenizer {tokenizer.name!r}; "
                "leave the task out, or take longer --lengths or a tokenizer of longer tokens"
            )


def check_asked(task: str, docs: Iterable[Any]) -> None:
    """RULER makes samples that ask for nothing where a length has no room, and fails when it scores them, at the end.

    Raises:
      ValueError: one of its samples has no answer.
    """
    for doc in docs:
        if isinstance(doc, dict) and doc.get("outputs") == []:
            raise ValueError(
                f"{task}: its samples of length {doc.get('max_length')} have no room for their questions; leave the "
                "task out, or take longer --lengths"
            )
