"""What is a case of a benchmark? A named shape, what runs it, what it must move, and the truth it is held against."""

from __future__ import annotations

import dataclasses
import fnmatch
import time
from collections.abc import Callable, Sequence
from typing import Any

from experiments.benchmarks.clock import Contender, wait
from experiments.benchmarks.peers import PeerMissing
from pallas_kernels.dispatch import UnsupportedCase


@dataclasses.dataclass(frozen=True)
class Setup:
    """The parts of a case that hold arrays, made when its turn comes.

    Attributes:
      ours: a contender of the named implementation.
      peers: contenders by name: that of ``--peers``, with ": ..." behind it where a library has several calls.
      reference: named arrays in float32 by the slow path; None where errors are not compared.
      bytes: what one call must read and write.
    """

    ours: Callable[[str], Contender]
    peers: dict[str, Callable[[], Contender]]
    reference: Callable[[], dict[str, Any]] | None
    bytes: int


@dataclasses.dataclass(frozen=True)
class Case:
    """A line of a table: ``name`` is unique in its operation, ``shape`` says what it is to a reader."""

    name: str
    shape: str
    dtype: str
    make: Callable[["Options"], Setup]


@dataclasses.dataclass(frozen=True)
class Options:
    """Settings of a run that cases may need."""

    authors_path: str | None = None
    seed: int = 0


def chosen(cases: Sequence[Case], patterns: Sequence[str]) -> list[Case]:
    """The cases whose names match any of the patterns (``*`` stands for anything), in their own order."""
    for pattern in patterns:
        if not fnmatch.filter([case.name for case in cases], pattern):
            names = ", ".join(case.name for case in cases)
            raise ValueError(f"--shapes={pattern}: no case has this name; there are {names}")
    return [case for case in cases if not patterns or any(fnmatch.fnmatch(case.name, p) for p in patterns)]


def assemble(
    setup: Setup, implementations: Sequence[str], peers: Sequence[str], say: Callable[[str], Any]
) -> tuple[list[Contender], dict[str, str]]:
    """The contenders that can run, compiled and called once, and the reasons of those that cannot."""
    builders: list[tuple[str, Callable[[], Contender]]] = [
        (name, lambda name=name: setup.ours(name))  # type: ignore[misc]
        for name in implementations
    ]
    builders += [(name, make) for name, make in setup.peers.items() if name.partition(":")[0] in peers]
    ready: list[Contender] = []
    missing: dict[str, str] = {}
    for name, make in builders:
        began = time.perf_counter()
        try:
            contender = make()
            wait(contender, contender.call())
            ready.append(contender)
            say(f"# {name} compiled and run in {time.perf_counter() - began:.1f} s")
        except (UnsupportedCase, PeerMissing) as reason:
            missing[name] = str(reason)
        except Exception as error:  # a peer's own failure is a result, and no reason to lose the others
            if name in implementations:
                raise
            missing[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    return ready, missing
