"""How long does the device take for one call? Two clocks that are read for every contender, in turns.

``calls``: many calls, one synchronisation. For torch the time between two CUDA events, for JAX the host's time from the
first call to the end of the last; short calls show the launch instead of the work.

``busy``: from the profiler's trace of the device, the time in which at least one kernel or copy of the call ran. Gaps
in which the device waits for the host do not count. One trace holds all contenders, JAX and torch alike, so both are
measured by the same instrument. Where no device trace can be had (a CPU), there is only the first clock.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import fcntl
import glob
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
from jax.profiler import ProfileData, TraceAnnotation

_MARK = "bench:"
_PAUSE = 1e-3  # seconds between contenders in a trace; host and device clocks agree to far less


@dataclasses.dataclass(frozen=True)
class Contender:
    """One side of a comparison.

    Attributes:
      name: as the tables call it: an implementation of ours, or a peer.
      call: launches one call and returns its outputs; it need not wait for them.
      values: the outputs as named arrays, for the comparison with float32; None where that is not wanted.
      torch: whether the call is torch's.
      note: what a reader of its time must know.
      other: whether it computes something else, for orientation; then it counts in no ratio.
    """

    name: str
    call: Callable[[], Any]
    values: Callable[[Any], dict[str, Any]] | None = None
    torch: bool = False
    note: str = ""
    other: bool = False


@dataclasses.dataclass(frozen=True)
class Timing:
    """Medians over rounds, in milliseconds per call; ``spread`` is the slowest round over the fastest."""

    calls: float
    busy: float | None
    spread: float
    repeats: int

    @property
    def best(self) -> float:
        """The device's own time where it is known."""
        return self.calls if self.busy is None else self.busy


@contextlib.contextmanager
def alone(lock: str | None) -> Iterator[None]:
    """Holds the file ``lock``, if there is one: processes compile side by side and time in turn."""
    if lock is None:
        yield
        return
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def wait(contender: Contender, outputs: Any) -> None:
    if contender.torch:
        import torch

        torch.cuda.synchronize()
    else:
        jax.block_until_ready(outputs)


def measure(
    contenders: Sequence[Contender], *, rounds: int = 5, span: float = 0.02, most: int = 100, trace: bool = True
) -> dict[str, Timing]:
    """Times contenders that have been called once, alternating between them.

    Args:
      rounds: how many times each has its turn.
      span: seconds that a turn is meant to last; it sets the calls per turn, at least 3 and at most ``most``.
      trace: read the device's trace too; of use on a GPU.
    """
    repeats = {}
    for contender in contenders:
        start = time.perf_counter()
        wait(contender, contender.call())
        repeats[contender.name] = int(min(max(span / max(time.perf_counter() - start, 1e-7), 3), most))
    turns: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for turn in range(rounds):
        for contender in _rotated(contenders, turn):
            turns[contender.name].append(_turn(contender, repeats[contender.name]))
    busy = _traced(contenders, repeats, min(rounds, 3)) if trace else {}
    return {
        name: Timing(statistics.median(times), busy.get(name), max(times) / min(times), repeats[name])
        for name, times in turns.items()
    }


def _rotated(contenders: Sequence[Contender], turn: int) -> Iterable[Contender]:
    first = turn % len(contenders)
    return [*contenders[first:], *contenders[:first]]


def _turn(contender: Contender, repeats: int) -> float:
    """Milliseconds per call of one turn."""
    if contender.torch:
        import torch

        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            contender.call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / repeats
    began = time.perf_counter()
    for _ in range(repeats):
        outputs = contender.call()
    jax.block_until_ready(outputs)
    return (time.perf_counter() - began) * 1e3 / repeats


def _traced(contenders: Sequence[Contender], repeats: dict[str, int], rounds: int) -> dict[str, float]:
    """The busy time per call of each contender; empty where the trace shows no device."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level, options.host_tracer_level = 0, 1
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            for turn in range(rounds):
                for contender in _rotated(contenders, turn):
                    time.sleep(_PAUSE)
                    with TraceAnnotation(f"{_MARK}{contender.name}"):
                        for _ in range(repeats[contender.name]):
                            outputs = contender.call()
                        wait(contender, outputs)
        (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        found = busy_times(ProfileData.from_file(path))
    return {name: statistics.median(times) / repeats[name] for name, times in found.items() if times and min(times) > 0}


def busy_times(profile: Any) -> dict[str, list[float]]:
    """For each annotated stretch of a trace the milliseconds in which the device ran something, by contender."""
    device = [
        (event.start_ns, event.start_ns + event.duration_ns)
        for plane in profile.planes
        if plane.name.startswith("/device:GPU")
        for line in plane.lines
        if line.name.startswith("Stream")
        for event in line.events
    ]
    if not device:
        return {}
    merged = union(device)
    starts = [start for start, _ in merged]
    found: dict[str, list[float]] = {}
    for plane in profile.planes:
        if not plane.name.startswith("/host"):
            continue
        for line in plane.lines:
            for event in line.events:
                if event.name.startswith(_MARK):
                    low, high = event.start_ns, event.start_ns + event.duration_ns
                    inside = merged[bisect.bisect_left(starts, low) : bisect.bisect_right(starts, high)]
                    total = sum(end - start for start, end in inside) * 1e-6
                    found.setdefault(event.name[len(_MARK) :], []).append(total)
    return found


def union(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same stretches of time without overlaps, in order."""
    merged: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged
