"""The gated delta rule beside flash-linear-attention and jax-linear-attention: training shapes and the decode step."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import peers
from experiments.benchmarks.cases import Case, Options, Setup
from experiments.benchmarks.clock import Contender
from pallas_kernels.gated_delta_rule.api import gated_delta_rule, gated_delta_rule_step

NAMES = ("o", "dq", "dk", "dv", "dg", "dbeta")
SHAPES = ((8, 4096, 8, 128), (8, 4096, 8, 256), (1, 32768, 8, 128), (2, 16384, 8, 256), (64, 2048, 8, 128))
FLA_NOTE = "gradients wrong on this Triton and Hopper (its own check refuses): time only"


def cases(tiny: bool) -> list[Case]:
    """Each shape forward and forward + backward, and the decode step; ``tiny`` for machines without a GPU."""
    shapes, batches, dtype = (((2, 96, 2, 16),), (2,), "bfloat16") if tiny else (SHAPES, (1, 8, 64), "bfloat16")
    found = []
    for shape in shapes:
        for backward in (False, True):
            name = "x".join(map(str, shape)) + ("-backward" if backward else "-forward")
            what = "(B, T, H, N) = {}, {}".format(shape, "forward + backward" if backward else "forward")
            found.append(Case(name, what, dtype, functools.partial(_training, shape, backward, dtype)))
    heads, size = shapes[0][2:]
    for batch in batches:
        what = f"decode step, B {batch}, H {heads}, N {size}"
        found.append(Case(f"decode-{batch}", what, dtype, functools.partial(_step, (batch, heads, size), dtype)))
    return found


def _inputs(shape: tuple[int, ...], dtype: str, seed: int) -> tuple[Any, ...]:
    """q, k, v, g, beta and the cotangent of o."""

    @jax.jit
    def draw(key: jax.Array) -> tuple[Any, ...]:
        keys = jax.random.split(key, 6)
        q, k, v, do = (jax.random.normal(key, shape).astype(dtype) for key in keys[:4])
        g = -jax.nn.softplus(jax.random.normal(keys[4], shape[:-1]) - 3.0)
        beta = jax.nn.sigmoid(jax.random.normal(keys[5], shape[:-1])).astype(dtype)
        return q, k, v, g, beta, do

    return draw(jax.random.key(seed))


def _training(shape: tuple[int, ...], backward: bool, dtype: str, options: Options) -> Setup:
    *inputs, do = _inputs(shape, dtype, options.seed)
    cotangent = do if backward else None

    def ours(name: str) -> Contender:
        def forward(*arrays: Any) -> Any:
            return gated_delta_rule(*arrays, implementation=name)[0]

        return peers.jax_contender(name, forward, inputs, cotangent, NAMES)

    def reference() -> dict[str, Any]:
        with jax.default_matmul_precision("highest"):
            wide = [x.astype(jnp.float32) for x in inputs]
            high = None if cotangent is None else cotangent.astype(jnp.float32)
            contender = peers.jax_contender(
                "", lambda *a: gated_delta_rule(*a, implementation="xla")[0], wide, high, NAMES
            )
            assert contender.values is not None
            return contender.values(contender.call())

    def fla() -> Contender:
        module = peers.fla_module("ops.gated_delta_rule")
        if backward:
            peers.fla_module("ops.common.chunk_o").TRITON_ABOVE_3_4_0 = False  # time what it refuses to run

        def forward(q: Any, k: Any, v: Any, g: Any, beta: Any) -> Any:
            return module.chunk_gated_delta_rule(q, k, v, g, beta, use_qk_l2norm_in_kernel=True)[0]

        return peers.torch_contender(
            "fla", forward, peers.to_torch(*inputs), _detached(cotangent), NAMES, FLA_NOTE if backward else ""
        )

    def jla() -> Contender:
        module = peers.load("jla.ops.mosaic_gpu.gated_delta_rule", "jax-linear-attention")

        def forward(*arrays: Any) -> Any:
            return module.gated_delta_rule(*arrays, use_qk_l2norm=True)[0]

        return peers.jax_contender("jax_linear_attention", forward, inputs, cotangent, NAMES)

    moved = sum(x.nbytes for x in inputs) + do.nbytes  # the output has the cotangent's size
    if backward:
        moved += do.nbytes + 2 * sum(x.nbytes for x in inputs)
    return Setup(ours, {"fla": fla, "jax_linear_attention": jla}, reference, moved)


def _detached(cotangent: Any | None) -> Any | None:
    return None if cotangent is None else peers.to_torch(cotangent)[0].detach()


def _step(shape: tuple[int, ...], dtype: str, options: Options) -> Setup:
    batch, heads, size = shape
    inputs = [x[:, 0] for x in _inputs((batch, 1, heads, size), dtype, options.seed)[:5]]

    def start() -> jax.Array:
        return jnp.ones((batch, heads, size, size), jnp.float32)

    def ours(name: str) -> Contender:
        step = jax.jit(
            lambda state, *arrays: gated_delta_rule_step(*arrays, state, implementation=name), donate_argnums=0
        )
        compiled = step.lower(start(), *inputs).compile()
        held = [start()]

        def call() -> Any:
            o, held[0] = compiled(held[0], *inputs)
            return o

        return Contender(name, call, note="state in place")

    def fla() -> Contender:
        module = peers.fla_module("ops.gated_delta_rule")
        torch = peers.torch_on_gpu()
        arrays = [x.detach() for x in peers.to_torch(*(x[:, None] for x in inputs), start())]

        def call() -> Any:
            with torch.no_grad():
                return module.fused_recurrent_gated_delta_rule(
                    *arrays[:5], initial_state=arrays[5], output_final_state=True, use_qk_l2norm_in_kernel=True
                )

        return Contender("fla", call, torch=True)

    moved = 2 * start().nbytes + sum(x.nbytes for x in inputs) + int(np.prod(shape)) * inputs[2].dtype.itemsize
    return Setup(ours, {"fla": fla}, None, moved)
