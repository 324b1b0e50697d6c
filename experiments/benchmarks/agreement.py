"""Does training in bfloat16 with kernels follow training in float32 without any? Loss curves on the same text.

    python -m experiments.benchmarks.agreement --steps=200 > agreement.json
    python -m experiments.benchmarks.agreement --runs=bfloat16,bfloat16_xla,float32_kernels,float32_tf32,float32

A byte-level laLTE on the sources of the Python that runs it: the same weights, rows and dropout keys for all. Prints
the relative difference of each loss to that of "float32", both averaged over ``SPAN`` steps, every 20 steps; one line
of JSON at the end. "float32_tf32" rounds the factors of its products to 11 bits and is otherwise "float32": so far
apart do two runs come by rounding alone.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags

from lte_jax import LTE, GatedDeltaNet, ModelConfig

FLAGS = flags.FLAGS
SPAN = 10
RATE, WARMUP = 3e-4, 50  # the paper's rate; at 1e-3 after 20 steps the loss rises again at the fourth
# Type of the computation, implementation of the operations (None for the fastest), precision of products in float32.
RUNS = {
    "float32": ("float32", "xla", "highest"),
    "bfloat16": ("bfloat16", None, "default"),
    "bfloat16_xla": ("bfloat16", "xla", "default"),
    "float32_kernels": ("float32", None, "highest"),
    "float32_tf32": ("float32", "xla", "tensorfloat32"),
}
MODEL = ModelConfig(
    vocab_size=259,
    width=512,
    num_layers=4,
    pattern=(GatedDeltaNet(num_heads=4, head_dim=128), LTE(num_heads=8, window=192, budget=128, sinks=4)),
    max_length=1024,
    init_std=0.02,
)


def define_flags() -> None:
    flags.DEFINE_integer("steps", 200, "Steps of each run.")
    flags.DEFINE_integer("rows", 8, "Rows of 1024 bytes in a step.")
    flags.DEFINE_float("rate", RATE, "The highest learning rate.")
    flags.DEFINE_list("runs", ["bfloat16"], f"Of {', '.join(RUNS)}; each is compared with float32.")


def experiment(rows: int, steps: int, rate: float) -> Any:
    """The config ``text`` with the larger model."""
    from experiments.configs import text
    from lte_jax.data import Packing
    from lte_jax.optim import OptimizerConfig

    config = text.get_config()
    data: Any = config.data
    return dataclasses.replace(
        config,
        model=MODEL,
        data=dataclasses.replace(data, packing=Packing(length=1024)),
        batch_size=rows,
        steps=steps,
        optimizer=OptimizerConfig(learning_rate=rate, warmup_steps=WARMUP),
    )


def batches(config: Any) -> Iterator[dict[str, Any]]:
    """The training batches, the same at every call."""
    from lte_jax.data import Batches
    from lte_jax.step import model_arrays

    found = Batches(config.data.rows("train", batch_size=config.batch_size), config.batch_size)
    try:
        while True:
            yield model_arrays(next(found)) | {"interrupted": np.zeros(config.batch_size, np.int32)}
    finally:
        found.close()


def losses(name: str, config: Any, steps: int) -> np.ndarray:
    """The loss of every step of one run, with a line of progress each 50."""
    from lte_jax.experiment import step_config
    from lte_jax.sharding import MeshConfig, make_mesh
    from lte_jax.step import Builder, ComputeConfig

    dtype, implementation, precision = RUNS[name]
    compute = ComputeConfig(
        dtype=dtype,  # type: ignore[arg-type]
        implementation=implementation,
        remat="dots",
        layers="scan" if implementation == "xla" else None,  # XLA's own form compiles the longest
    )
    settings = dataclasses.replace(step_config(config, 1024), compute=compute)
    builder = Builder(settings, make_mesh(MeshConfig(), jax.local_devices()[:1]))
    began, found = time.perf_counter(), []
    with jax.default_matmul_precision(precision):
        state, step = builder.init_state(), builder.train_step()
        for number, batch in zip(range(1, steps + 1), batches(config), strict=False):
            state, numbers = step(state, batch)
            found.append(numbers["loss"])
            if number == 1 or number % 50 == 0:
                loss = float(found[-1])
                print(f"{name}: loss {loss:.4f} at step {number}, {time.perf_counter() - began:.1f} s", flush=True)
    return np.asarray(jax.device_get(found), np.float64)


def compare(steps: int, rows: int, runs: Sequence[str] = ("bfloat16",), rate: float = RATE) -> dict[str, Any]:
    """The curves, and by run the largest relative difference to "float32" of their averages over ``SPAN`` steps.

    The runs go side by side, a thread each: they compile together, and the device takes their steps in turn.
    """
    config = experiment(rows, steps, rate)
    names = ("float32", *(run for run in runs if run != "float32"))
    with concurrent.futures.ThreadPoolExecutor(len(names)) as pool:
        curves = dict(zip(names, pool.map(lambda name: losses(name, config, steps), names), strict=True))
    smooth = {name: np.convolve(curve, np.ones(SPAN) / SPAN, "valid") for name, curve in curves.items()}
    apart = {name: np.abs(curve / smooth["float32"] - 1) for name, curve in smooth.items()}
    for name, distance in apart.items():
        print(f"{name}: apart by at most {100 * distance.max():.3f} %", flush=True)
    for step in range(SPAN, steps + 1, 20):
        columns = [f"{name} {smooth[name][step - SPAN]:.4f}, {100 * apart[name][step - SPAN]:.3f} %" for name in curves]
        print(f"steps {step - SPAN + 1} to {step}: {'; '.join(columns)}", flush=True)
    return {
        "steps": steps,
        "rows": rows,
        "span": SPAN,
        "rate": rate,
        "largest": {name: float(distance.max()) for name, distance in apart.items()},
        "last": {name: float(distance[-1]) for name, distance in apart.items()},
        "largest_of_single_steps": {
            name: float(np.abs(curve / curves["float32"] - 1).max()) for name, curve in curves.items()
        },
        "device": jax.local_devices()[0].device_kind,
        "curves": {name: np.round(curve, 5).tolist() for name, curve in curves.items()},
    }


def main(argv: list[str]) -> None:
    try:
        if len(argv) > 1:
            raise ValueError(f"{argv[1]!r}: no such argument")
        if FLAGS.steps < SPAN or FLAGS.rows < 1:
            raise ValueError(f"--steps={FLAGS.steps} --rows={FLAGS.rows}: at least {SPAN} steps of 1 row")
        if unknown := set(FLAGS.runs) - set(RUNS):
            raise ValueError(f"--runs={','.join(sorted(unknown))}: not of {', '.join(RUNS)}")
        print(json.dumps(compare(FLAGS.steps, FLAGS.rows, FLAGS.runs, FLAGS.rate)))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    define_flags()
    app.run(main)
