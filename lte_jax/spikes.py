"""Which steps have a loss far above what the run has shown so far?

    spike  = loss > mean + sigmas * deviation                       after ``memory`` steps
    mean, square <- moving averages of min(loss, that bound) and its square;  deviation^2 = square - mean^2

The bound enters the averages in place of a spike, so that one does not hide the next, and a lasting change of level is
accepted after a while. Losses that are not finite leave the averages alone: ``optim.apply`` deals with them.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class SpikeConfig:
    """What counts as a spike; its batch is kept beside the run's metrics."""

    sigmas: float = 6.0
    """Standard deviations above the moving mean."""
    memory: int = 100
    """Steps over which mean and deviation move, and before which nothing is called a spike."""
    skip: bool = False
    """Whether a spike's step changes nothing, like one that is not finite. The paper's recipe keeps such steps."""

    def __post_init__(self) -> None:
        if not self.sigmas > 0 or self.memory < 2:
            raise ValueError(f"spikes.sigmas {self.sigmas}, memory {self.memory}: sigmas > 0 and memory >= 2")


class SpikeState(NamedTuple):
    """Float32 and int32 scalars."""

    mean: jax.Array
    square: jax.Array
    steps: jax.Array


def init_state() -> SpikeState:
    zero = jnp.zeros((), jnp.float32)
    return SpikeState(zero, zero, jnp.zeros((), jnp.int32))


def detect(state: SpikeState, config: SpikeConfig, loss: jax.Array) -> tuple[SpikeState, jax.Array]:
    """The state after this loss, and whether it is a spike (scalar bool)."""
    deviation = jnp.sqrt(jnp.maximum(state.square - state.mean**2, 0.0))
    # Rounding of the squares alone gives a constant loss a deviation of about 3e-4 of its mean.
    bound = state.mean + config.sigmas * jnp.maximum(deviation, 1e-3 * jnp.abs(state.mean))
    warm = state.steps >= config.memory
    finite = jnp.isfinite(loss)
    seen = jnp.where(warm, jnp.minimum(loss, bound), loss)
    # The first averages are plain means: a moving one from zero would start too low.
    rate = 1.0 / jnp.minimum(state.steps + 1, config.memory).astype(jnp.float32)

    def move(old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.where(finite, old + rate * (new - old), old)

    moved = SpikeState(
        move(state.mean, seen), move(state.square, seen**2), state.steps + finite.astype(state.steps.dtype)
    )
    return moved, warm & finite & (loss > bound)
