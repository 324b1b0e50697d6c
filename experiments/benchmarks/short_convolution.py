"""The short convolution with SiLU beside flash-linear-attention's: whole rows and packed documents."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks import peers
from experiments.benchmarks.cases import Case, Options, Setup
from experiments.benchmarks.clock import Contender
from pallas_kernels.short_convolution import short_convolution

NAMES = ("y", "dx", "dweight")
TAPS = 4
DOCUMENT = 500  # tokens of a packed document, on average


def cases(tiny: bool) -> list[Case]:
    shape, dtype = (2, 96, 32) if tiny else (8, 4096, 1024), "bfloat16"
    found = []
    for packed in (False, True):
        for backward in (False, True):
            name = ("packed-" if packed else "") + ("backward" if backward else "forward")
            what = f"(B, T, D) = {shape}, {TAPS} taps{', packed' if packed else ''}, forward{' + backward' * backward}"
            found.append(Case(name, what, dtype, functools.partial(_case, shape, packed, backward, dtype)))
    return found


def _case(shape: tuple[int, int, int], packed: bool, backward: bool, dtype: str, options: Options) -> Setup:
    keys = jax.random.split(jax.random.key(options.seed), 4)
    x, dy = (jax.random.normal(key, shape).astype(dtype) for key in keys[:2])
    weight = jax.random.normal(keys[2], (TAPS, shape[2]))
    ids = None
    if packed:
        ids = 1 + jnp.cumsum(jax.random.uniform(keys[3], shape[:2]) < 1 / DOCUMENT, axis=1, dtype=jnp.int32)
    cotangent = dy if backward else None

    def forward(name: str, x: Any, weight: Any) -> Any:
        return short_convolution(x, weight, segment_ids=ids, implementation=name)[0]

    def ours(name: str) -> Contender:
        return peers.jax_contender(name, functools.partial(forward, name), (x, weight), cotangent, NAMES)

    def reference() -> dict[str, Any]:
        high = None if cotangent is None else cotangent.astype(jnp.float32)
        wide = (x.astype(jnp.float32), weight)
        contender = peers.jax_contender("", functools.partial(forward, "xla"), wide, high, NAMES)
        assert contender.values is not None
        return contender.values(contender.call())

    def fla() -> Contender:
        module = peers.fla_module("modules.causal_conv1d")
        if packed:
            raise peers.PeerMissing("takes documents as one row with their ends, not as ids")
        arrays = peers.to_torch(x, weight.T.astype(dtype))
        do = None if cotangent is None else peers.to_torch(cotangent)[0].detach()
        return peers.torch_contender(
            "fla", lambda x, w: module.causal_conv1d(x, w, activation="silu")[0], arrays, do, NAMES[:2]
        )

    return Setup(ours, {"fla": fla}, reference, x.nbytes * (5 if backward else 2))
