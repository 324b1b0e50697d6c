"""The Hopper kernels of window attention without a GPU: in Pallas's interpreter, and lowered for one.

The interpreter multiplies, copies and waits as the kernels say, and reports races; what only the hardware decides (the
compiled products and barriers) is seen by the GPU tests of ``test_window_attention``.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from pallas_kernels.dispatch import UnsupportedCase
from pallas_kernels.window_attention import (
    Columns,
    api,
    pallas,
    pallas_dkv,
    pallas_dq,
    pallas_forward,
    pallas_stream,
)
from pallas_kernels.window_attention.cases import Case, Operands, StepCase, check_call
from tests.kernels.test_window_attention import Setup, compare, cotangents, make, rounded, truth, widened

SMALL = {
    "retained": Setup(70, 70, 20, expiry="some", B=1, K=1, G=1),
    "all at once": Setup(133, 141, 40, C=77, expiry="until", documents="padded", B=1, K=1, G=2),
    "two heads of a window": Setup(200, 200, 65, B=1, K=2, G=1),
}


def operands_of(setup: Setup, a: dict) -> Operands:
    columns = Columns(a["ck"], a["cv"], a["position"], a["until"]) if setup.C else None
    return Operands(a["q"], a["k"], a["v"], a["s"], a.get("expiry"), columns, a.get("segment_ids"))


def forward_and_backward(case: Case, operands: Operands, do, dlse, interpreted: bool = False):
    (o, lse), residuals = pallas.forward(case, operands, interpreted)
    return o, lse, pallas.backward(case, operands, o, lse, residuals, do, dlse, interpreted)


@pytest.fixture
def small_tiles(monkeypatch):
    """Few warpgroups and buffers: as many tiles as possible in little time."""
    monkeypatch.setitem(pallas_forward.TILES, 64, pallas_stream.Tiles(2, 64, 2))
    monkeypatch.setitem(pallas_dq.TILES, 64, pallas_stream.Tiles(1, 64, 2))
    monkeypatch.setitem(pallas_dkv.TILES, 64, pallas_dkv.KeyTiles(1, 64, 2))
    monkeypatch.setattr(pallas_stream, "PROGRAMS", 3)


@pytest.mark.parametrize(
    "name", ["retained", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in list(SMALL)[1:])]
)
def test_interpreted(name, small_tiles, capfd):
    setup = SMALL[name]
    a, (do, dlse) = rounded(make(setup), "bfloat16"), cotangents(setup)
    do = np.asarray(jnp.asarray(do, "bfloat16"))
    values, true_gradients = truth(setup, widened(a), do.astype(np.float32), dlse, setup.N**-0.5)
    operands = jax.tree.map(jnp.asarray, operands_of(setup, a))
    case = check_call(operands, setup.window, None, True)
    run = jax.jit(functools.partial(forward_and_backward, case, interpreted=True))
    o, lse, gradients = jax.block_until_ready(run(operands, jnp.asarray(do), jnp.asarray(dlse)))
    assert "RACE DETECTED" not in capfd.readouterr().out
    found = dict(zip(("q", "k", "v", "s", "ck", "cv"), gradients, strict=True))
    actual = jax.tree.map(np.asarray, (dict(o=o, lse=lse), {key: x for key, x in found.items() if x is not None}))
    compare(actual, (values, true_gradients), "bfloat16")


@pytest.mark.rotating
@pytest.mark.parametrize("size", [64, 128, 256])
def test_lowers_for_hopper(size):
    """Every kind of step in one call: window, retained keys, a cache's columns, documents."""
    spec = jax.ShapeDtypeStruct
    q, k = spec((2, 501, 4, size), jnp.bfloat16), spec((2, 701, 2, size), jnp.bfloat16)
    cached, places = spec((2, 77, 2, size), jnp.bfloat16), spec((2, 77, 2), jnp.int32)
    whole, rows = spec((2, 701, 2), jnp.int32), spec((2, 501, 4), jnp.float32)
    columns = Columns(cached, cached, places, places)
    operands = Operands(q, k, k, spec(whole.shape, jnp.float32), whole, columns, spec((2, 701), jnp.int32))
    case = check_call(operands, 70, None, True)
    hopper = AbstractDevice(device_kind="NVIDIA H200", platform="gpu", num_cores=132)
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=hopper)):
        traced = jax.jit(functools.partial(forward_and_backward, case)).trace(operands, q, rows)
        lowered = traced.lower(lowering_platforms=("cuda",)).as_text()
    gradients = 2 * (1 if pallas_dkv.TILES[size].together else 2)  # dk and dv, of the call's keys and of the list
    calls = 2 + 1 + 1 + gradients  # the gathers, forward, dq
    assert lowered.count("custom_call @mosaic_gpu") == calls


CASE = Case(1, 8, 8, 2, 1, 64, 64, 0, "bfloat16", 4, 0.125, False, False, False, False)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(dtype="float32"), "dtype='float32' is not one of bfloat16, float16"),
        (dict(N=320), "head sizes N=320, V=64 are above 256"),
        (dict(scale=-1.0), "needs a positive one"),
    ],
)
def test_other_cases_are_refused(change, words):
    pallas.check(CASE)
    with pytest.raises(UnsupportedCase, match=words):
        pallas.check(dataclasses.replace(CASE, **change))


@pytest.mark.parametrize(
    "change, passes, with_gradients",
    [
        ({}, "pallas", "triton"),
        (dict(expiry=True), "triton", "triton"),
        (dict(segment_ids=True), "triton", "triton"),
        (dict(window=None), "triton", "triton"),
        (dict(N=128, expiry=True), "pallas", "pallas"),
        (dict(V=72, C=5), "pallas", "pallas"),
        (dict(N=128, T=1023), "triton", "triton"),
    ],
)
def test_the_fastest_comes_first(change, passes, with_gradients):
    case = dataclasses.replace(CASE, **dict(T=1024, U=1024, N=64, V=64, window=99, C=0, expiry=False) | change)
    case = dataclasses.replace(case, segment_ids="segment_ids" in change, return_lse=False)
    assert api.fastest_order(case, False).fastest[0] == passes
    assert api.fastest_order(case, True).fastest[0] == with_gradients


def test_no_decode_step():
    with pytest.raises(UnsupportedCase, match="has no decode step"):
        pallas.check(StepCase(1, 2, 1, 64, 64, (8,), (True,), "bfloat16", 0.125))


def test_too_large_tiles_are_refused_before_a_launch(monkeypatch):
    monkeypatch.setitem(pallas_forward.TILES, 64, pallas_stream.Tiles(4, 128, 6))
    with pytest.raises(UnsupportedCase, match="bytes of shared memory"):
        pallas.check(CASE)
