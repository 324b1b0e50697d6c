"""What did a run look like? The loss over its steps, and for LTE which tokens each head kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import jax
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx

from lte_jax.metrics import read_metrics
from lte_jax.model import LanguageModel


def loss_curve(folder: Path, band: tuple[float, float] | None = None) -> Path | None:
    """``loss.png``: training loss, held-out loss and, for LTE, tokens kept per head; None before the first record.

    Args:
      band: (fewest, most) tokens that the penalty's controller is content with.
    """
    records = read_metrics(folder)
    training = [record for record in records if isinstance(record.get("loss"), float)]
    heldout = [record for record in records if isinstance(record.get("heldout_loss"), float)]
    if not training:
        return None
    routed = [record for record in training if "kept" in record]
    figure, axes = plt.subplots(2 if routed else 1, 1, figsize=(7, 6 if routed else 4), sharex=True, squeeze=False)
    top = axes[0, 0]
    top.plot([r["step"] for r in training], [r["loss"] for r in training], label="training", linewidth=1)
    if heldout:
        top.plot(
            [r["step"] for r in heldout], [r["heldout_loss"] for r in heldout], "o-", label="held-out", markersize=3
        )
    top.set_ylabel("loss (nats per token)")
    top.legend()
    if routed:
        kept = np.array([np.ravel(record["kept"]) for record in routed])
        axes[1, 0].plot([record["step"] for record in routed], kept, linewidth=0.8)
        if band is not None:
            axes[1, 0].axhspan(*band, color="tab:green", alpha=0.25, label="tolerance of the budget")
            axes[1, 0].legend()
        axes[1, 0].set_ylabel("kept per head (moving average)")
    axes[-1, 0].set_xlabel("step")
    return _write(figure, folder / "loss.png")


def kept_tokens(
    folder: Path, model: LanguageModel, input_ids: np.ndarray, segment_ids: np.ndarray | None = None
) -> Path | None:
    """``kept.png``: for one row of tokens, the scores and what stays beyond the window; None without LTE layers.

    Args:
      input_ids, segment_ids: [1, T].
    """
    hidden_and_aux = jax.jit(_routing, static_argnums=0)(*nnx.split(model), input_ids, segment_ids)
    if not hidden_and_aux:
        return None
    scores = np.asarray(hidden_and_aux["scores"])[:, 0]  # [R, T, K]
    selected = np.asarray(hidden_and_aux["selected"])[:, 0]
    layers, _, heads = scores.shape
    figure, axes = plt.subplots(layers, 1, figsize=(10, 1 + 0.25 * heads * layers + layers), squeeze=False)
    names = [index for index, name in enumerate(model.config.layer_names()) if name == "lte"]
    for row, axis in enumerate(axes[:, 0]):
        limit = float(np.abs(scores[row]).max()) or 1.0
        image = axis.imshow(scores[row].T, aspect="auto", cmap="coolwarm", vmin=-limit, vmax=limit)
        head, token = np.nonzero(selected[row].T)
        axis.plot(token, head, "k.", markersize=4)
        axis.set_ylabel(f"layer {names[row]}: head")
        axis.set_yticks(range(heads))
        figure.colorbar(image, ax=axis, label="score")
    axes[-1, 0].set_xlabel("token (a dot: stays beyond the window at the end of the row)")
    return _write(figure, folder / "kept.png")


def accuracy_by_distance(
    path: Path, scores: dict[str, list[tuple[int, int, float]]], chance: float | None = None
) -> Path:
    """Accuracy over the distance to the answer, one line per model: name -> (low, high, accuracy) of each range."""
    figure, axis = plt.subplots(figsize=(7, 4))
    for name, buckets in scores.items():
        axis.plot([(low + high) / 2 for low, high, _ in buckets], [share for _, _, share in buckets], "o-", label=name)
    if chance is not None:
        axis.axhline(chance, color="gray", linestyle=":", label="chance")
    axis.set_xlabel("distance to the answer (tokens)")
    axis.set_ylabel("accuracy")
    axis.set_ylim(0, 1.02)
    axis.legend()
    return _write(figure, path)


def _routing(graph: Any, state: Any, input_ids: jax.Array, segment_ids: jax.Array | None) -> dict[str, jax.Array]:
    return nnx.merge(graph, state).hidden(input_ids, segment_ids=segment_ids, reading="prompt")[1]


def _write(figure: Any, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
