"""LTE's settings, the rules that they must keep, and the router that they ask for."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp

from lte_jax.dims import Positions, Scores
from lte_jax.layers import Recipe
from lte_jax.mixers import lte_store
from lte_jax.mixers.base import Aux, MixerConfig
from lte_jax.mixers.lte_router import Router, reach
from pallas_kernels.router.api import METHODS

SHARING = ("head", "layer", "all")


@dataclasses.dataclass(frozen=True)
class Config(MixerConfig):
    """Settings of LTE.

    Attributes:
      window: W, the tokens before a query that it always sees; self comes on top.
      budget: M, the slots per KV head for tokens beyond the window, sinks included.
      sinks: Z, the first tokens of a document, which are always kept.
      conv_sizes, conv_dilations: the router's convolutions; together they read ``reach`` tokens on each side.
      dropout: of the router's inputs, in training.
      routing_method: "sigmoid" or "relu". routing_grad: whether the router's gradient goes on into k and v.
      routing_shared: own router weights per "head", one set per "layer", or one for "all" layers (the model owns it).
      retention: what ranks tokens: "learned" (the router), "recency", "random" (by ``retention_seed``), or
        "write_strength" of the delta rule in the layer below.
    """

    num_heads: int = 16
    num_kv_heads: int | None = None
    window: int = 768
    budget: int = 512
    sinks: int = 4
    rope_theta: float = 10000.0
    qkv_bias: bool = False
    conv_sizes: tuple[int, ...] = (3, 3, 3)
    conv_dilations: tuple[int, ...] = (2, 2, 2)
    dropout: float = 0.1
    routing_method: str = "sigmoid"
    routing_grad: bool = True
    routing_shared: str = "head"
    retention: str = "learned"
    retention_seed: int = 0

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def reach(self) -> int:
        """Tokens on each side that a score reads: a score is final that many steps after its token."""
        return reach(self.conv_sizes, self.conv_dilations) if self.retention == "learned" else 0

    def validate(self, width: int) -> None:
        def need(condition: bool, message: str) -> None:
            if not condition:
                raise ValueError(f"lte: {message}")

        for name in ("num_heads", "kv_heads", "window", "budget"):
            value = getattr(self, name)
            need(value >= 1, f"{name.replace('kv_heads', 'num_kv_heads')}={value} must be at least 1")
        need(
            width % self.num_heads == 0,
            f"width {width} is not a multiple of num_heads={self.num_heads}; change one: the quotient is the head size",
        )
        size = width // self.num_heads
        need(size % 2 == 0, f"head size {size} is odd; rotary positions turn pairs, change width or num_heads")
        need(
            self.num_heads % self.kv_heads == 0,
            f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.kv_heads}; change one",
        )
        need(self.sinks >= 0, f"sinks={self.sinks} must be at least 0")
        need(
            self.budget > self.sinks,
            f"budget={self.budget} must be greater than sinks={self.sinks}: sinks use slots of it; raise the budget",
        )
        for name, known in (
            ("routing_method", METHODS),
            ("routing_shared", SHARING),
            ("retention", lte_store.RULES),
        ):
            value = getattr(self, name)
            need(value in known, f"{name}={value!r} is not one of {', '.join(known)}")
        need(self.rope_theta > 0, f"rope_theta={self.rope_theta} must be above 0")
        need(0.0 <= self.dropout < 1.0, f"dropout={self.dropout} must be in [0, 1)")
        if self.retention == "learned":
            self._validate_router(size, need)

    def _validate_router(self, size: int, need: Any) -> None:
        sizes, dilations = self.conv_sizes, self.conv_dilations
        need(
            len(sizes) == len(dilations) > 0,
            f"conv_sizes={sizes} and conv_dilations={dilations} must have the same, non-zero length",
        )
        need(min(*sizes, *dilations) >= 1, f"conv_sizes={sizes} and conv_dilations={dilations} must all be at least 1")
        need(
            all((taps - 1) * dilation % 2 == 0 for taps, dilation in zip(sizes, dilations, strict=True)),
            f"conv_sizes={sizes} with conv_dilations={dilations} has no centre: (taps - 1) * dilation must be even",
        )
        need(
            2 * size >> len(sizes) >= 1,
            f"conv_sizes={sizes} are too many: each halves the 2 * {size} channels of a head, and none would be left",
        )
        need(
            self.window >= 2 * self.reach,
            f"window={self.window} is shorter than the router's reach on both sides, {2 * self.reach}; a score must be "
            "final before its token can leave the window: lengthen the window or shorten the convolutions",
        )


def make_router(config: Config, width: int, recipe: Recipe) -> Router:
    """A layer's router, or, for ``routing_shared="all"``, that of all layers, which the model owns and passes."""
    return Router(
        config.kv_heads if config.routing_shared == "head" else 1,
        2 * (width // config.num_heads),
        recipe,
        sizes=config.conv_sizes,
        dilations=config.conv_dilations,
        dropout=config.dropout,
        method=config.routing_method,
    )


def needs_shared_router(config: MixerConfig) -> TypeGuard[Config]:
    """Whether these settings want a ``router`` passed to every call."""
    return isinstance(config, Config) and config.retention == "learned" and config.routing_shared == "all"


def check_reading(reading: str, known: tuple[str, ...]) -> None:
    """Raises ValueError for a reading that a call does not know."""
    if reading not in known:
        raise ValueError(f"lte: reading={reading!r} is not one of {', '.join(known)} here")


def rule_scores(config: Config, positions: Positions, context: Aux | None) -> Scores:
    """Scores by a rule without a router."""
    if config.retention == "recency":
        return lte_store.recency_scores(positions, config.kv_heads)
    if config.retention == "random":
        return lte_store.random_scores(positions, config.kv_heads, config.retention_seed)
    if context is None or "write_strength" not in context:
        raise ValueError(
            "lte: retention='write_strength' needs context['write_strength'] [B, T] from the mixer below; put a "
            "gated_deltanet there, with emit_write_strength=True"
        )
    strength = jax.lax.stop_gradient(context["write_strength"]).astype(jnp.float32)
    return jnp.broadcast_to(strength[..., None], (*strength.shape, config.kv_heads))
