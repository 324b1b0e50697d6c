"""Block attention's Hopper kernel without a GPU: in Pallas's interpreter, and lowered for one.

The interpreter multiplies, copies and waits as the kernel says, and reports races; what only the hardware decides is
seen by the GPU tests of ``test_block_attention``.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from pallas_kernels.block_attention import api, pallas, pallas_long, pallas_select, triton
from pallas_kernels.block_attention.api import Case
from pallas_kernels.block_attention.blocks import Layout, plain_layout, row_layout, table_size
from pallas_kernels.dispatch import UnsupportedCase
from pallas_kernels.window_attention import pallas_forward, pallas_stream
from tests.kernels.test_block_attention import packed_segments
from tests.tolerances import assert_close

CASE = Case(1, 100, 100, 2, 1, 64, 64, "bfloat16", 16, 4, 0.125, False, False)


def expected(case: Case, q, pooled_k, pooled_v, layout: Layout):
    """(o, logsumexp in base 2, indices), token by token from the definition, in float64."""
    q, keys, values = (np.asarray(x, np.float64) for x in (q, pooled_k, pooled_v))
    S, M, G = case.block_size, case.block_counts, case.H // case.K
    o, lse = np.zeros((*q.shape[:3], case.V)), np.zeros(q.shape[:3])
    indices = np.full((*q.shape[:2], case.K, pallas_select.slots(case)), -1)
    for b, t in np.argwhere(np.asarray(layout.position) >= 0):
        position, base = int(layout.position[b, t]), int(layout.base[b, t])
        whole, own = (position + 1) // S, position // S
        for h in range(case.K):
            importance = np.zeros(own + 1)
            for head in range(h * G, h * G + G) if whole else ():
                logits = case.scale * keys[b, base : base + whole, h] @ q[b, t, head]
                weights = np.exp(logits - logits.max())
                o[b, t, head] = weights @ values[b, base : base + whole, h] / weights.sum()
                lse[b, t, head] = (logits.max() + np.log(weights.sum())) / np.log(2)
                importance[: min(whole, own)] += (weights / weights.sum())[: min(whole, own)]
            importance[[0, max(own - 1, 0), own]] = G
            # Equal keys have equal importance up to rounding, which must not decide.
            best = sorted(range(own + 1), key=lambda c: (-round(importance[c], 5), c))[:M]
            indices[b, t, h, : len(best)] = sorted(best)
    return o, lse, indices


def draw(case: Case, equal_keys: bool = False):
    rng = np.random.default_rng(3)
    C = table_size(case.U, case.block_size)
    shapes = (case.B, case.T, case.H, case.N), (case.B, C, case.K, case.N), (case.B, C, case.K, case.V)
    q, k, v = (jnp.asarray(rng.normal(size=shape), case.dtype) for shape in shapes)
    return q, jnp.ones_like(k) if equal_keys else k, v


def cached_layout(case: Case) -> Layout:
    """Row 0 ends at the last key, with padding to the left; row 1 stands in the middle, with padding to the right."""
    index = np.arange(case.T)
    rows = np.stack([np.where(index < 9, -1, case.U - case.T + index), np.where(index < 50, 40 + index, -1)])
    position, zero = jnp.asarray(rows, jnp.int32), jnp.zeros(rows.shape, jnp.int32)
    return Layout(zero, position, zero, jnp.zeros((case.B, 1), jnp.int32))


SETUPS = {
    "a tile and a half": (CASE, "plain"),
    "packed": (dataclasses.replace(CASE, B=2, T=133, U=133, K=2, N=40, block_counts=3, segment_ids=True), "packed"),
    "equal keys, blocks fill the columns": (dataclasses.replace(CASE, T=1000, U=1000, H=1, block_counts=5), "equal"),
    "no column for the last block": (dataclasses.replace(CASE, T=1030, U=1030, H=1), "plain"),
    "the same, one block": (dataclasses.replace(CASE, T=1030, U=1030, H=1, block_counts=1), "plain"),
    "cached": (dataclasses.replace(CASE, B=2, T=77, U=1100, V=33, cached=True), "cached"),
    "cached, many blocks": (dataclasses.replace(CASE, B=2, T=77, U=2200, cached=True), "cached"),
}


def pick_plainly(case: Case, importance, layout: Layout, first):
    """What ``triton_select.pick`` does, by sorting."""
    tokens, C = importance.shape[2:]
    t = jnp.minimum(first + jnp.arange(tokens), case.T - 1)
    base, position = layout.base[:, None, t], layout.position[:, None, t]
    own = jnp.where(position >= 0, position // case.block_size, -1)[..., None]
    number = jnp.arange(C + 1) - base[..., None]
    value = jnp.pad(importance, ((0, 0), (0, 0), (0, 0), (0, 1)))
    value = jnp.where((number == 0) | (number >= own - 1), case.H // case.K, value)
    value = jnp.where((number >= 0) & (number <= own), value, -1.0)
    best = jnp.argsort(-value, axis=-1, stable=True)[..., : pallas_select.slots(case)]
    taken = jnp.where(jnp.take_along_axis(value, best, -1) >= 0, best - base[..., None], pallas_select.NOTHING)
    ordered = jnp.sort(taken, axis=-1)
    return jnp.where(ordered < pallas_select.NOTHING, ordered, -1).transpose(0, 2, 1, 3)


def check_interpreted(select, name, capfd):
    case, kind = SETUPS[name]
    q, k, v = draw(case, "equal" in kind)
    layout = plain_layout(case.B, case.T, case.block_size)
    if kind == "packed":
        layout = row_layout(packed_segments(2, case.T, (50, 1, 20, 33), (2, 0, 7, 1)), case.block_size)
    if "cached" in kind:
        layout = cached_layout(case)
    run = jax.jit(lambda *a: select(case, *a, interpreted=True))
    o, lse, indices = jax.block_until_ready(run(q, k, v, layout))
    assert "RACE DETECTED" not in capfd.readouterr().out
    true_o, true_lse, true_indices = expected(case, q, k, v, layout)
    np.testing.assert_array_equal(indices, true_indices)
    assert_close(o, true_o, "block attention", case.dtype)
    assert_close(lse, true_lse, "block attention", case.dtype)


def some(names, always):
    return [n if n in always else pytest.param(n, marks=pytest.mark.exhaustive) for n in names]


@pytest.mark.parametrize("name", some(list(SETUPS)[:-1], ["packed"]))
def test_interpreted(name, capfd):
    check_interpreted(pallas_select.select, name, capfd)


@pytest.mark.parametrize("name", some(["a tile and a half", "packed", "cached, many blocks"], ["packed"]))
def test_parts_interpreted(name, capfd, monkeypatch):
    """The form for more blocks, in slices of a tile, with few warpgroups and buffers."""
    monkeypatch.setitem(pallas_forward.TILES, 64, pallas_stream.Tiles(2, 64, 2))
    monkeypatch.setattr(pallas_stream, "PROGRAMS", 3)
    monkeypatch.setattr(pallas_long, "SLICE_BYTES", 1)
    monkeypatch.setattr(pallas_long, "pick", pick_plainly)
    check_interpreted(pallas_long.select, name, capfd)


@pytest.mark.rotating
@pytest.mark.parametrize("group, size, tokens, dtype", [(16, 64, 4096, "bfloat16"), (1, 128, 8192, "float16")])
def test_lowers_for_hopper(group, size, tokens, dtype, monkeypatch):
    spec = jax.ShapeDtypeStruct
    case = Case(2, tokens, tokens, 2 * group, 2, size, size, dtype, 64, 16, 0.125, False, False)
    means = spec((2, tokens // 64, 2, size), dtype)
    hopper = AbstractDevice(device_kind="NVIDIA H200", platform="gpu", num_cores=132)
    monkeypatch.setattr(pallas_long, "pick", pick_plainly)
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=hopper)):
        for form, calls in (pallas_select, 1), (pallas_long, 2):
            run = jax.jit(lambda *a, form=form: form.select(case, *a, plain_layout(2, tokens, 64)))
            traced = run.trace(spec((2, tokens, 2 * group, size), dtype), means, means)
            lowered = traced.lower(lowering_platforms=("cuda",)).as_text()
            assert lowered.count("custom_call @mosaic_gpu") == calls


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(dtype="float32"), "dtype='float32' is not one of bfloat16, float16"),
        (dict(T=63), "T=63; implementation='pallas' needs at least 64 tokens"),
        (dict(scale=-1.0), "needs a positive one"),
        (dict(N=256), "head sizes N=256"),
        (dict(block_size=8), "block_size=8 is not one of"),
    ],
)
def test_other_cases_are_refused(change, words, monkeypatch):
    monkeypatch.setattr(triton, "check_installed", lambda _: None)
    pallas.check(CASE)
    with pytest.raises(UnsupportedCase, match=words):
        pallas.check(dataclasses.replace(CASE, **change))


@pytest.mark.parametrize(
    ("change", "first"),
    [
        (dict(B=1, T=8192), "pallas"),
        (dict(B=4, T=2048), "pallas"),
        (dict(B=1, T=4096, U=131072, cached=True), "triton"),
        (dict(B=1, T=2048), "triton"),
        (dict(B=16, T=1, U=65536, cached=True), "triton"),
    ],
)
def test_the_fastest_comes_first(change, first):
    assert api.fastest_order(dataclasses.replace(CASE, K=2, **change)).fastest[0] == first
