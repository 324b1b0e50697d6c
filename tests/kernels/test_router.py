"""LTE's router against loops in float64: values, gradients, packed documents, padding, dropout."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dispatch import UnsupportedCase
from pallas_kernels.router import Convolution, Dropout, draw_seeds, dropout, router_scores
from tests.tolerances import assert_close

BATCH, HEADS, SIZE = 2, 3, 64
TOKENS = 37
IDS = {
    "one_document": None,
    "documents": [[1] * 5 + [2] + [3] * 20 + [9] * 11, [4] * 2 + [5] * 26 + [1] * 9],
    "all_padding": [[0] * 37, [0] * 36 + [1]],
    "padding": [[0] * 4 + [3] * 16 + [0] * 17, [1] * 3 + [0] * 2 + [2] * 32],
}
# Taps and dilations of each convolution, heads that own weights, method, dropout.
KINDS = {
    "paper": dict(taps=(3, 3, 3), dilations=(2, 2, 2)),
    "dropout": dict(taps=(3, 3, 3), dilations=(2, 2, 2), rate=0.3),
    "shared": dict(taps=(3, 3, 3), dilations=(2, 2, 2), shared=True),
    "relu": dict(taps=(3, 3, 3), dilations=(1, 2, 4), method="relu", shared=True),
    "taps": dict(taps=(5, 4, 1), dilations=(1, 2, 3), rate=0.1),
    "one": dict(taps=(7,), dilations=(3,), rate=0.2),
}


def make_inputs(kind="paper", tokens=TOKENS, dtype="float32", size=SIZE, seed=0):
    """(k, v, convolutions, weight, bias), and the cotangent of the scores; about half of them are positive."""
    random = np.random.default_rng([seed, tokens, size])
    draw = lambda *shape, std=1.0: jnp.asarray(random.normal(size=shape) * std, jnp.float32)  # noqa: E731
    settings, heads, channels, convolutions = KINDS[kind], HEADS, 2 * size, []
    if settings.get("shared"):
        heads = 1
    for taps in settings["taps"]:
        weight = draw(heads, taps, channels, channels // 2, std=(2 / (taps * channels)) ** 0.5)
        convolutions.append(Convolution(weight, draw(heads, channels // 2, std=0.1)))
        channels //= 2
    k, v = (draw(BATCH, tokens, HEADS, size).astype(dtype) for _ in range(2))
    arrays = k, v, tuple(convolutions), draw(heads, channels, std=(2 / channels) ** 0.5), draw(heads, std=0.1)
    return arrays, draw(BATCH, tokens, HEADS)


def options(kind="paper", ids=None, seed=3):
    settings = KINDS[kind]
    rate = settings.get("rate", 0.0)
    drop = Dropout(rate, draw_seeds(jax.random.key(seed), len(settings["taps"]))) if rate else None
    segment_ids = None if ids is None else jnp.asarray(ids, jnp.int32)
    method = settings.get("method", "sigmoid")
    return dict(dilations=settings["dilations"], method=method, segment_ids=segment_ids, dropout=drop)


def plain_keep(seeds, shape, channels, rate):
    """The rule of ``dropout.py``, in integers of 64 bits."""
    seeds, half, low = np.asarray(seeds, np.uint64), -(-channels // 2), np.uint64(2**32 - 1)
    i = np.arange(np.prod(shape) * half, dtype=np.uint64).reshape(*shape, half)
    x = (i * np.uint64(0x9E3779B1) + seeds[0]) & low
    x = ((x ^ (x >> np.uint64(16))) * np.uint64(0x85EBCA6B)) & low
    x = ((x ^ (x >> np.uint64(13)) ^ seeds[1]) * np.uint64(0xC2B2AE35)) & low
    x = x ^ (x >> np.uint64(16))
    halves = np.concatenate([x % 2**16, x // 2**16], axis=-1)[..., :channels]
    return halves >= round(rate * 2**16)


def truth(arrays, kind, ids):
    """The scores by loops over rows, taps and the tokens that a tap reads, in float64."""
    k, v, convolutions, weight, bias = jax.tree.map(lambda x: np.asarray(x, np.float64), arrays)
    settings, drop = KINDS[kind], options(kind)["dropout"]
    batch, tokens, heads, _ = k.shape
    ids = np.ones((batch, tokens), int) if ids is None else np.asarray(ids)
    x = np.concatenate([k, v], axis=-1)
    for layer, (conv, dilation) in enumerate(zip(convolutions, settings["dilations"], strict=True)):
        if drop is not None:
            kept = plain_keep(drop.seeds[layer], x.shape[:3], x.shape[3], drop.rate)
            x = np.where(kept, x, 0) / (1 - round(drop.rate * 2**16) / 2**16)
        y = np.zeros((batch, tokens, heads, conv.weight.shape[-1]))
        for b in range(batch):
            own = np.flatnonzero(ids[b])
            for tap in range(len(conv.weight[0])):
                s = own + tap * dilation - (len(conv.weight[0]) - 1) * dilation // 2
                inside = (s >= 0) & (s < tokens)
                t, s = own[inside], s[inside]
                t, s = t[ids[b, s] == ids[b, t]], s[ids[b, s] == ids[b, t]]
                y[b, t] += np.matmul(x[b, s][:, :, None], conv.weight[:, tap])[:, :, 0]
            y[b, own] += conv.bias
        x = y / (1 + np.exp(-y))
    z = np.sum(x * weight, axis=-1) + bias
    r = np.maximum(z, 0) if settings.get("method") == "relu" else 1 / (1 + np.exp(-z)) - 0.5
    return np.where((ids != 0)[..., None], r, 0)


@functools.partial(jax.jit, static_argnames=("kind", "implementation"))
def outputs_and_gradients(arrays, cotangent, ids, kind, implementation):
    run = lambda *arrays: router_scores(*arrays, **options(kind, ids), implementation=implementation)  # noqa: E731
    r, pullback = jax.vjp(run, *arrays)
    return r, pullback(cotangent)


def array_ids(ids):
    return None if ids is None else jnp.asarray(ids, jnp.int32)


@pytest.mark.rotating(5)
@pytest.mark.parametrize(
    ("kind", "ids"), [(kind, "padding") for kind in KINDS] + [("dropout", ids) for ids in IDS][:-1]
)
def test_values_and_gradients(implementation, kind, ids):
    """Gradients by differences of the loops along a random direction of each array."""
    dtype = "float32" if implementation == "xla" else "bfloat16"
    arrays, cotangent = make_inputs(kind, dtype=dtype)
    r, gradients = outputs_and_gradients(arrays, cotangent, array_ids(IDS[ids]), kind, implementation)
    assert_close(r, truth(arrays, kind, IDS[ids]), "router", dtype)
    if IDS[ids] is not None:
        padded = np.asarray(IDS[ids]) == 0
        assert not np.asarray(r)[padded].any() and not np.asarray(gradients[0])[padded].any()
    leaves, tree = jax.tree.flatten(jax.tree.map(lambda x: np.asarray(x, np.float64), arrays))
    random, step = np.random.default_rng(5), 1e-5
    for number, (leaf, gradient) in enumerate(zip(leaves, jax.tree.leaves(gradients), strict=True)):
        direction = random.normal(size=leaf.shape)
        moved = []
        for sign in (1, -1):
            changed = [*leaves[:number], leaf + sign * step * direction, *leaves[number + 1 :]]
            moved.append(truth(jax.tree.unflatten(tree, changed), kind, IDS[ids]))
        slope = np.sum((moved[0] - moved[1]) * np.asarray(cotangent, np.float64)) / (2 * step)
        found = np.sum(np.asarray(gradient, np.float64) * direction)
        scale = np.linalg.norm(np.asarray(gradient)) * np.linalg.norm(direction) / np.sqrt(leaf.size)
        assert abs(found - slope) <= (2e-5 if dtype == "float32" else 4e-2) * scale + 1e-9, (number, found, slope)


def reference(arrays, cotangent, ids, kind):
    """In float32, whatever the dtype of the inputs."""
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), arrays)
    with jax.default_matmul_precision("highest"):
        return outputs_and_gradients(wide, cotangent, ids, kind, "xla")


@pytest.mark.rotating(2)
@pytest.mark.parametrize(
    ("kind", "packed", "dtype"),
    [
        ("dropout", True, "bfloat16"),
        ("dropout", True, "float16"),
        ("dropout", False, "bfloat16"),
        ("shared", False, "bfloat16"),
        ("taps", True, "bfloat16"),
    ],
)
def test_edges_of_tiles(implementation, kind, packed, dtype):
    """More tokens than any tile, documents that end at its edges, 16 bits; gradients array by array."""
    tokens = 277
    ids = [[1] * 64 + [2] * 63 + [3] + [7] * 128 + [8] * 21, [0] * 65 + [1] * 127 + [2] * 64 + [0] * 21]
    arrays, cotangent = make_inputs(kind, tokens, dtype)
    ids = jnp.asarray(ids, jnp.int32) if packed else None
    found = outputs_and_gradients(arrays, cotangent, ids, kind, implementation)
    assert found[0].dtype == jnp.float32 and found[1][0].dtype == arrays[0].dtype
    expected = reference(arrays, cotangent, ids, kind)
    for number, pair in enumerate(zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)):
        assert_close(*pair, "router" if number == 0 else "router gradient", dtype)


@pytest.mark.rotating
@pytest.mark.parametrize("size", [128, 256])
def test_wide_heads(implementation, size):
    arrays, cotangent = make_inputs("dropout", 70, "bfloat16", size)
    if implementation == "triton" and size == 256:
        with pytest.raises(UnsupportedCase, match="head size=256"):
            outputs_and_gradients(arrays, cotangent, None, "dropout", implementation)
        return
    ids = jnp.asarray([[1] * 40 + [2] * 30, [3] * 66 + [0] * 4], jnp.int32)
    found = outputs_and_gradients(arrays, cotangent, ids, "dropout", implementation)
    expected = reference(arrays, cotangent, ids, "dropout")
    for number, pair in enumerate(zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)):
        assert_close(*pair, "router" if number == 0 else "router gradient", "bfloat16")


@pytest.mark.rotating
@pytest.mark.parametrize("tokens", [1, 5])
def test_rows_shorter_than_the_reach(implementation, tokens):
    arrays, cotangent = make_inputs("dropout", tokens, "bfloat16")
    found = outputs_and_gradients(arrays, cotangent, None, "dropout", implementation)
    assert_close(found[0], truth(arrays, "dropout", None), "router", "bfloat16")
    for pair in zip(*map(jax.tree.leaves, (found, reference(arrays, cotangent, None, "dropout"))), strict=True):
        assert_close(*pair, "router gradient", "bfloat16")


def test_padding_content_changes_no_bit_and_a_second_run_gives_the_same(implementation):
    arrays, cotangent = make_inputs("dropout", dtype="bfloat16")
    ids = array_ids(IDS["padding"])
    spoiled = [jnp.where((ids == 0)[..., None, None], jnp.asarray(np.nan, x.dtype), x) for x in arrays[:2]]
    first = outputs_and_gradients(arrays, cotangent, ids, "dropout", implementation)
    second = outputs_and_gradients((*spoiled, *arrays[2:]), cotangent, ids, "dropout", implementation)
    third = outputs_and_gradients(arrays, cotangent, ids, "dropout", implementation)
    for a, b, c in zip(*map(jax.tree.leaves, (first, second, third)), strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)


def test_documents_are_scored_as_if_alone(implementation):
    arrays, _ = make_inputs(dtype="bfloat16")
    run = functools.partial(router_scores, dilations=(2, 2, 2), implementation=implementation)
    packed = run(*arrays, segment_ids=array_ids(IDS["padding"]))
    alone = run(arrays[0][:, 4:20], arrays[1][:, 4:20], *arrays[2:])
    assert_close(packed[0, 4:20], alone[0], "router")


def test_vmap_equals_one_call_after_the_other(implementation):
    """Over everything, weights too, under the same dropout."""
    several = [make_inputs("dropout", dtype="bfloat16", seed=seed) for seed in range(2)]
    arrays, cotangents = jax.tree.map(lambda *x: jnp.stack(x), *several)
    ids = array_ids(IDS["padding"])
    run = functools.partial(outputs_and_gradients, kind="dropout", implementation=implementation)
    mapped = jax.vmap(run, in_axes=(0, 0, None))(arrays, cotangents, ids)
    for number, (one, cotangent) in enumerate(several):
        expected = run(one, cotangent, ids)
        for a, b in zip(jax.tree.leaves(mapped), jax.tree.leaves(expected), strict=True):
            assert_close(a[number], b, "router gradient", "bfloat16")


def test_the_rate_is_met_and_draws_are_independent():
    """Of 4 million channels each: between layers, keys, the two halves of a word, and neighbours of every kind."""
    shape, channels, rate = (2, 1000, 16), 128, 0.1
    seeds = [draw_seeds(jax.random.key(number), 3) for number in range(2)]
    draw = functools.partial(dropout.keep, shape=shape, channels=channels, threshold=dropout.threshold(rate))
    draws = [np.asarray(draw(one[layer], extent=shape[1:])) for one in seeds for layer in range(3)]
    count, spread = draws[0].size, np.sqrt(rate * (1 - rate))
    for kept in draws:
        assert abs(kept.mean() - (1 - rate)) < 5 * spread / np.sqrt(count)
        for axis in range(4):  # every row, token, head and channel by itself
            means = kept.mean(axis=tuple(a for a in range(4) if a != axis))
            assert np.abs(means - (1 - rate)).max() < 6 * spread / np.sqrt(count / means.size)
    centred = [(kept - (1 - rate)) / spread for kept in draws]
    first = centred[0]
    pairs = [(first, other) for other in centred[1:]]
    pairs += [(first[..., :64], first[..., 64:]), (first[:1], first[1:])]
    pairs += [(np.delete(first, -1, axis), np.delete(first, 0, axis)) for axis in (1, 2, 3)]
    pairs += [(first[:, :-lag], first[:, lag:]) for lag in (2, 4, 256)]
    for a, b in pairs:
        assert abs(np.mean(a * b)) < 5 / np.sqrt(a.size)
    triples = first[..., :62] * first[..., 1:63] * first[..., 2:64]
    assert abs(triples.mean()) < 5 / np.sqrt(triples.size)


def test_a_part_of_an_array_draws_what_the_whole_draws_there():
    whole = Dropout(0.3, draw_seeds(jax.random.key(1), 2))
    tokens, heads, channels = 11, 6, (10, 5)
    part = whole.at(*map(jnp.asarray, (2, 4, 3)), (tokens, heads), channels)
    for layer, count in enumerate(channels):
        all_of_it = dropout.keep(whole.seeds[layer], (5, tokens, heads), count, 2**14, (tokens, heads))
        here = dropout.keep(part.seeds[layer], (2, 7, 2), count, 2**14, part.extent)
        np.testing.assert_array_equal(here, all_of_it[2:4, 4:, 3:5])


def test_no_dropout_is_a_rate_of_zero(implementation):
    arrays, _ = make_inputs(dtype="bfloat16")
    run = functools.partial(router_scores, *arrays, dilations=(2, 2, 2), implementation=implementation)
    np.testing.assert_array_equal(run(), run(dropout=Dropout(0.0, draw_seeds(jax.random.key(0), 3))))


def zeros(*shape, dtype=jnp.float32):
    return jnp.zeros(shape, dtype)


CONVOLUTIONS = (Convolution(zeros(3, 3, 8, 4), zeros(3, 4)), Convolution(zeros(3, 3, 4, 2), zeros(3, 2)))
BAD = {
    "k_rank": (dict(k=zeros(2, 5, 12)), "k has shape"),
    "k_dtype": (dict(k=zeros(2, 5, 3, 4, dtype=jnp.int32)), "k has dtype int32"),
    "v_shape": (dict(v=zeros(2, 5, 3, 5)), "v has shape .* with N = 4"),
    "v_dtype": (dict(v=zeros(2, 5, 3, 4, dtype=jnp.bfloat16)), "v has dtype bfloat16"),
    "no_tokens": (dict(k=zeros(2, 0, 3, 4)), "k has shape .* with T at least 1"),
    "no_convolutions": (dict(convolutions=(), dilations=()), "0 convolutions"),
    "dilations": (dict(dilations=(2,)), "2 convolutions and 1 dilations"),
    "heads": (dict(weight=zeros(2, 2), bias=zeros(2)), "weights for 2 heads"),
    "conv_weight": (dict(convolutions=(CONVOLUTIONS[0], Convolution(zeros(3, 3, 5, 2), zeros(3, 2)))), "C_1 = 4"),
    "conv_bias": (dict(convolutions=(CONVOLUTIONS[0], Convolution(zeros(3, 3, 4, 2), zeros(1, 2)))), "heads = 3"),
    "no_centre": (dict(convolutions=(Convolution(zeros(3, 2, 8, 4), zeros(3, 4)),), dilations=(1,)), "no centre"),
    "weight": (dict(weight=zeros(3, 4)), "last map's weight"),
    "method": (dict(method="tanh"), "method='tanh'"),
    "segments_shape": (dict(segment_ids=jnp.ones((2, 6), jnp.int32)), "segment_ids has shape .* with T = 5"),
    "segments_dtype": (dict(segment_ids=jnp.ones((2, 5))), "segment_ids has dtype"),
    "seeds": (dict(dropout=Dropout(0.1, zeros(3, 2, dtype=jnp.uint32))), "seeds has shape .* with convolutions = 2"),
    "rate": (dict(dropout=Dropout(1.0, zeros(2, 2, dtype=jnp.uint32))), r"rate=1.0 must lie in \[0, 1\)"),
    "implementation": (dict(implementation="pallas"), "does not exist yet"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    changes, message = BAD[name]
    good = dict(
        k=zeros(2, 5, 3, 4), v=zeros(2, 5, 3, 4), convolutions=CONVOLUTIONS, weight=zeros(3, 2), bias=zeros(3),
        dilations=(2, 2),
    )  # fmt: skip
    router_scores(**good)
    with pytest.raises(UnsupportedCase, match=message):
        router_scores(**{**good, **changes})
