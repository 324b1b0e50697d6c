"""What will a run of the paper's configs take on 1, 8 and 64 GPUs: days, GPU hours, memory, and traffic by mesh axis?

    python -m experiments.launch.cost > experiments/results/launching.md

A model, not a measurement, but for the single-GPU speeds in ``MEASURED``. With P weights, B rows of T tokens a step in
``parts`` parts, n devices on an axis, R layers of width D, bytes that one GPU sends per step:

    data       parts * 2 (n-1)/n * 4 P                 gradients summed in float32 (a tied table: twice)
    fsdp       parts * 3 (n-1)/n * 4 P                 weights gathered forward and backward, gradients scattered
    tensor     4 * 2 (n-1)/n * 2 D * R * tokens        two sums per layer, forward and backward, bfloat16
    sequence   (n-1) (4 K N tokens R_a + 8 H N (N + V) rows R_d)   keys and values in bfloat16 to the GPUs after it in
               attention layers, maps and states in float32 in delta-rule layers, forward and backward

    step seconds = tokens of one GPU / its measured speed + bytes / bandwidth       (nothing hidden: an upper bound)
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import numpy as np

from experiments.configs import _paper
from lte_jax import metrics
from lte_jax.mixers import mixer_name
from lte_jax.runs import single_device_builder

NODE_GPUS = 8
NVLINK, NETWORK = 450e9, 50e9
"""Bytes per second that one H200 sends inside a node, and its share of a 400 Gb/s network card: data sheets."""

PEAK = metrics.PEAK_FLOPS["H200"]
ROWS, STEPS, LENGTH = 256, 30720, _paper.LENGTH


@dataclasses.dataclass(frozen=True)
class Measured:
    """One H200, ``rows`` rows of 4096 tokens a step, with the optimiser: results/training_speed.md."""

    tokens_per_second: float
    rows: int
    peak_gib: float


MEASURED = {
    ("lalte", "0.4B"): Measured(156_241, 8, 38.3),
    ("lalte", "1.4B"): Measured(57_245, 4, 50.2),
    ("gdn", "1.4B"): Measured(57_378, 4, 60.5),
    ("gdn_swa", "1.4B"): Measured(60_733, 4, 46.9),
}


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one config on ``gpus`` GPUs, all on the data axis."""

    gpus: int
    rows: int
    """Rows that a GPU computes at a time."""
    parts: int
    compute: float
    """Seconds of a step."""
    traffic: float
    """Seconds of a step spent sending, were nothing hidden."""

    @property
    def days(self) -> float:
        return STEPS * (self.compute + self.traffic) / 86400

    @property
    def tokens_per_second(self) -> float:
        return ROWS * LENGTH / (self.compute + self.traffic)


def parameters(name: str, size: _paper.Size) -> int:
    """P of a config."""
    shapes = single_device_builder(_paper.model(name, size)).param_shapes
    return sum(int(np.prod(leaf.shape)) for leaf in shapes.values())


def speed(name: str, size: _paper.Size, weights: int) -> tuple[float, bool]:
    """(tokens per second of one GPU, whether measured); else at laLTE's share of the peak at that size."""
    found = MEASURED.get((name, size))
    if found is not None:
        return found.tokens_per_second, True
    like = _paper.model("lalte", size)
    flops = [
        metrics.flops_per_token(model, count, LENGTH)
        for model, count in ((like, parameters("lalte", size)), (_paper.model(name, size), weights))
    ]
    return MEASURED["lalte", size].tokens_per_second * flops[0] / flops[1], False


def axis_bytes(axis: str, n: int, model: Any, weights: int, tokens: int, parts: int = 1) -> float:
    """Bytes that one GPU sends per step over an axis of ``n`` devices; ``tokens`` are its own of the step."""
    share, repeats = (n - 1) / n, model.num_layers // len(model.pattern)
    if axis == "data":
        table = model.vocab_size * model.width if model.tie_embeddings else 0
        return parts * 2 * share * 4 * (weights + table)
    if axis == "fsdp":
        return parts * 3 * share * 4 * weights
    if axis == "tensor":
        return 4 * 2 * share * 2 * model.width * model.num_layers * tokens
    assert axis == "sequence"
    return (n - 1) * sum(_sequence_bytes(mixer, model.width, tokens) for mixer in model.pattern) * repeats


def _sequence_bytes(mixer: Any, width: int, tokens: int) -> float:
    """What a GPU sends to one other, forward and backward; to those after it alone, half of them on average."""
    if mixer_name(mixer) == "gated_deltanet":
        state = mixer.value_heads * mixer.head_dim * (mixer.head_dim + mixer.value_dim)
        return 2 * 4 * state * ROWS  # every GPU holds a piece of each row
    size = getattr(mixer, "head_dim", None) or width // mixer.num_heads
    return 2 * 0.5 * 2 * 2 * (mixer.num_kv_heads or mixer.num_heads) * size * tokens


