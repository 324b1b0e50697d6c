"""Where does the time of a step go? A trace of some steps for xprof, and the host's clock on every step."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import jax


class Trace:
    """Traces ``count`` steps from step ``first`` on into ``folder``, on process 0; None traces nothing.

    Look at it with ``xprof FOLDER`` (pip install xprof), or read it with ``jax.profiler.ProfileData``.
    """

    def __init__(self, folder: Path, steps: tuple[int, int] | None):
        self.folder = folder
        self._steps = steps if jax.process_index() == 0 else None
        self._running = False

    def check(self, done: int, total: int) -> None:
        """Raises ValueError where a run that continues after step ``done`` never comes to the steps asked for.

        A run that is finished traces nothing and says so: it may be one of several.
        """
        if self._steps is None:
            return
        if done >= total:
            print(f"--profile: this run has finished its {total} steps, so nothing is traced", flush=True)
            self._steps = None
            return
        first, count = self._steps
        if first <= done or first + count - 1 > total:
            raise ValueError(
                f"--profile={first}:{count}: this run takes the steps {done + 1} to {total}; name some of these"
            )

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around the launch of step ``number``."""
        if self._steps is not None and number == self._steps[0]:
            jax.profiler.start_trace(str(self.folder))
            self._running = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield

    def after(self, number: int, state: object) -> Path | None:
        """Ends the trace after its last step, when the device has finished it; the folder if it did."""
        if not self._running or self._steps is None or number < sum(self._steps) - 1:
            return None
        jax.block_until_ready(state)
        self.close()
        return self.folder

    def close(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()


class Stopwatch:
    """Seconds of the host's time by what it did: ``data`` (waiting for a batch), ``launch`` (placing the batch and
    launching the step), ``device`` (waiting for numbers of the step before), the rest is ``other``.

    The device works while the host launches and waits: a run is bound by its device where ``device`` is most of the
    time, and by its input where ``data`` is.
    """

    PARTS = ("data", "launch", "device")

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._started = time.perf_counter()

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[part] = self._seconds.get(part, 0.0) + time.perf_counter() - start

    def read(self, steps: int) -> dict[str, float]:
        """Seconds per step of each part since the last call."""
        now = time.perf_counter()
        parts = {
            **dict.fromkeys(self.PARTS, 0.0),
            **self._seconds,
            "other": max(now - self._started - sum(self._seconds.values()), 0.0),
        }
        self._seconds, self._started = {}, now
        return {name: seconds / steps for name, seconds in parts.items()}
