"""How well a model predicts batches: loss, perplexity, accuracy, and accuracy by distance to the answer."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lte_jax.losses import next_token_labels, token_losses
from lte_jax.mixers.base import Reading
from lte_jax.model import LanguageModel


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Queries whose answers lie ``low`` to ``high`` tokens back, and how many of them were answered."""

    low: int
    high: int
    queries: int
    correct: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.queries


@dataclasses.dataclass(frozen=True)
class Scores:
    """What was predicted.

    Attributes:
      targets: positions with a label. loss: mean cross-entropy there, in nats. accuracy: share predicted by argmax.
      by_distance: for tasks that say how far back each answer lies.
      loss_by_position: mean loss at each position up to the longest row's end [T], NaN where nothing was asked.
    """

    targets: int
    loss: float
    accuracy: float
    by_distance: tuple[Bucket, ...]
    loss_by_position: np.ndarray

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    def to_dict(self) -> dict[str, Any]:
        """JSON values, without the losses by position."""
        buckets = [{**dataclasses.asdict(bucket), "accuracy": bucket.accuracy} for bucket in self.by_distance]
        return {
            "targets": self.targets,
            "loss": self.loss,
            "perplexity": self.perplexity,
            "accuracy": self.accuracy,
            "by_distance": buckets,
        }


def score_batches(
    model: LanguageModel,
    batches: Iterable[Mapping[str, np.ndarray]],
    *,
    reading: Reading = "streaming",
    buckets: int = 4,
) -> Scores:
    """Scores a model on batches of ``input_ids``, ``labels`` (negative where nothing is asked; default the next token),
    and optionally ``segment_ids`` and ``distance``, each [B, T].

    Args:
      reading: how LTE reads: "streaming" is the causal rule under the hard budget, the state that decoding has.
      buckets: in how many ranges of equal numbers of queries the distances are reported.

    Raises:
      ValueError: the batches ask nothing.
    """
    graph, state = nnx.split(model)
    losses, corrects, distances = [], [], []
    total, count = np.zeros(0), np.zeros(0, np.int64)
    for batch in batches:
        ids = jnp.asarray(batch["input_ids"], jnp.int32)
        segments = batch.get("segment_ids")
        segment_ids = None if segments is None else jnp.asarray(segments, jnp.int32)
        given = batch.get("labels")
        labels = next_token_labels(ids, segment_ids) if given is None else jnp.asarray(given, jnp.int32)
        loss, correct = jax.device_get(score_tokens(graph, state, ids, labels, segment_ids, reading=reading))
        asked = np.asarray(labels) >= 0
        losses.append(loss[asked])
        corrects.append(correct[asked])
        if "distance" in batch:
            distances.append(np.asarray(batch["distance"])[asked])
        total = _add(total, loss.sum(0, dtype=np.float64))
        count = _add(count, asked.sum(0))
    if not losses or not sum(map(len, losses)):
        raise ValueError("the batches hold no position with a label: there is nothing to score")
    loss, correct = np.concatenate(losses), np.concatenate(corrects)
    with np.errstate(invalid="ignore"):
        by_position = total / count
    return Scores(
        targets=len(loss),
        loss=float(loss.mean(dtype=np.float64)),
        accuracy=float(correct.mean(dtype=np.float64)),
        by_distance=_by_distance(np.concatenate(distances), correct, buckets) if distances else (),
        loss_by_position=by_position,
    )


def _add(sums: np.ndarray, more: np.ndarray) -> np.ndarray:
    """Sums by position; batches of tasks of several lengths end at different positions."""
    length = max(len(sums), len(more))
    return np.pad(sums, (0, length - len(sums))) + np.pad(more, (0, length - len(more)))


@functools.partial(jax.jit, static_argnums=0, static_argnames="reading")
def score_tokens(
    graph: Any, state: Any, ids: jax.Array, labels: jax.Array, segment_ids: jax.Array | None, *, reading: str
) -> tuple[jax.Array, jax.Array]:
    """(loss, whether argmax is the label), each [B, T]; 0 where the label is negative."""
    model = nnx.merge(graph, state)
    loss, correct, _ = token_losses(model, ids, labels, segment_ids=segment_ids, reading=reading)
    return loss, correct


def _by_distance(distance: np.ndarray, correct: np.ndarray, buckets: int) -> tuple[Bucket, ...]:
    """Ranges of distance with about the same number of queries each."""
    edges = np.quantile(distance, np.linspace(0, 1, buckets + 1)).round().astype(int)
    edges = np.append(np.unique(edges[:-1]), edges[-1] + 1)
    found = []
    for low, high in itertools.pairwise(edges):
        inside = (distance >= low) & (distance < high)
        if inside.any():
            found.append(Bucket(int(low), int(high) - 1, int(inside.sum()), int(correct[inside].sum())))
    return tuple(found)
