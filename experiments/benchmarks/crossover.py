"""From which length on is native sparse attention faster than full attention? A curve from the benchmark's rows.

python -m experiments.benchmarks.crossover reads experiments/results/block_attention.json and writes the picture beside
it. Its table sets ours beside flash-linear-attention's with cuDNN's window added, as that runs here without its own.
Cases "LENGTH-beside-fla-backward" are an earlier run with it: it compiles for minutes, so most runs leave it out.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

OURS, FULL, SPARSE, WINDOW = ("pallas", "triton"), "cudnn: causal", "fla", "cudnn: window"
RESULTS = Path(__file__).parents[1] / "results"


def curve(rows: list[dict[str, Any]]) -> dict[int, tuple[float, float, float | None]]:
    """{T: (ours, full attention, sparse peer and window)}, microseconds per 1024 tokens, forward + backward; by length.

    Tokens are those of the whole batch; ours is the faster of our implementations.
    """
    found = {}
    beside = {row["case"].removesuffix("-beside-fla-backward"): _times(row) for row in rows}
    for row in rows:
        length = row["case"].removesuffix("-backward")
        if length.isdigit() and length != row["case"]:
            times = _times(row)
            ours = [times[name] for name in OURS if name in times]
            if ours and FULL in times:
                batch = int(row["shape"].split(",")[0].removeprefix("B "))
                per = batch * int(length) / 1024 / 1e3
                peer = times if SPARSE in times else beside.get(length, {})
                sparse = peer[SPARSE] + peer[WINDOW] if SPARSE in peer and WINDOW in peer else None
                found[int(length)] = min(ours) / per, times[FULL] / per, sparse and sparse / per
    return dict(sorted(found.items()))


def _times(row: dict[str, Any]) -> dict[str, float]:
    return {contender["name"]: contender["best"] for contender in row["contenders"]}


def crossover(points: dict[int, tuple[float, float, float | None]]) -> int | None:
    """The first measured length from which ours is faster at every measured one; None if it is not at the longest."""
    first = None
    for length, (ours, full, _) in points.items():
        first = (first or length) if ours < full else None
    return first


def draw(points: dict[int, tuple[float, float, float | None]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    lines = (
        ("native sparse attention, ours", "o-"),
        ("full attention, cuDNN", "s--"),
        ("flash-linear-attention, with cuDNN's window", "^:"),
    )
    for side, (name, mark) in enumerate(lines):
        times = {length: point[side] for length, point in points.items() if point[side]}
        axes.loglog(list(times), list(times.values()), mark, label=name)
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
    for length, (ours, full, sparse) in points.items():
        beside = (
            "" if sparse is None else f"; {sparse:7.1f} flash-linear-attention and window, ratio {ours / sparse:.2f}"
        )
        print(f"{length:7d} tokens: {ours:7.1f} us per 1024; {full:7.1f} full, ratio {ours / full:.2f}{beside}")
    print(f"ours is faster from {crossover(points)} tokens on")
    draw(points, RESULTS / "block_attention_crossover.png")


if __name__ == "__main__":
    main()
