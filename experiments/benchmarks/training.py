"""How fast is a whole training step, with the optimiser, and what is its time made of?

    python -m experiments.benchmarks.training --model=lalte --size=0.4B --rows=8 --remat=dots,kernels
    python -m experiments.benchmarks.training --model=lalte --size=1.4B --rows=4 --remat=dots --breakdown=FOLDER

Random tokens in rows of ``--length``, weights as training starts (LTE's routers keep nearly all tokens), bfloat16
computation with float32 weights (with ``--weights=bfloat16`` the weights, their gradients and AdamW's moments have 2
bytes, as in the authors' training; no recipe of this project does that). One line of JSON for each setting: seconds of
lowering (which compiles the Triton kernels) and of compilation, of the first step, the median step, tokens per second,
MFU, the peak of the memory, and the first losses, by which settings can be compared. ``--breakdown`` prints the kernels
of a step and their milliseconds, and writes the device's timeline.
"""

from __future__ import annotations

import collections
import dataclasses
import glob
import gzip
import json
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments.benchmarks import clock

FLAGS = flags.FLAGS
TRACED = 2  # steps


def define_flags() -> None:
    flags.DEFINE_string("model", "lalte", "One of the paper's models.")
    flags.DEFINE_string("size", "0.4B", "0.4B, 1.4B, or tiny (to see that it runs).")
    flags.DEFINE_integer("rows", 8, "Rows of a step.")
    flags.DEFINE_integer("length", 4096, "Tokens of a row.")
    flags.DEFINE_integer("depth", None, "Layers, where not the model's own.")
    flags.DEFINE_list("remat", ["dots"], "Policies of lte_jax.remat; each is timed.")
    flags.DEFINE_list("layers", ["auto"], "scan, unroll, or auto for the rule of the model; each is timed.")
    flags.DEFINE_string("implementation", None, "triton, xla, ...; default the fastest.")
    flags.DEFINE_enum("weights", "float32", ["float32", "bfloat16"], "Type of the weights and of AdamW's moments.")
    flags.DEFINE_integer("steps", 10, "Steps whose median counts.")
    flags.DEFINE_string("breakdown", None, "A folder for the kernels of a step.")
    flags.DEFINE_string("lock", None, "A file to hold while timing: several processes then compile side by side.")
    flags.DEFINE_string("cache", None, "A folder of compiled programs; default none, so that compilation is timed.")


def builder(remat: str, layers: str) -> Any:
    """The step of the model on this device."""
    from experiments.benchmarks import models
    from lte_jax.optim import OptimizerConfig
    from lte_jax.retention import PenaltyConfig
    from lte_jax.sharding import MeshConfig, make_mesh
    from lte_jax.step import Builder, ComputeConfig, StepConfig

    compute = ComputeConfig(
        dtype="bfloat16",
        implementation=FLAGS.implementation,
        remat=remat,
        layers=None if layers == "auto" else layers,  # type: ignore[arg-type]
    )
    model = models.model_config(FLAGS.model, FLAGS.size)
    config = StepConfig(
        model if FLAGS.depth is None else dataclasses.replace(model, num_layers=FLAGS.depth),
        OptimizerConfig(),
        PenaltyConfig(),
        compute,
        steps=30720,
        accumulation=1,
        seed=0,
        length=FLAGS.length,
    )
    mesh = make_mesh(MeshConfig(), jax.local_devices()[:1])
    if FLAGS.weights == "float32":
        return Builder(config, mesh)

    class Narrow(Builder):
        """Weights as the computation has them; the moments are of their type."""

        def _new_model(self, param_dtype: Any = jnp.bfloat16) -> Any:
            return super()._new_model(param_dtype)

    return Narrow(config, mesh)


def batches(vocabulary: int) -> list[dict[str, jax.Array]]:
    """A few batches of random tokens, on the device."""
    random = np.random.default_rng(0)
    found = []
    for _ in range(3):
        tokens = random.integers(0, vocabulary, (FLAGS.rows, FLAGS.length + 1), np.int32)
        arrays = {
            "input_ids": tokens[:, :-1],
            "labels": tokens[:, 1:],
            "interrupted": np.zeros(FLAGS.rows, np.int32),
        }
        found.append(jax.device_put({name: np.ascontiguousarray(array) for name, array in arrays.items()}))
    return found


