"""What do scores look like: accuracy by distance, loss by position, a task's score over length and depth?"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np

from lte_jax.evaluate.own import Result
from lte_jax.evaluate.scores import Scores


def scores_picture(scores: Scores, path: str | Path, title: str = "") -> None:
    """Writes a PNG: accuracy by distance where the task says distances, and the loss along the row."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2 if scores.by_distance else 1, figsize=(11 if scores.by_distance else 7, 4))
    panels = list(np.ravel(axes))
    if scores.by_distance:
        names = [f"{bucket.low}-{bucket.high}" for bucket in scores.by_distance]
        bars = panels[0].bar(names, [bucket.accuracy for bucket in scores.by_distance])
        panels[0].bar_label(bars, [f"{bucket.accuracy:.2f}\nn={bucket.queries}" for bucket in scores.by_distance])
        panels[0].set(ylim=(0, 1.15), xlabel="tokens between answer and question", ylabel="accuracy")
    loss = scores.loss_by_position
    asked = np.flatnonzero(np.isfinite(loss))
    panels[-1].plot(asked, loss[asked], ".-" if asked.size < 100 else "-", linewidth=1)
    panels[-1].set(xlabel="position", ylabel="loss (nats)")
    figure.suptitle(
        f"{title}  loss {scores.loss:.4g}, perplexity {scores.perplexity:.4g}, accuracy {scores.accuracy:.3f}"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def result_picture(result: Result, path: str | Path, title: str = "") -> None:
    """Writes a PNG: a map of the score over both axes, or a line over the one."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    first, second = result.axes
    figure, axis = plt.subplots(figsize=(7, 4))
    if second is None:
        names = [row[first] for row in result.rows]
        at = [Path(str(name)).name for name in names] if any(isinstance(name, str) for name in names) else names
        axis.plot(at, [row[result.score] for row in result.rows], "o-")
        axis.set(xlabel=first, ylabel=result.score)
        if isinstance(at[0], str):
            axis.tick_params(axis="x", rotation=60)
    else:
        columns, rows = ([*dict.fromkeys(row[name] for row in result.rows)] for name in (first, second))
        rows.sort()
        grid = np.full((len(rows), len(columns)), np.nan)
        for row in result.rows:
            grid[rows.index(row[second]), columns.index(row[first])] = row[result.score]
        image = axis.imshow(grid, aspect="auto", cmap="RdYlGn", vmin=0, vmax=1)
        for (line, column), value in np.ndenumerate(grid):
            if np.isfinite(value):
                axis.text(column, line, f"{value:.2f}", ha="center", va="center", fontsize=8)
        axis.set_xticks(range(len(columns)), [f"{value:g}" for value in columns])
        axis.set_yticks(range(len(rows)), [f"{value:g}" for value in rows])
        axis.set(xlabel=first, ylabel=second)
        figure.colorbar(image, ax=axis, label=result.score)
    shown = ", ".join(f"{name} {value:.4g}" for name, value in result.total.items())
    axis.set_title(f"{title} {result.task}: {shown}".strip(), fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
