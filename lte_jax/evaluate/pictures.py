"""What do scores look like: accuracy by distance, and loss by position?"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np

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
