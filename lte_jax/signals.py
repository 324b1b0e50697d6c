"""Which signals ask a run to save and stop?"""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any


class Signals:
    """Notes SIGTERM and SIGUSR1 while a run is active; a second one has its usual effect."""

    NUMBERS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.received = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        for number in self.NUMBERS:
            # None stands for a handler that was not set from Python, which cannot be put back.
            self._before[number] = signal.signal(number, self._note) or signal.SIG_DFL
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        signal.signal(number, self._before[number])

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
