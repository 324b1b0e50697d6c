"""Does the router score a token from exactly the tokens, channels and heads that its definition names?"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lte_jax import sharding
from lte_jax.layers import Recipe
from lte_jax.mixers.lte_router import Router, reach
from pallas_kernels.dispatch import lowering_for_gpu

BATCH, TOKENS, HEADS, CHANNELS = 2, 29, 3, 8


def build(heads=HEADS, **changes):
    settings = dict(sizes=(3, 3, 3), dilations=(2, 2, 2), dropout=0.0, method="sigmoid")
    return Router(heads, CHANNELS, Recipe(nnx.Rngs(0)), **{**settings, **changes})


def inputs(tokens=TOKENS, seed=0):
    return jax.random.normal(jax.random.key(seed), (BATCH, tokens, HEADS, CHANNELS))


def scores(router, x, segment_ids=None, key=None, implementation=None):
    """Of keys and values side by side."""
    return _scores(*nnx.split(router), x, segment_ids, key, implementation)


@functools.partial(jax.jit, static_argnames=("graph", "implementation"))
def _scores(graph, state, x, segment_ids, key, implementation):
    return nnx.merge(graph, state)(*jnp.split(x, 2, axis=-1), segment_ids, key, implementation)


def plain_scores(router, x, mask=None):
    """The same for one head after another, tap by tap, in float64; ``mask`` [T] bool of one document."""
    x = np.asarray(x, np.float64)
    mask = np.ones(x.shape[1], bool) if mask is None else np.asarray(mask)
    out = np.zeros(x.shape[:3])
    for h in range(x.shape[2]):
        y = np.where(mask[:, None], x[:, :, h], 0)
        for conv in router.convs:
            weight, bias = np.asarray(conv.weight[...][h], np.float64), np.asarray(conv.bias[...][h], np.float64)
            z = np.zeros((*y.shape[:2], weight.shape[-1]))
            for t in range(y.shape[1]):
                for tap in range(weight.shape[0]):
                    source = t + (tap - weight.shape[0] // 2) * conv.dilation
                    if 0 <= source < y.shape[1]:
                        z[:, t] += y[:, source] @ weight[tap]
            z = np.where(mask[:, None], z + bias, 0)
            y = z / (1 + np.exp(-z))
        z = y @ np.asarray(router.proj.weight[...][h], np.float64) + float(router.proj.bias[...][h])
        out[:, :, h] = np.maximum(z, 0) if router.method == "relu" else 1 / (1 + np.exp(-z)) - 0.5
    return np.where(mask[:, None], out, 0)


@pytest.mark.rotating(2)
@pytest.mark.parametrize(
    "changes", [{}, dict(method="relu"), dict(sizes=(5, 3), dilations=(1, 3)), dict(sizes=(1,), dilations=(1,))]
)
def test_scores_follow_the_definition(changes):
    router, x = build(**changes), inputs()
    np.testing.assert_allclose(scores(router, x), plain_scores(router, x), atol=1e-6, rtol=1e-5)


def test_packed_documents_and_padding_are_scored_as_if_alone():
    router = build()
    x = inputs()
    lengths = (3, 9, 2, 6, 9)  # padding first and fourth; one shape for two of them
    segment_ids = jnp.asarray(np.repeat([0, 5, 2, 0, 3], lengths), jnp.int32)[None].repeat(BATCH, axis=0)
    found = scores(router, x, segment_ids)
    edges = np.cumsum((0, *lengths))
    for number, low, high in zip((0, 5, 2, 0, 3), edges[:-1], edges[1:], strict=True):
        expected = scores(router, x[:, low:high]) if number else np.zeros((BATCH, high - low, HEADS))
        np.testing.assert_allclose(found[:, low:high], expected, atol=1e-6)
    # An interior mask as the authors' code would apply it to one padded row.
    mask = np.arange(TOKENS) >= 7
    np.testing.assert_allclose(
        scores(router, x, jnp.asarray(mask, jnp.int32)[None].repeat(BATCH, axis=0)),
        plain_scores(router, x, mask),
        atol=1e-6,
    )


@pytest.mark.parametrize(
    "sizes, dilations, expected", [((3, 3, 3), (2, 2, 2), 6), ((5, 3), (1, 4), 6), ((3,), (4,), 4)]
)
def test_a_score_reads_its_reach_on_both_sides_and_no_other_head(sizes, dilations, expected):
    assert reach(sizes, dilations) == expected
    router, middle = build(sizes=sizes, dilations=dilations), TOKENS // 2
    gradient = np.asarray(jax.jit(jax.grad(lambda x: scores(router, x)[0, middle, 1]))(inputs()))
    read = np.flatnonzero(np.abs(gradient[0, :, 1]).sum(axis=-1))
    assert (read.min(), read.max()) == (middle - expected, middle + expected)
    assert not gradient[1].any() and not gradient[0, :, [0, 2]].any()


def test_dropout_is_drawn_by_its_key_alone():
    router, x = build(dropout=0.3), inputs()
    first = scores(router, x, None, jax.random.key(1))
    np.testing.assert_array_equal(first, scores(router, x, None, jax.random.key(1)))
    assert bool(jnp.any(first != scores(router, x, None, jax.random.key(2))))
    np.testing.assert_array_equal(scores(router, x), scores(build(), x))


@pytest.mark.rotating
@pytest.mark.parametrize(
    "mesh", [dict(tensor=2, sequence=2), dict(fsdp=2, sequence=4), dict(tensor=8), dict(sequence=8)]
)
def test_no_mesh_changes_a_score_a_gradient_or_what_is_dropped(mesh):
    """Documents and padding across the shards of tokens, which on ``sequence=8`` are shorter than the reach."""
    tokens, heads = 40, 4
    router = build(heads, dropout=0.4)
    k, v = jax.random.normal(jax.random.key(0), (2, 2, tokens, heads, CHANNELS // 2))
    direction = jax.random.normal(jax.random.key(1), (2, tokens, heads))
    ids = jnp.asarray(np.repeat([[1, 2, 0], [0, 3, 5]], [3, 20, 17], axis=1), jnp.int32)
    graph, state = nnx.split(router)

    def loss(state, k, v, ids):
        r = nnx.merge(graph, state)(k, v, ids, jax.random.key(5))
        return jnp.sum(r * direction), r

    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))

    def on_mesh(*arrays):
        with sharding.on(devices):
            return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(*arrays)

    devices = sharding.make_mesh(sharding.MeshConfig(**mesh))
    for segment_ids in (ids, None):
        expected = gradient(state, k, v, segment_ids)
        placed = jax.device_put((state, k, v, segment_ids), sharding.replicated(devices))
        found = jax.jit(on_mesh)(*placed)
        for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
            np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-5)


def test_sizes_that_the_kernels_do_not_do_are_left_to_xla():
    router, x = build(), inputs()
    with lowering_for_gpu():
        found = scores(router, x, None, None, "triton")
    np.testing.assert_array_equal(found, scores(router, x, None, None, "xla"))


def test_weights_start_kaiming_normal_and_the_last_bias_at_one_half():
    recipe = Recipe(nnx.Rngs(5))
    router = Router(16, 64, recipe, sizes=(3, 3), dilations=(1, 1), dropout=0.0, method="sigmoid")
    for conv, channels in zip(router.convs, (64, 32), strict=True):
        weight, bias = np.asarray(conv.weight[...]), np.asarray(conv.bias[...])
        assert weight.shape == (16, 3, channels, channels // 2)
        np.testing.assert_allclose(weight.std(), np.sqrt(2 / (3 * channels)), rtol=0.02)
        bound = 1 / np.sqrt(3 * channels)
        assert np.abs(bias).max() <= bound and bias.std() > 0.5 * bound
    np.testing.assert_array_equal(router.proj.bias[...], np.full(16, 0.5, np.float32))
    np.testing.assert_allclose(np.asarray(router.proj.weight[...]).std(), np.sqrt(2 / 16), rtol=0.15)
