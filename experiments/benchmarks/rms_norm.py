"""The gated norm of a Gated DeltaNet layer's output beside flash-linear-attention's."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks import peers
from experiments.benchmarks.cases import Case, Options, Setup
from experiments.benchmarks.clock import Contender
from pallas_kernels.rms_norm import rms_norm

NAMES = ("y", "dx", "dweight", "dgate")
EPS = 1e-6


def cases(tiny: bool) -> list[Case]:
    heads, dtype = ((2, 48, 2, 16),) if tiny else ((8, 4096, 8, 128), (8, 4096, 4, 256)), "bfloat16"
    found = []
    for shape in heads:
        for backward in (False, True):
            name = "x".join(map(str, shape)) + ("-backward" if backward else "-forward")
            what = f"(B, T, H, V) = {shape}, gated, forward{' + backward' * backward}"
            found.append(Case(name, what, dtype, functools.partial(_case, shape, backward, dtype)))
    plain = functools.partial(_case, heads[0], True, dtype, gated=False)
    return [*found, Case("plain", f"{heads[0]}, without a gate, forward + backward", dtype, plain)]


def _case(shape: tuple[int, ...], backward: bool, dtype: str, options: Options, gated: bool = True) -> Setup:
    keys = jax.random.split(jax.random.key(options.seed), 4)
    x, gate, dy = (jax.random.normal(key, shape).astype(dtype) for key in keys[:3])
    weight = 1 + jax.random.normal(keys[3], shape[-1:]) / 3
    inputs = (x, weight, gate) if gated else (x, weight)
    cotangent = dy if backward else None

    def ours(name: str) -> Contender:
        run = functools.partial(rms_norm, eps=EPS, implementation=name)
        return peers.jax_contender(name, run, inputs, cotangent, NAMES)

    def reference() -> dict[str, Any]:
        wide = tuple(a.astype(jnp.float32) for a in inputs)
        high = None if cotangent is None else cotangent.astype(jnp.float32)
        run = functools.partial(rms_norm, eps=EPS, implementation="xla")
        contender = peers.jax_contender("", run, wide, high, NAMES)
        assert contender.values is not None
        return contender.values(contender.call())

    def fla() -> Contender:
        if not gated:
            raise peers.PeerMissing("compared with a gate only")
        module = peers.fla_module("modules.norm.fused_norm_gate")
        do = None if cotangent is None else peers.to_torch(cotangent)[0].detach()
        run = lambda x, w, g: module.rms_norm_gated(x, g, w, None, eps=EPS)  # noqa: E731
        return peers.torch_contender("fla", run, peers.to_torch(x, weight, gate), do, NAMES)

    passes = (3 + 5 * backward) if gated else (2 + 3 * backward)
    return Setup(ours, {"fla": fla}, reference, x.nbytes * passes)
