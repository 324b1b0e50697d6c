"""Which meshes does each mixer run on, with the loss and gradients of one device? All of them, as a page of results.

    JAX_PLATFORMS=cpu python -m tests.system.mesh_table --out=experiments/results/meshes.md

Every mesh of 8 simulated devices over the four axes, every mixer in a model of one layer, packed rows of 32 tokens,
float32. ``--workers=N`` tries N pairs at a time. It goes on where it was stopped (``OUT.json.partial`` holds what
is done).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import time
from pathlib import Path

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import numpy as np

from lte_jax.sharding import AXES, MeshConfig
from tests.exhaustive_page import commit
from tests.system.mesh_cases import MIXERS, check_collectives, collectives, config_of, loss_and_gradients

BOUND = 3e-5
"""Of the relative difference from one device: the loss's, and each gradient's by its norm."""

MESHES = [
    MeshConfig(**dict(zip(AXES, sizes, strict=True)))
    for sizes in itertools.product((1, 2, 4, 8), repeat=4)
    if np.prod(sizes) == 8
]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Of one mixer on one mesh; ``refused`` carries the rule that the mesh breaks."""

    refused: str | None = None
    loss: float = 0.0
    gradient: float = 0.0
    gathered: int = 0
    """Collectives that move arrays whole (sums apart); each is one that the table of axes explains."""
    seconds: float = 0.0


@functools.cache
def on_one_device(mixer: str):
    return loss_and_gradients(config_of(MIXERS[mixer]), MeshConfig(), jax.devices()[:1])[0]


def compare(mixer: str, mesh: MeshConfig) -> Outcome:
    """Raises AssertionError for a collective that the table does not explain."""
    began = time.monotonic()
    expected, gradients = on_one_device(mixer)
    try:
        (loss, found), _, text = loss_and_gradients(config_of(MIXERS[mixer]), mesh, None)
    except ValueError as error:
        if "mesh.tensor=" not in str(error):
            raise
        return Outcome(refused=str(error))
    check_collectives(text, mesh, MIXERS[mixer])
    worst = max(
        np.linalg.norm(found[name] - gradient) / max(np.linalg.norm(gradient), 1e-5)
        for name, gradient in gradients.items()
    )
    moved = sum(1 for _ in collectives(text))
    return Outcome(
        None, float(abs(loss - expected) / abs(expected)), float(worst), moved, round(time.monotonic() - began, 1)
    )


def name_of(mesh: MeshConfig) -> str:
    return " ".join(f"{axis}={getattr(mesh, axis)}" for axis in AXES if getattr(mesh, axis) > 1)


def page(done: dict[str, dict], command: str) -> str:
    """The table as Markdown."""
    ran = [outcome for outcome in done.values() if not outcome["refused"]]
    worst = max((max(outcome["loss"], outcome["gradient"]) for outcome in ran), default=0.0)
    lines = [
        "# Meshes",
        "",
        f"`{command}`, commit {commit()}, jax {jax.__version__}, 8",
        "simulated CPU devices, float32.",
        "",
        "Each cell: the largest relative difference of a gradient (by its norm) from one device's, in a model of one",
        "layer of that mixer on packed rows; the loss differs by less. In brackets, collectives of the compiled step",
        "that move arrays whole (sums apart), each explained by the table of axes. Refused: heads that do not fit the",
        "`tensor` axis.",
        "",
        f"{len(done)} of {len(MESHES) * len(MIXERS)} pairs tried: {len(ran)} run, {len(done) - len(ran)} refused; the "
        f"largest difference is {worst:.1e}, the bound {BOUND:.0e}.",
        "",
        "| mesh | " + " | ".join(MIXERS) + " |",
        "|---" * (len(MIXERS) + 1) + "|",
    ]
    for mesh in MESHES:
        cells = []
        for mixer in MIXERS:
            outcome = done.get(f"{mixer} {name_of(mesh)}")
            if outcome is None:
                cells.append("not tried")
            elif outcome["refused"]:
                cells.append("refused")
            else:
                bad = "" if max(outcome["loss"], outcome["gradient"]) <= BOUND else " **beyond**"
                cells.append(f"{outcome['gradient']:.1e} ({outcome['gathered']}){bad}")
        lines.append(f"| {name_of(mesh)} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Where `tensor=4` leaves a device one query head and one KV head, q and k have the same shape and the check",
        "cannot tell a piece of q from one of k; a q gathered whole would be seen.",
    ]
    return "\n".join(lines) + "\n"


def prepare() -> None:
    jax.config.update("jax_disable_most_optimizations", True)  # each program runs once; its collectives stay
    jax.config.update("jax_default_matmul_precision", "highest")
    jax.config.update("jax_threefry_partitionable", True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    out = options.out
    notes = out.with_suffix(".json.partial")
    done = json.loads(notes.read_text()) if notes.exists() else {}
    left = {f"{mixer} {name_of(mesh)}": (mixer, mesh) for mesh, mixer in itertools.product(MESHES, MIXERS)}
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(options.workers, spawn, prepare) as pool:
        running = {pool.submit(compare, *pair): key for key, pair in left.items() if key not in done}
        for future in concurrent.futures.as_completed(running):
            key = running[future]
            try:
                done[key] = dataclasses.asdict(future.result())
            except AssertionError as error:  # a collective that the table does not explain
                print(f"FAILED {key}: {error}", flush=True)
                continue
            notes.write_text(json.dumps(done, indent=1))
            out.write_text(page(done, f"JAX_PLATFORMS=cpu python -m tests.system.mesh_table --out={out}"))
            print(key, done[key], flush=True)
    if len(done) == len(left):
        notes.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
