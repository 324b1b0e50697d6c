"""A Gated DeltaNet layer between its projections: what surrounds the delta rule in training, and the decode step."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.benchmarks import peers
from experiments.benchmarks.cases import Case, Options, Setup
from experiments.benchmarks.clock import Contender
from lte_jax.layers import InitRule, Recipe
from lte_jax.mixers.gated_deltanet import Config, GatedDeltaNet
from pallas_kernels.gated_delta_rule import gated_delta_rule
from pallas_kernels.gated_deltanet import Parameters, Projections, State, gated_deltanet_step

TAPS, EPS = 4, 1e-6


def cases(tiny: bool) -> list[Case]:
    """Forward and backward of the layer and, for the share, of its delta rule alone; and decode steps."""
    shape, batches = ((2, 64, 2, 16), (2,)) if tiny else ((8, 4096, 8, 128), (1, 8, 64))
    what = f"(B, T, H, N) = {shape}, forward + backward"
    found = [
        Case("layer", f"between the projections, {what}", "bfloat16", functools.partial(_layer, shape)),
        Case("delta-rule", f"the delta rule of it, {what}", "bfloat16", functools.partial(_delta_rule, shape)),
    ]
    for batch in batches:
        make = functools.partial(_step, (batch, *shape[2:]))
        found.append(Case(f"decode-{batch}", f"step between the projections, B {batch}, {shape[2:]}", "bfloat16", make))
    return found


def _draw(seed: int, *shapes: tuple[int, ...], dtype: Any = jnp.bfloat16) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)]


def _layer(shape: tuple[int, ...], options: Options) -> Setup:
    B, T, H, N = shape
    wide, narrow = (B, T, H * N), (B, T, H)
    *arrays, dy = _draw(options.seed, wide, wide, wide, narrow, narrow, wide, wide)

    def ours(name: str) -> Contender:
        recipe = Recipe(nnx.Rngs(0), InitRule(std=0.5), jnp.bfloat16, implementation=name)
        config = Config(num_heads=H, head_dim=N, conv_size=TAPS, norm_eps=EPS)
        layer = GatedDeltaNet(config, 1, recipe)  # of width 1, as its projections are not used
        graph, weights = nnx.split(layer)

        def forward(weights: Any, *inputs: Any) -> Any:
            return nnx.merge(graph, weights).between(Projections(*inputs), None, None)[0]

        return peers.jax_contender(name, forward, (weights, *arrays), dy, ())

    rows = arrays[0].nbytes
    # Convolutions 3 x (2 + 3) arrays of rows, the norm 3 + 5, the delta rule 4 + 8.
    return Setup(ours, {}, None, rows * (15 + 8 + 12))


def _delta_rule(shape: tuple[int, ...], options: Options) -> Setup:
    q, k, v, do, g, beta = _draw(options.seed, shape, shape, shape, shape, shape[:3], shape[:3])
    g, beta = -jax.nn.softplus(g.astype(jnp.float32) - 3.0), jax.nn.sigmoid(beta.astype(jnp.float32))

    def ours(name: str) -> Contender:
        forward = lambda *a: gated_delta_rule(*a, implementation=name)[0]  # noqa: E731
        return peers.jax_contender(name, forward, (q, k, v, g, beta), do, ())

    return Setup(ours, {}, None, q.nbytes * 12)


def _step(shape: tuple[int, int, int], options: Options) -> Setup:
    B, H, N = shape
    wide, narrow, taps = (B, H * N), (B, H), (TAPS, H * N)
    inputs = Projections(*_draw(options.seed, wide, wide, wide, narrow, narrow, wide))
    weights = _draw(options.seed + 1, taps, taps, taps, (H,), (H,), (N,), dtype=jnp.float32)

    def start() -> State:
        last = _draw(options.seed + 2, *[(B, TAPS - 1, H * N)] * 3)
        return State(jnp.ones((B, H, N, N), jnp.float32), *last)

    def ours(name: str) -> Contender:
        def step(state: State, inputs: Projections, parameters: Parameters) -> Any:
            return gated_deltanet_step(inputs, parameters, state, eps=EPS, implementation=name)[:2]

        arrays = (inputs, Parameters(*weights))
        compiled = jax.jit(step, donate_argnums=0).lower(start(), *arrays).compile()
        held = [start()]

        def call() -> Any:
            y, held[0] = compiled(held[0], *arrays)
            return y

        return Contender(name, call, note="state in place")

    moved = 2 * sum(x.nbytes for x in jax.tree.leaves(start()))
    moved += sum(x.nbytes for x in jax.tree.leaves(inputs)) + inputs.v.nbytes
    return Setup(ours, {}, None, moved)
