"""How many tokens a second does a training step reach on one GPU, and on several of this machine, by mesh axis?

    python -m experiments.benchmarks.scaling --config=lalte_0p4b --rows=8 --devices=2,4 --axes=data,fsdp

Every device has ``rows`` rows of random tokens, in one part and with the optimiser. The sides are compiled together and
timed in turns, so that each round sees the same machine.

    efficiency = tokens/s on n devices / (n * tokens/s on one)
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import statistics
import time
from typing import Any

import jax
import numpy as np
from absl import app, flags

from experiments.benchmarks import clock
from lte_jax import configs, memory, sharding
from lte_jax.experiment import ExperimentConfig, step_config
from lte_jax.sharding import MeshConfig
from lte_jax.step import Builder

FLAGS = flags.FLAGS


class Side:
    """One mesh: its compiled step and its state."""

    def __init__(self, name: str, config: ExperimentConfig, mesh: MeshConfig, devices: list[jax.Device], rows: int):
        self.name, self.count = name, len(devices)
        self.mesh = sharding.make_mesh(mesh, devices)
        length = config.model.max_length
        self.tokens = rows * self.count * length
        config = dataclasses.replace(config, batch_size=rows * self.count, accumulation=1)
        self.builder = Builder(step_config(config, length), self.mesh)
        ids = np.random.default_rng(0).integers(0, config.model.vocab_size, (config.batch_size, length), np.int32)
        self.arrays = {"input_ids": ids, "labels": np.roll(ids, -1, 1), "interrupted": np.zeros(len(ids), np.int32)}
        self.seconds: list[float] = []

    def compile(self) -> None:
        began = time.perf_counter()
        axes = ("batch", "length")
        places = {n: sharding.named(axes[: x.ndim], x.shape, self.mesh) for n, x in self.arrays.items()}
        shapes = {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=places[n]) for n, x in self.arrays.items()}
        abstract = self.builder.abstract_state()
        compiled: Any = self.builder.train_step().lower(abstract, shapes).compile()  # type: ignore[attr-defined]
        self.places, self.step = places, compiled
        kept = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        self.first = jax.jit(self.builder.init_state, out_shardings=kept).lower().compile()
        seconds = time.perf_counter() - began
        print(f"{self.name}: compiled in {seconds:.1f} s; {memory.report(abstract, compiled)}", flush=True)

    def start(self) -> None:
        """Fills the devices' memory, after ``compile``, and warms up."""
        self.batch, self.state = jax.device_put(self.arrays, self.places), self.first()
        self.run(2)

    def run(self, steps: int) -> float:
        """Seconds of a step, over ``steps`` of them, after ``start``."""
        state, numbers = self.state, {}
        began = time.perf_counter()
        for _ in range(steps):
            state, numbers = self.step(state, self.batch)
        loss = float(jax.device_get(numbers["loss"]))
        seconds = (time.perf_counter() - began) / steps
        assert np.isfinite(loss), f"{self.name}: loss {loss}"
        self.state = state
        return seconds


def main(argv: list[str]) -> None:
    config = configs.override(configs.load_named("experiments.configs", FLAGS.config), FLAGS.set)
    devices = jax.devices()
    sides = [Side("one device", config, MeshConfig(), devices[:1], FLAGS.rows)]
    for count in map(int, FLAGS.devices or [len(devices)]):
        if not 1 <= count <= len(devices):
            raise ValueError(f"--devices={count}: this machine shows {len(devices)}")
        for axis in FLAGS.axes:
            mesh = MeshConfig(**{"data": 1, axis: count})
            sides.append(Side(f"{axis}={count}", config, mesh, devices[:count], FLAGS.rows))
    with concurrent.futures.ThreadPoolExecutor(len(sides)) as pool:
        list(pool.map(Side.compile, sides))
    with clock.alone(FLAGS.lock):
        for side in sides:
            side.start()
        for turn in range(FLAGS.rounds):
            for side in sides:
                side.seconds.append(side.run(FLAGS.steps))
                print(f"round {turn + 1}, {side.name}: {side.seconds[-1] * 1e3:.1f} ms a step", flush=True)
    print(
        f"\n{devices[0].device_kind}, {config.name}, {FLAGS.rows} rows of {config.model.max_length} tokens a device\n"
    )
    print("| mesh | step | tokens/s | efficiency |\n|---|---|---|---|")
    alone = statistics.median(sides[0].seconds)
    for side in sides:
        seconds = statistics.median(side.seconds)
        rate = side.tokens / seconds
        print(f"| {side.name} | {seconds * 1e3:.1f} ms | {rate:,.0f} | {100 * alone / seconds:.1f} % |", flush=True)


if __name__ == "__main__":
    flags.DEFINE_string("config", "lalte_0p4b", "A file in experiments/configs, without .py.")
    flags.DEFINE_multi_string("set", [], "A setting: a.b=value. May be repeated.")
    flags.DEFINE_integer("rows", 8, "Rows of each device.", 1)
    flags.DEFINE_list("devices", None, "How many devices, each a side; default all.")
    flags.DEFINE_list("axes", ["data", "fsdp"], "Axes of the mesh over them, each a side.")
    flags.DEFINE_string("lock", None, "A file to hold while timing: several processes then compile side by side.")
    flags.DEFINE_integer("steps", 4, "Steps of a round.", 1)
    flags.DEFINE_integer("rounds", 3, "Rounds, of which the median counts.", 1)
    app.run(main)
