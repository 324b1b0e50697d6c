"""From which length on is native sparse attention faster than full attention? A curve from the benchmark's rows.

python -m experiments.benchmarks.crossover reads experiments/results/block_attention.json and writes the picture beside
it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

OURS, FULL = "triton", "cudnn: causal"
RESULTS = Path(__file__).parents[1] / "results"


def curve(rows: list[dict[str, Any]]) -> dict[int, tuple[float, float]]:
    """{T: (ours, full attention)} of forward + backward, microseconds per 1024 tokens of the batch; by length."""
    found = {}
    for row in rows:
        length = row["case"].removesuffix("-backward")
        if length.isdigit() and length != row["case"]:
            times = {contender["name"]: contender["best"] for contender in row["contenders"]}
            if OURS in times and FULL in times:
                batch = int(row["shape"].split(",")[0].removeprefix("B "))
                per = batch * int(length) / 1024 / 1e3
                found[int(length)] = times[OURS] / per, times[FULL] / per
    return dict(sorted(found.items()))


def crossover(points: dict[int, tuple[float, float]]) -> int | None:
    """The first measured length from which ours is faster at every measured one; None if it is not at the longest."""
    first = None
    for length, (ours, full) in points.items():
        first = (first or length) if ours < full else None
    return first


def draw(points: dict[int, tuple[float, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for side, (name, mark) in enumerate((("native sparse attention, Triton", "o-"), ("cuDNN, causal", "s--"))):
        axes.loglog(list(points), [times[side] for times in points.values()], mark, label=name)
    axes.set_xticks(list(points), [f"{length // 1024}K" for length in points])
    axes.minorticks_off()
    axes.set_xlabel("tokens in a sequence")
    axes.set_ylabel("µs per 1024 tokens, forward + backward")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> None:
    points = curve(json.loads((RESULTS / "block_attention.json").read_text())["rows"])
    if not points:
        sys.exit("error: block_attention.json has no length that was timed beside cuDNN")
    for length, (ours, full) in points.items():
        print(f"{length:7d} tokens: {ours:7.1f} and {full:7.1f} us per 1024 tokens, ratio {ours / full:.2f}")
    print(f"ours is faster from {crossover(points)} tokens on")
    draw(points, RESULTS / "block_attention_crossover.png")


if __name__ == "__main__":
    main()
