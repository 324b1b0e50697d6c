"""Times one operation: every case, ours and peers in turns, beside the copy bandwidth and errors against float32."""

from __future__ import annotations

import dataclasses
import gc
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.cases import Case, Options, assemble, chosen
from experiments.benchmarks.clock import Contender, Timing, alone, measure

OPERATIONS = (
    "gated_delta_rule",
    "window_attention",
    "block_attention",
    "short_convolution",
    "rms_norm",
    "gated_deltanet",
    "router",
)


def cases(operation: str, tiny: bool) -> list[Case]:
    if operation not in OPERATIONS:
        raise ValueError(f"--operation={operation}: there is {', '.join(OPERATIONS)}")
    return importlib.import_module(f"experiments.benchmarks.{operation}").cases(tiny)


def copy_contender(size: int) -> tuple[Contender, int]:
    """A pass over memory that reads and writes ``size`` bytes each, and how many bytes that moves."""
    x = jnp.zeros(size // 4, jnp.int32)
    compiled = jax.jit(lambda x: x + 1).lower(x).compile()
    return Contender("copy", lambda: compiled(x)), 2 * size


def run(
    operation: str,
    patterns: Sequence[str],
    implementations: Sequence[str],
    peers: Sequence[str],
    *,
    tiny: bool,
    options: Options,
    errors: bool,
    rounds: int,
    say: Callable[[str], Any],
    copy_bytes: int,
    lock: str | None = None,
) -> list[dict[str, Any]]:
    """One row for each case; ``say`` hears each line as it is known.

    Args:
      lock: a file that is locked while a case is compared and timed, for processes that compile side by side.
    """
    rows = []
    for case in chosen(cases(operation, tiny), patterns):
        rows.append(_row(case, implementations, peers, options, errors, rounds, say, copy_bytes, lock))
        for line in lines(rows[-1]):
            say(line)
        gc.collect()
    return rows


def _row(
    case: Case,
    implementations: Sequence[str],
    peers: Sequence[str],
    options: Options,
    errors: bool,
    rounds: int,
    say: Callable[[str], Any],
    copy_bytes: int,
    lock: str | None,
) -> dict[str, Any]:
    setup = case.make(options)
    contenders, missing = assemble(setup, implementations, peers, say)
    found: dict[str, dict[str, float]] = {}
    equal: dict[str, bool] = {}
    copy, moved = copy_contender(copy_bytes)
    with alone(lock):
        if errors and setup.reference is not None:
            truth = setup.reference()
            found = {c.name: _errors(c, truth) for c in contenders if c.values is not None}
            equal = {c.name: _same_bits(c) for c in contenders if c.values is not None and c.name in implementations}
        times = measure([*contenders, copy], rounds=rounds, trace=jax.default_backend() == "gpu")
    return {
        "case": case.name,
        "shape": case.shape,
        "dtype": case.dtype,
        "bytes": setup.bytes,
        "copy_gbps": moved / times["copy"].best * 1e-6,
        "contenders": [
            _entry(c, times[c.name], found.get(c.name, {}), c.name not in implementations)
            | {"same_bits": equal.get(c.name)}
            for c in contenders
        ],
        "missing": missing,
    }


def _entry(contender: Contender, timing: Timing, errors: dict[str, float], peer: bool) -> dict[str, Any]:
    return {
        "name": contender.name,
        "peer": peer,
        "comparable": peer and not contender.other,
        "note": contender.note,
        "best": timing.best,
        "errors": errors,
        **dataclasses.asdict(timing),
    }


def _errors(contender: Contender, truth: dict[str, Any]) -> dict[str, float]:
    """||x - truth|| / ||truth|| of every named output."""
    assert contender.values is not None
    values = contender.values(contender.call())
    found = {}
    for name, expected in truth.items():
        if name in values:
            difference = np.asarray(values[name], np.float32) - expected
            found[name] = float(np.linalg.norm(difference.ravel()) / max(np.linalg.norm(expected.ravel()), 1e-30))
    return found


def _same_bits(contender: Contender) -> bool:
    """Whether two calls on the same inputs give the same bits."""
    assert contender.values is not None
    first, second = (contender.values(contender.call()) for _ in range(2))
    return all(np.array_equal(first[name], second[name], equal_nan=True) for name in first)


def lines(row: dict[str, Any]) -> list[str]:
    """A case as text for the screen."""
    floor = row["bytes"] / row["copy_gbps"] * 1e-6
    text = [f"{row['case']}: {row['shape']}, {row['dtype']}; floor {floor:.4f} ms at {row['copy_gbps']:.0f} GB/s"]
    for found in row["contenders"]:
        busy = "       -" if found["busy"] is None else f"{found['busy']:8.4f}"
        errors = " ".join(f"{name} {value:.1e}" for name, value in found["errors"].items())
        text.append(
            f"  {found['name']:24s} device {busy} calls {found['calls']:8.4f} ms x{found['repeats']} "
            f"spread {found['spread']:.2f} {errors} {_bits(found)}{found['note']}"
        )
    return text + [f"  {name:24s} not timed: {reason}" for name, reason in row["missing"].items()]


def _bits(found: dict[str, Any]) -> str:
    return {None: "", True: "same bits twice ", False: "OTHER BITS THE SECOND TIME "}[found["same_bits"]]