def measure(remat: str, layers: str) -> dict[str, Any]:
    """The line of one setting."""
    from lte_jax import metrics

    made = builder(remat, layers)
    config = made.config
    data = batches(config.model.vocab_size)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), data[0])
    began = time.perf_counter()
    lowered = made.train_step().lower(made.abstract_state(), shapes)
    low = time.perf_counter()
    step = lowered.compile()
    compiled = time.perf_counter()
    with clock.alone(FLAGS.lock):
        state, losses, first, times = _run(step, made.init_state(), data)
        if FLAGS.breakdown:
            _break_down(step, state, data[0], f"{FLAGS.model}_{FLAGS.size}_{remat}_{layers}")
    median = statistics.median(times)
    device = jax.local_devices()[0]
    parameters = sum(leaf.size for leaf in state.params.values())
    rate = FLAGS.rows * FLAGS.length / median
    peak = metrics.peak_flops(device)
    used = metrics.flops_per_token(config.model, parameters, FLAGS.length) * rate
    analysis = step.memory_analysis()
    line = {
        "model": FLAGS.model,
        "size": FLAGS.size,
        "rows": FLAGS.rows,
        "remat": remat,
        "layers": layers,
        "weights": FLAGS.weights,
        "lower": round(low - began, 1),
        "compile": round(compiled - low, 1),
        "first_step": round(first, 2),
        "step_ms": round(median * 1e3, 1),
        "tokens_per_second": round(rate),
        "mfu": None if peak is None else round(used / peak, 4),
        "temporary_gib": round(analysis.temp_size_in_bytes / 2**30, 1),
        "peak_gib": round((device.memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30, 1),
        "losses": losses,
        "device": device.device_kind,
    }
    print(json.dumps(line), flush=True)
    return line


def _run(step: Any, state: Any, data: list[dict[str, jax.Array]]) -> tuple[Any, list[float], float, list[float]]:
    """The state after all steps, the first losses, seconds of the first step, and of those that count."""
    jax.block_until_ready(state)
    losses, times = [], []
    for batch in data:
        start = time.perf_counter()
        state, late = step(state, batch)
        losses.append(round(float(late["loss"]), 5))
        times.append(time.perf_counter() - start)
    first, times = times[0], []
    for number in range(FLAGS.steps + 1):
        start = time.perf_counter()
        state, numbers = step(state, data[number % len(data)])
        jax.block_until_ready(late)  # as the trainer reads: one step late
        late = numbers
        times.append(time.perf_counter() - start)
    jax.block_until_ready(late)
    return state, losses, first, times[1:]


def _break_down(step: Any, state: Any, batch: Any, name: str) -> None:
    folder = Path(FLAGS.breakdown)
    folder.mkdir(parents=True, exist_ok=True)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level, options.host_tracer_level = 0, 1
    with tempfile.TemporaryDirectory() as traced:
        with jax.profiler.trace(traced, profiler_options=options):
            for _ in range(TRACED):
                state, numbers = step(state, batch)
            jax.block_until_ready(numbers)
        (path,) = glob.glob(f"{traced}/**/*.xplane.pb", recursive=True)
        events = device_events(jax.profiler.ProfileData.from_file(path))
    with gzip.open(folder / f"{name}.tsv.gz", "wt") as file:
        file.writelines("\t".join(map(str, event)) + "\n" for event in events)
    kinds: dict[str, list[float]] = collections.defaultdict(list)
    for _, duration, _, kernel, _ in events:
        kinds[re.sub(r"[_.]?\d+$", "", kernel)].append(duration * 1e-3 / TRACED)
    spans = clock.union((start, start + duration) for start, duration, *_ in events)
    whole, busy = spans[-1][1] - spans[0][0], sum(end - start for start, end in spans)
    total = sum(map(sum, kinds.values()))
    print(
        f"  {whole * 1e-3 / TRACED:.1f} ms a step, busy {busy * 1e-3 / TRACED:.1f}, kernels and copies {total:.1f} in "
        f"{len(events) / TRACED:.0f} launches"
    )
    for kernel, times in sorted(kinds.items(), key=lambda kind: -sum(kind[1]))[:30]:
        print(f"  {sum(times):7.2f} ms x{len(times) / TRACED:<5.0f} {kernel[:70]}", flush=True)


def device_events(profile: Any) -> list[tuple[float, float, str, str, str]]:
    """(start and duration in microseconds, stream, kernel, instruction) of all that the device ran, by start."""
    found = []
    for plane in profile.planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        for line in plane.lines:
            if line.name.startswith("Stream"):
                for event in line.events:
                    instruction = next((str(value) for name, value in event.stats if name == "hlo_op"), "")
                    times = (event.start_ns * 1e-3, event.duration_ns * 1e-3)
                    found.append((*times, line.name, event.name[:120], instruction))
    return sorted(found)


def main(argv: list[str]) -> None:
    try:
        if len(argv) > 1:
            raise ValueError(f"{argv[1]!r}: no such argument")
        if FLAGS.breakdown and jax.default_backend() != "gpu":
            raise ValueError(f"--breakdown={FLAGS.breakdown}: only a GPU's trace shows kernels")
        if FLAGS.cache:
            jax.config.update("jax_compilation_cache_dir", FLAGS.cache)
        else:
            jax.config.update("jax_enable_compilation_cache", False)
        for remat in FLAGS.remat:
            for layers in FLAGS.layers:
                measure(remat, layers)
                jax.clear_caches()
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    define_flags()
    app.run(main)
