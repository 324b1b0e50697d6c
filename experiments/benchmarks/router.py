"""LTE's router with its dropout: the shapes of training, and the step of decoding. Nobody else has the operation."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks import peers
from experiments.benchmarks.cases import Case, Options, Setup
from experiments.benchmarks.clock import Contender
from pallas_kernels.router import Convolution, Dropout, draw_seeds, router_scores

NAMES = ("r", "dk", "dv", "dw0", "db0", "dw1", "db1", "dw2", "db2", "dw", "db")
RATE = 0.1


def cases(tiny: bool) -> list[Case]:
    """(B, T, K, N) of both sizes of the paper, of wider heads, and of one token with its neighbours."""
    shapes = ((1, 40, 2, 8),) if tiny else ((8, 4096, 16, 64), (4, 4096, 16, 64), (4, 4096, 8, 64), (4, 4096, 8, 128))
    steps = ((2, 13, 2, 8),) if tiny else ((1, 13, 16, 64), (64, 13, 16, 64))
    found = []
    for shape in (*shapes, *steps):
        for backward in (False, True) if shape in shapes else (False,):
            dropout = RATE if shape in shapes else 0.0
            name = "x".join(map(str, shape)) + ("-backward" if backward else "-forward")
            passes = "forward + backward" if backward else "forward"
            what = f"(B, T, K, N) = {shape}, dropout {dropout}, {passes}"
            found.append(Case(name, what, "bfloat16", functools.partial(_case, shape, backward, dropout)))
    return found


def _draw(shape: tuple[int, ...], seed: int) -> tuple[Any, ...]:
    """k, v, the flat weights of three convolutions and of the last map, and the cotangent of the scores."""

    @jax.jit
    def make(key: jax.Array) -> tuple[Any, ...]:
        keys = iter(jax.random.split(key, 11))
        k, v = (jax.random.normal(next(keys), shape).astype(jnp.bfloat16) for _ in range(2))
        heads, channels, weights = shape[2], 2 * shape[3], []
        for _ in range(3):
            std = (2 / (3 * channels)) ** 0.5
            weights.append(std * jax.random.normal(next(keys), (heads, 3, channels, channels // 2)))
            weights.append(0.05 * jax.random.normal(next(keys), (heads, channels // 2)))
            channels //= 2
        weights.append((2 / channels) ** 0.5 * jax.random.normal(next(keys), (heads, channels)))
        weights.append(0.1 * jax.random.normal(next(keys), (heads,)))
        return (k, v, *weights), jax.random.normal(next(keys), shape[:3])

    return make(jax.random.key(seed))


def _score(name: str, dropout: float, seeds: Any, k: Any, v: Any, *weights: Any) -> Any:
    convolutions = [Convolution(weights[i], weights[i + 1]) for i in (0, 2, 4)]
    drop = Dropout(dropout, seeds) if dropout else None
    return router_scores(k, v, convolutions, *weights[6:], dilations=(2, 2, 2), dropout=drop, implementation=name)


def _case(shape: tuple[int, ...], backward: bool, dropout: float, options: Options) -> Setup:
    inputs, dr = _draw(shape, options.seed)
    cotangent = dr if backward else None
    seeds = draw_seeds(jax.random.key(options.seed), 3)

    def ours(name: str) -> Contender:
        return peers.jax_contender(name, functools.partial(_score, name, dropout, seeds), inputs, cotangent, NAMES)

    def reference() -> dict[str, Any]:
        with jax.default_matmul_precision("highest"):
            wide = [x.astype(jnp.float32) for x in inputs]
            function = functools.partial(_score, "xla", dropout, seeds)
            contender = peers.jax_contender("", function, wide, cotangent, NAMES)
            assert contender.values is not None
            return contender.values(contender.call())

    moved = sum(x.nbytes for x in inputs) + dr.nbytes
    if backward:
        moved += dr.nbytes + 2 * sum(x.nbytes for x in inputs)
    return Setup(ours, {}, reference, moved)
