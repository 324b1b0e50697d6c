"""How a gradient becomes a change of the weights: AdamW, its schedule, clipping, and what is exempt.

lr(s) rises linearly over ``warmup_steps``, then falls as a cosine to ``final_fraction`` of its peak at the last step
m, v  = Adam's moments of the clipped gradient, bias-corrected
w    <- w - lr(s) (m / (sqrt(v) + eps) + weight_decay w),  no decay for norms, biases, A_log and dt_bias
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

NO_DECAY = ("norm", "bias", "A_log")
"""A parameter whose path holds one of these words is not decayed (``dt_bias`` is a bias by name)."""

ROUTER = "router"
"""The name under which a mixer holds its LTE router."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW as the authors train the 1.4B models."""

    learning_rate: float = 3e-4
    final_fraction: float = 0.1
    warmup_steps: int = 512
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-15
    weight_decay: float = 0.1
    clip: float = 1.0
    """Largest global norm of the gradient."""
    max_skipped: int = 20
    """So many steps in a row with a loss or gradient that is not finite stop the run."""

    def __post_init__(self) -> None:
        if not self.learning_rate > 0 or not 0 <= self.final_fraction <= 1:
            raise ValueError(
                f"optimizer.learning_rate {self.learning_rate}, final_fraction {self.final_fraction}: "
                "the rate must be positive and the fraction within [0, 1]"
            )
        if not all(0 <= beta < 1 for beta in self.betas) or not self.eps > 0:
            raise ValueError(f"optimizer.betas {self.betas}, eps {self.eps}: betas within [0, 1), eps positive")
        if not self.clip > 0 or self.weight_decay < 0 or self.warmup_steps < 0 or self.max_skipped < 1:
            raise ValueError(
                f"optimizer.clip {self.clip}, weight_decay {self.weight_decay}, warmup_steps {self.warmup_steps}, "
                f"max_skipped {self.max_skipped}: clip > 0, decay >= 0, warm-up >= 0, max_skipped >= 1"
            )


def learning_rate(config: OptimizerConfig, step: jax.Array, total_steps: int) -> jax.Array:
    """lr of step ``step`` (1 is the first) of ``total_steps``, float32."""
    s = step.astype(jnp.float32)
    rising = s / max(config.warmup_steps, 1)
    progress = jnp.clip((s - config.warmup_steps) / max(total_steps - config.warmup_steps, 1), 0.0, 1.0)
    falling = config.final_fraction + (1 - config.final_fraction) * 0.5 * (1 + jnp.cos(math.pi * progress))
    return config.learning_rate * jnp.where(s <= config.warmup_steps, rising, falling)


def adamw(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clipped gradients to directions of descent, before the learning rate, which belongs to the step (``apply``)."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.scale_by_adam(*config.betas, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
    )


def apply(
    config: OptimizerConfig,
    gradients: Any,
    state: optax.OptState,
    params: Any,
    *,
    step: jax.Array,
    total_steps: int,
    loss: jax.Array | float = 0.0,
    hold: jax.Array | None = None,
    freeze_router: jax.Array | None = None,
) -> tuple[Any, optax.OptState, dict[str, jax.Array]]:
    """One step of the optimiser; a loss or gradient that is not finite changes nothing.

    Args:
      step: number of this step, 1 for the first. It sets the learning rate, so that skipped steps do not shift the
        schedule; Adam's own count counts applied steps.
      hold: scalar bool; True changes nothing either.
      freeze_router: scalar bool; True leaves the LTE routers as they are, moments included.

    Returns:
      (params, state, {"grad_norm", "finite", "applied", "learning_rate"}).
    """
    if freeze_router is not None:
        gradients = _zero_router(gradients, freeze_router)
    norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(norm) & jnp.isfinite(loss)
    applied = finite if hold is None else finite & ~hold
    rate = learning_rate(config, step, total_steps)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes int32 counts with floats
        directions, new_state = adamw(config).update(gradients, state, params)
    if freeze_router is not None:
        directions = _zero_router(directions, freeze_router)
    moved = jax.tree.map(lambda p, d: p - (rate * d.astype(jnp.float32)).astype(p.dtype), params, directions)
    keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(applied, n, o), new, old)  # noqa: E731
    report = {"grad_norm": norm, "finite": finite, "applied": applied, "learning_rate": rate}
    return keep(moved, params), keep(new_state, state), report


def path_names(path: tuple[Any, ...]) -> tuple[str, ...]:
    """The keys of a tree path as text, names like "units/blocks/0" cut into their parts."""
    return tuple(jax.tree_util.keystr(path, simple=True, separator="/").split("/"))


def decay_mask(params: Any) -> Any:
    """True for each parameter that is decayed."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not any(word in name for name in path_names(path) for word in NO_DECAY), params
    )


def _zero_router(tree: Any, frozen: jax.Array) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.where(frozen, jnp.zeros_like(leaf), leaf) if ROUTER in path_names(path) else leaf, tree
    )
