"""How do the programs say warnings and errors? In one line on the screen, and a warning once."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any


def say_warnings() -> None:
    """From here on, warnings of this process are lines "warning: ..." on stderr, none twice."""
    said: set[str] = set()

    def show(message: Any, *_: Any, **__: Any) -> None:
        if str(message) not in said:  # Python's own filters forget what they showed whenever one is added
            said.add(str(message))
            print(f"warning: {message}", file=sys.stderr)

    warnings.showwarning = show


@contextlib.contextmanager
def said_in_one_line(argv: Sequence[str]) -> Iterator[None]:
    """A program's body: exits with 1 at an error, or at an argument that is no flag, and with 130 at Ctrl-C."""
    say_warnings()
    try:
        if len(argv) > 1:
            raise ValueError(f"{argv[1]!r}: no such argument; settings are given as flags")
        yield
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
