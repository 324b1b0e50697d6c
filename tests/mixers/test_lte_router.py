"""Does the router score a token from exactly the tokens, channels and heads that its definition names?"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lte_jax.mixers.lte_router import Router, reach

BATCH, TOKENS, HEADS, CHANNELS = 2, 29, 3, 8


def build(heads=HEADS, **changes):
    settings = dict(sizes=(3, 3, 3), dilations=(2, 2, 2), dropout=0.0, method="sigmoid")
    types = dict(dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    return Router(heads, CHANNELS, **{**settings, **changes}, **types)


def inputs(tokens=TOKENS, seed=0):
    return jax.random.normal(jax.random.key(seed), (BATCH, tokens, HEADS, CHANNELS))


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


@pytest.mark.parametrize(
    "changes", [{}, dict(method="relu"), dict(sizes=(5, 3), dilations=(1, 3)), dict(sizes=(1,), dilations=(1,))]
)
def test_scores_follow_the_definition(changes):
    router, x = build(**changes), inputs()
    np.testing.assert_allclose(router(x), plain_scores(router, x), atol=1e-6, rtol=1e-5)


def test_packed_documents_and_padding_are_scored_as_if_alone():
    router = build()
    x = inputs()
    lengths = (3, 11, 2, 4, 9)  # padding first and fourth
    segment_ids = jnp.asarray(np.repeat([0, 5, 2, 0, 3], lengths), jnp.int32)[None].repeat(BATCH, axis=0)
    scores = router(x, segment_ids)
    edges = np.cumsum((0, *lengths))
    for number, low, high in zip((0, 5, 2, 0, 3), edges[:-1], edges[1:], strict=True):
        expected = router(x[:, low:high]) if number else np.zeros((BATCH, high - low, HEADS))
        np.testing.assert_allclose(scores[:, low:high], expected, atol=1e-6)
    # An interior mask as the authors' code would apply it to one padded row.
    mask = np.arange(TOKENS) >= 7
    np.testing.assert_allclose(
        router(x, jnp.asarray(mask, jnp.int32)[None].repeat(BATCH, axis=0)), plain_scores(router, x, mask), atol=1e-6
    )


@pytest.mark.parametrize(
    "sizes, dilations, expected", [((3, 3, 3), (2, 2, 2), 6), ((5, 3), (1, 4), 6), ((3,), (4,), 4)]
)
def test_a_score_reads_its_reach_on_both_sides_and_no_other_head(sizes, dilations, expected):
    assert reach(sizes, dilations) == expected
    router, middle = build(sizes=sizes, dilations=dilations), TOKENS // 2
    gradient = jax.grad(lambda x: router(x)[0, middle, 1])(inputs())
    read = np.flatnonzero(np.abs(np.asarray(gradient[0, :, 1])).sum(axis=-1))
    assert (read.min(), read.max()) == (middle - expected, middle + expected)
    assert not np.asarray(gradient[1]).any() and not np.asarray(gradient[0, :, [0, 2]]).any()


def test_dropout_is_drawn_by_its_key_alone():
    router, x = build(dropout=0.3), inputs()
    first = router(x, None, jax.random.key(1))
    np.testing.assert_array_equal(first, router(x, None, jax.random.key(1)))
    assert bool(jnp.any(first != router(x, None, jax.random.key(2))))
    np.testing.assert_array_equal(router(x), build()(x))


def test_weights_start_kaiming_normal_and_the_last_bias_at_one_half():
    router = Router(
        16, 64, sizes=(3, 3), dilations=(1, 1), dropout=0.0, method="sigmoid",
        dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(5),
    )  # fmt: skip
    for conv, channels in zip(router.convs, (64, 32), strict=True):
        weight, bias = np.asarray(conv.weight[...]), np.asarray(conv.bias[...])
        assert weight.shape == (16, 3, channels, channels // 2)
        np.testing.assert_allclose(weight.std(), np.sqrt(2 / (3 * channels)), rtol=0.02)
        bound = 1 / np.sqrt(3 * channels)
        assert np.abs(bias).max() <= bound and bias.std() > 0.5 * bound
    np.testing.assert_array_equal(router.proj.bias[...], np.full(16, 0.5, np.float32))
    np.testing.assert_allclose(np.asarray(router.proj.weight[...]).std(), np.sqrt(2 / 16), rtol=0.15)