def cost(weights: int, model: Any, rate: float, gpus: int, rows: int) -> Cost:
    """On ``gpus`` GPUs of the data axis, ``rows`` rows at a time on each."""
    rows = min(rows, ROWS // gpus)
    parts = ROWS // (gpus * rows)
    band = NVLINK if gpus <= NODE_GPUS else NETWORK
    tokens = ROWS * LENGTH // gpus
    traffic = axis_bytes("data", gpus, model, weights, tokens, parts) / band
    return Cost(gpus, rows, parts, tokens / rate, traffic)


def state_gib(weights: int, shards: int = 1) -> float:
    """Weights, two moments and gradients in float32, of one GPU."""
    return 16 * weights / shards / 2**30


def page() -> str:
    """The page of results."""
    lines = [*HEAD, *_speed_table(), *TRAFFIC_HEAD, *_traffic_table(), *TAIL, *_memory()]
    return "\n".join(lines) + "\n"


def _speed_table() -> list[str]:
    lines = [
        "| model | weights | one GPU, tokens/s | state | 1 GPU: parts, days | 8 GPUs: parts, days | "
        "64 GPUs: parts, days | GPU hours on 8 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for size in _paper.SIZES:
        for name in _paper.NAMES:
            weights, model = parameters(name, size), _paper.model(name, size)
            rate, measured = speed(name, size, weights)
            rows = MEASURED["lalte", size].rows
            costs = [cost(weights, model, rate, gpus, rows) for gpus in (1, 8, 64)]
            cells = [f"{found.parts}, {found.days:.1f}" for found in costs]
            origin = "" if measured else " (estimated)"
            lines.append(
                f"| {name} {size} | {weights / 1e6:,.0f} M | {rate:,.0f}{origin} | {state_gib(weights):.1f} GiB | "
                + " | ".join(cells)
                + f" | {costs[1].days * 24 * 8:,.0f} |"
            )
    return lines


def _traffic_table() -> list[str]:
    lines = ["| axis | GB sent | in a node | between nodes |", "|---|---|---|---|"]
    model, weights = _paper.model("lalte", "1.4B"), parameters("lalte", "1.4B")
    tokens = ROWS * LENGTH // 8
    for axis in ("data", "fsdp", "tensor", "sequence"):
        own = tokens * 8 if axis == "tensor" else tokens  # every GPU of the tensor axis sees all tokens
        sent = axis_bytes(axis, 8, model, weights, own, parts=8)
        lines.append(f"| {axis}=8 | {sent / 1e9:.1f} | {sent / NVLINK:.2f} s | {sent / NETWORK:.2f} s |")
    compute = tokens / MEASURED["lalte", "1.4B"].tokens_per_second
    return [*lines, "", f"The same step computes for {compute:.1f} s."]


def _memory() -> list[str]:
    peaks = [f"{x.peak_gib} GiB ({name} {size}, {x.rows} rows)" for (name, size), x in MEASURED.items()]
    return [
        "Peak memory of one H200 as measured: " + ", ".join(peaks) + ".",
        "Every start prints what its own step will take, before it is launched.",
    ]


HEAD = [
    "# Launching the paper's configs on 1, 8 and 64 GPUs",
    "",
    "Written by `python -m experiments.launch.cost`. Each config is 30,720 steps of 256 rows of 4096 tokens, 32.2",
    "billion tokens. `parts` is `accumulation`: 256 rows = GPUs x rows at a time x parts; 8 rows at a time at 0.4B and",
    "4 at 1.4B.",
    "",
    "```bash",
    "# one GPU",
    "python -m experiments.train --config=lalte_1p4b --workdir=runs/lalte --set data.path=shards --set accumulation=64",
    "# 8 GPUs of one machine",
    "python -m experiments.launch.local -- --config=lalte_1p4b --workdir=runs/lalte --set data.path=shards \\",
    "    --set accumulation=8",
    "# 64 GPUs under SLURM; the folders are shared",
    "sbatch --nodes=8 experiments/launch/train.sbatch --config=lalte_1p4b --workdir=/shared/runs/lalte \\",
    "    --set data.path=/shared/shards --set accumulation=1",
    "```",
    "",
    "The other configs differ by `--config` and `parts` alone. A run may go on with another number of GPUs: start it",
    "with the other command and its `accumulation`. Weights, moments and gradients of the largest fit one GPU (state),",
    "so `mesh.data` alone is enough; `--set mesh.fsdp=8` divides the state by 8 where memory is short, for half as",
    "much traffic again.",
    "",
]
TRAFFIC_HEAD = ["", "Traffic of one GPU in one step of laLTE 1.4B on 8 GPUs, by the axis that they lie on:", ""]
TAIL = [
    "",
    "## What was not measured",
    "",
    "- No speed on more than two GPUs; two of one host reach 93 % of twice one by `data`, and 92 % by `fsdp`, with 8",
    "  rows and the optimiser in each step ([two GPUs](two_gpus.md)), which is more than the traffic alone would take.",
    "  The traffic is the formula in `experiments/launch/cost.py` at the data sheets' 450 GB/s (NVLink) and 50 GB/s",
    "  (400 Gb/s network); nothing is counted as hidden behind computation, and no waiting of one GPU for another is",
    "  added.",
    "- The speeds marked as estimated: they assume the share of the peak that laLTE of the same size reaches. NSA's",
    "  and full attention's may differ much.",
    "- Tokens per second were measured with 8 (0.4B) and 4 (1.4B) rows a step, the optimiser in each; with `parts`",
    "  above 1 it runs once in `parts`, so that the days are an upper bound. On 64 GPUs at 0.4B a GPU has 4 rows.",
    "- Evaluation, saving and reading of data are left out: their share is in a run's `metrics.jsonl` (`seconds`).",
    "",
]

if __name__ == "__main__":
    sys.stdout.write(page())
