"""The penalty that teaches LTE routers to keep at most M tokens, and the controller that sets its weights.

Pure functions on a small state that belongs to the training state, not to the weights:

    kept[r,k]   <- (1 - a) kept + a p (scored positions),   a = 2 / (1 + period // 2)
    weight[r,k] <- at every ``period``-th step, from  big = kept > low M  and  small = kept < high M:
                   first update: ``initial`` where big, else 0
                   later: x raise_factor where big and not small, / lower_factor where small and not big,
                   at most ``maximum``; below ``minimum`` it becomes 0; a 0 becomes ``minimum`` where big

p is the fraction of scored positions of the global batch with a positive score; the last ``reach`` tokens of each
document are not scored, since the router has not seen their right context. Source: paper section 3.3 and the authors'
training utilities. There ``kept`` is an average per process; here it is global, so that a resumed run is exact.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

from lte_jax.dims import SegmentIds


@dataclasses.dataclass(frozen=True)
class PenaltyConfig:
    """Schedule of the penalty; the names in brackets are the authors'."""

    shared: Literal["head", "layer", "all"] = "head"
    """Over what one weight is shared (l1_lambda_shared)."""
    period: int = 32
    """Steps between updates of the weights (l1_lambda_update_steps)."""
    initial: float = 1e-9
    """Weight given by the first update where too much is kept (l1_lambda_init)."""
    minimum: float = 1e-9
    """Smaller weights become 0 (l1_lambda_min)."""
    maximum: float = 1.0
    """Cap of the weights (l1_lambda_max)."""
    raise_factor: float = 1.5
    """(l1_alpha)"""
    lower_factor: float = 2.0
    """(l1_alpha_neg)"""
    tolerance: tuple[float, float] = (0.95, 1.0)
    """The dead band as fractions of the budget (l1_lambda_tolerate)."""
    initial_steps: int = 0
    """No penalty up to this step (l1_lambda_initial_steps)."""
    warmup_steps: int = 0
    """Up to this step the router selects nothing away and sends no gradient into k and v (l1_warmup_steps)."""
    freeze_steps: int = 0
    """Up to this step the router's weights are fixed (routing_freeze_steps)."""

    def __post_init__(self) -> None:
        if self.period < 2:
            raise ValueError(f"penalty.period {self.period}: must be at least 2 steps")
        if not 0 < self.minimum <= self.initial <= self.maximum:
            raise ValueError(
                f"penalty weights minimum {self.minimum}, initial {self.initial}, maximum {self.maximum}: "
                "must be positive and in this order"
            )
        if self.raise_factor < 1 or self.lower_factor < 1:
            raise ValueError(f"penalty factors {self.raise_factor} and {self.lower_factor}: must be at least 1")
        if not 0 < self.tolerance[0] <= self.tolerance[1]:
            raise ValueError(f"penalty.tolerance {self.tolerance}: must be (low, high) with 0 < low <= high")


class PenaltyState(NamedTuple):
    """What the controller remembers between steps."""

    weights: Float32[Array, "R K"]
    kept: Float32[Array, "R K"]
    step: Int32[Array, ""]
    """Steps seen."""
    updates: Int32[Array, ""]
    """Updates of the weights made: the first one is different."""


def init_state(layers: int, heads: int, length: int) -> PenaltyState:
    """No penalty, and everything kept: ``kept`` starts at the sequence length."""
    return PenaltyState(
        weights=jnp.zeros((layers, heads), jnp.float32),
        kept=jnp.full((layers, heads), float(length), jnp.float32),
        step=jnp.zeros((), jnp.int32),
        updates=jnp.zeros((), jnp.int32),
    )


def scored_positions(shape: tuple[int, ...], segment_ids: SegmentIds | None, reach: int) -> Bool[Array, "B T"]:
    """True where the router has seen its whole right context: all but the last ``reach`` tokens of each document."""
    batch, length = shape
    if segment_ids is None:
        return jnp.broadcast_to(jnp.arange(length) < length - reach, (batch, length))
    ahead = jnp.pad(segment_ids[:, reach:], ((0, 0), (0, min(reach, length))))[:, :length]
    return (segment_ids == ahead) & (segment_ids != 0)


def penalty(
    scores: Float32[Array, "R B T K"],
    weights: Float32[Array, "R K"],
    valid: Bool[Array, "B T"],
    count: jax.Array | None = None,
) -> Float32[Array, ""]:
    """mean over layers, heads and valid positions of weight * relu(score).

    Args:
      count: the number of valid positions to divide by, where this batch is a part of a larger one.
    """
    positions = jnp.sum(valid, dtype=jnp.float32) if count is None else count.astype(jnp.float32)
    terms = jax.nn.relu(scores) * weights[:, None, None, :] * valid[None, :, :, None].astype(jnp.float32)
    layers, _, _, heads = scores.shape
    return jnp.sum(terms) / (jnp.maximum(positions, 1.0) * (layers * heads))


def selected_counts(scores: Float32[Array, "R B T K"], valid: Bool[Array, "B T"]) -> Float32[Array, "R K"]:
    """How many valid positions have a positive score, per layer and head."""
    return jnp.sum((scores > 0) & valid[None, :, :, None], axis=(1, 2), dtype=jnp.float32)


def update(
    state: PenaltyState,
    config: PenaltyConfig,
    budget: int,
    fraction: Float32[Array, "R K"],
    positions: jax.Array,
    finite: jax.Array | bool = True,
) -> PenaltyState:
    """One step of the controller.

    Args:
      budget: M, slots per head.
      fraction: p, of the scored positions of the global batch.
      positions: scored positions per row (T - reach without packing), a float32 scalar.
      finite: whether this step's numbers count; where not, ``kept`` stays and only the step number moves on.
    """
    decay = 2.0 / (1 + config.period // 2)
    kept = jnp.where(finite, (1.0 - decay) * state.kept + decay * fraction * positions, state.kept)
    step = state.step + 1
    due = (step > config.initial_steps) & (step % config.period == 0)
    measured = _shared_mean(kept, config.shared)
    later = _next_weights(state.weights, measured, config, budget)
    first = jnp.where(measured > budget * config.tolerance[0], config.initial, 0.0).astype(jnp.float32)
    changed = jnp.where(state.updates == 0, jnp.broadcast_to(first, kept.shape), later)
    return PenaltyState(
        weights=jnp.where(due, changed, state.weights),
        kept=kept,
        step=step,
        updates=state.updates + due.astype(jnp.int32),
    )


def _shared_mean(kept: Float32[Array, "R K"], shared: str) -> jax.Array:
    if shared == "head":
        return kept
    return jnp.mean(kept, axis=-1 if shared == "layer" else None, keepdims=True)


def _next_weights(
    weights: Float32[Array, "R K"], kept: jax.Array, config: PenaltyConfig, budget: int
) -> Float32[Array, "R K"]:
    low, high = config.tolerance
    big, small = kept > budget * low, kept < budget * high
    factor = jnp.where(big & ~small, config.raise_factor, jnp.where(small & ~big, 1.0 / config.lower_factor, 1.0))
    moved = jnp.minimum(weights * factor.astype(jnp.float32), config.maximum)
    moved = jnp.where(moved < config.minimum, 0.0, moved)
    return jnp.where((moved == 0) & big, config.minimum, moved).astype(jnp.float32)
