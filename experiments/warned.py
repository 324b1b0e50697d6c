"""How do the programs say a warning? In one line on the screen, and each once."""

from __future__ import annotations

import sys
import warnings
from typing import Any


def say_warnings() -> None:
    """From here on, warnings of this process are lines "warning: ..." on stderr, none twice."""
    said: set[str] = set()

    def show(message: Any, *_: Any, **__: Any) -> None:
        if str(message) not in said:  # Python's own filters forget what they showed whenever one is added
            said.add(str(message))
            print(f"warning: {message}", file=sys.stderr)

    warnings.showwarning = show
