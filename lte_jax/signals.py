"""Which signals ask a run to save and stop?"""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any


class Signals:
    """Notes the signals that ask a run to stop while it is active; a second one of a kind has its usual effect.

    Args:
      ctrl_c: also SIGINT, in a process of its own: that of several is told by its launcher, with SIGTERM.
    """

    def __init__(self, *, ctrl_c: bool) -> None:
        self.received = False
        self._numbers = [signal.SIGTERM, signal.SIGUSR1, *([signal.SIGINT] if ctrl_c else [])]
        self._saving = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        for number in self._numbers:
            # None stands for a handler that was not set from Python, which cannot be put back.
            self._before[number] = signal.signal(number, self._note) or signal.SIG_DFL
        return self

    def hold(self) -> None:
        """From here on, while what was asked for is done, signals are noted and not obeyed, but for a second Ctrl-C."""
        self._saving = True
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        if not self._saving or number == signal.SIGINT:
            signal.signal(number, self._before[number])

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
