"""Does LTE attend to what its definition says, in every reading, and from its cache?"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lte_jax.layers import InitRule, Recipe, document_positions, rotary
from lte_jax.mixers.lte import LTE, Config, make_router, needs_shared_router

WIDTH, TOKENS, BATCH = 16, 47, 2
PIECES = (23, 1, 23)  # a piece is longer than the window and the store together
SMALL = Config(num_heads=4, num_kv_heads=2, window=12, budget=5, sinks=2, dropout=0.0)


@functools.cache
def build(**changes):
    """An LTE layer whose router keeps about half of all tokens, as (graph, state)."""
    config = dataclasses.replace(SMALL, **changes)
    layer = LTE(config, WIDTH, Recipe(nnx.Rngs(1), InitRule(std=0.4)))
    if layer.router is not None:
        layer.router.proj.bias.set_value(jnp.zeros_like(layer.router.proj.bias[...]))
    return nnx.split(layer)


def layer_of(**changes):
    return nnx.merge(*build(**changes))


@functools.cache
def full(reading, **changes):
    graph, state = build(**changes)

    def run(x, segment_ids=None, select=None, state=state):
        positions = document_positions(jnp.ones(x.shape[:2], jnp.int32) if segment_ids is None else segment_ids)
        return nnx.merge(graph, state)(
            x, positions=positions, segment_ids=segment_ids, reading=reading, select=select, context=context_of(x)
        )

    return jax.jit(run)


@functools.cache
def extender(**changes):
    graph, state = build(**changes)

    @functools.partial(jax.jit, static_argnames="reading")
    def run(x, cache, segment_ids=None, reading="streaming"):
        return nnx.merge(graph, state).extend(x, cache, segment_ids=segment_ids, reading=reading, context=context_of(x))

    return run


def run_pieces(extend, x, pieces, cache):
    outputs, at = [], 0
    for size in pieces:
        y, cache, _ = extend(x[:, at : at + size], cache)
        outputs.append(y)
        at += size
    assert at == x.shape[1]
    return jnp.concatenate(outputs, axis=1), cache


def context_of(x):
    return {"write_strength": jnp.abs(x[..., 0])}


def inputs(tokens=TOKENS, seed=0):
    return jax.random.normal(jax.random.key(seed), (BATCH, tokens, WIDTH))


def positions_of(x):
    return jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])


def best(candidates, scores, budget, sinks):
    """The positions that stay: sinks first, then by score; equal scores by position."""
    order = sorted(candidates, key=lambda j: (j >= sinks, -scores[j] if j >= sinks else 0, j))
    return set(order[:budget])


def seen(config, scores, i, tokens, prompt):
    """What query i of one head sees, from the definition. ``prompt``: how many tokens were read as one prompt."""
    window = set(range(max(0, i - config.window), i + 1))
    end = prompt if i < prompt else i + 1
    gone = [j for j in range(max(0, end - config.window - 1)) if scores[j] > 0 or j < config.sinks]
    if prompt < 0:  # training: no budget
        return window | {j for j in range(i + 1) if scores[j] > 0 or j < config.sinks}
    return window | {j for j in best(gone, scores, config.budget, config.sinks) if j <= i}


def plain_attention(layer, x, scores, prompt):
    """The layer's output with a mask from ``seen``, one head and query after another in float64."""
    config = layer.config
    q, k, v = layer._project(x)
    q, k = (np.asarray(rotary(part, positions_of(x), config.rope_theta), np.float64) for part in (q, k))
    v, scores = np.asarray(v, np.float64), np.asarray(scores)
    out = np.zeros(q.shape)
    for b, i, h in np.ndindex(*q.shape[:3]):
        kv = h // (config.num_heads // config.kv_heads)
        keys = sorted(seen(config, scores[b, :, kv], i, x.shape[1], prompt))
        logits = k[b, keys, kv] @ q[b, i, h] * q.shape[-1] ** -0.5
        weights = np.exp(logits - logits.max())
        out[b, i, h] = weights @ v[b, keys, kv] / weights.sum()
    return out.reshape(*x.shape) @ np.asarray(layer.o_proj.weight[...], np.float64)


@pytest.mark.parametrize("reading, prompt", [("train", -1), ("prompt", TOKENS), ("streaming", 0)])
def test_every_query_sees_what_the_definition_says(reading, prompt):
    x = inputs()
    y, aux = full(reading)(x)
    kept = np.asarray(aux["scores"] > 0).mean()
    assert 0.3 < kept < 0.9, "the case must keep some and drop some"
    np.testing.assert_allclose(y, plain_attention(layer_of(), x, aux["scores"], prompt), atol=2e-6, rtol=1e-5)


def test_selected_is_what_stays_at_the_end():
    x = inputs()
    for reading in ("prompt", "streaming"):
        aux = full(reading)(x)[1]
        scores, selected = np.asarray(aux["scores"]), np.asarray(aux["selected"])
        for b, h in np.ndindex(BATCH, 2):
            row = scores[b, :, h]
            gone = [j for j in range(TOKENS - 13) if row[j] > 0 or j < 2]
            window = {j for j in range(TOKENS - 13, TOKENS) if row[j] > 0}
            assert set(np.flatnonzero(selected[b, :, h])) == best(gone, row, 5, 2) | window
    aux = full("train")(x)[1]
    np.testing.assert_array_equal(aux["selected"], (aux["scores"] > 0) | (positions_of(x) < 2)[..., None])


@pytest.mark.rotating
@pytest.mark.parametrize("prompt, pieces", [(29, (1, 1, 1, 9, 1, 1, 1, 1, 1, 1)), (8, (1, 9, 9, 1, 1, 9, 9))])
def test_a_prompt_read_whole_then_steps_and_pieces(prompt, pieces):
    """The store starts from the end of the prompt (empty for one shorter than W+1), then changes token by token."""
    x = inputs()
    scores = full("train")(x)[1]["scores"]
    # Near the prompt's end the call's scores are provisional and differ from the full pass's; none of those tokens can
    # have left the window.
    expected = plain_attention(layer_of(), x, scores, prompt)
    extend = extender()
    cache = layer_of().init_cache(BATCH, None, jnp.float32)
    y, cache, aux = extend(x[:, :prompt], cache, reading="prompt")
    whole, whole_aux = full("prompt")(x[:, :prompt])
    np.testing.assert_allclose(y, whole, atol=2e-6)
    np.testing.assert_array_equal(aux["selected"], whole_aux["selected"])
    rest, _ = run_pieces(extend, x[:, prompt:], pieces, cache)
    np.testing.assert_allclose(jnp.concatenate([y, rest], axis=1), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.rotating
@pytest.mark.parametrize(
    "rule, splits", [("learned", (PIECES, (TOKENS,))), ("recency", (PIECES,)), ("write_strength", (PIECES,))]
)
def test_any_split_gives_the_streaming_pass_and_the_same_cache(rule, splits):
    x = inputs()
    empty = layer_of(retention=rule).init_cache(BATCH, None, jnp.float32)
    extend = extender(retention=rule)
    y, steps = run_pieces(extend, x, (1,) * TOKENS, empty)
    np.testing.assert_allclose(y, full("streaming", retention=rule)(x)[0], atol=2e-6, rtol=1e-5)
    # Weights drawn once, float32: k and v of a longer piece may differ in the last bit, what is kept may not.
    for pieces in splits:
        other_y, other = run_pieces(extend, x, pieces, empty)
        np.testing.assert_allclose(other_y, y, atol=2e-6, rtol=1e-5)
        np.testing.assert_array_equal(other.store.position, steps.store.position)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6, rtol=1e-5), other, steps)


@pytest.mark.parametrize("rule", ["recency", "random", "write_strength"])
def test_other_rules_keep_the_best_by_their_own_score(rule):
    x = inputs()
    empty = layer_of(retention=rule).init_cache(BATCH, None, jnp.float32)
    _, cache = run_pieces(extender(retention=rule), x, PIECES, empty)
    kept = np.sort(cache.store.position, axis=1)
    last = TOKENS - 13  # the first position of the window
    for b, h in np.ndindex(BATCH, 2):
        if rule == "recency":
            expected = {0, 1, last - 3, last - 2, last - 1}
        elif rule == "write_strength":
            expected = best(range(last), np.abs(np.asarray(x[b, :, 0])), 5, 2)
        else:
            assert set(kept[b, :2, h]) == {0, 1} and kept[b, :, h].max() < last
            np.testing.assert_array_equal(kept[b, :, h], kept[0, :, h])
            continue
        assert set(kept[b, :, h]) == expected
    if rule == "random":
        assert set(kept[0, :, 0]) != set(kept[0, :, 1]), "heads draw samples of their own"
    assert layer_of(retention=rule).router is None
    aux = full("train", retention=rule)(x)[1]
    assert not np.asarray(aux["scores"]).any() and np.asarray(aux["selected"]).sum(axis=1).max() == 13 + 5


def test_padding_in_a_piece_leaves_cache_and_output_alone():
    x = inputs(20, seed=3)
    extend, empty = extender(), layer_of().init_cache(BATCH, None, jnp.float32)
    y, expected, _ = extend(x, empty)
    noise = 9 * inputs(TOKENS, seed=4)
    for at in (0, 11, TOKENS - 20):
        mask = jnp.zeros((BATCH, TOKENS), jnp.int32).at[:, at : at + 20].set(1)
        padded = jnp.where(mask[..., None] != 0, jnp.roll(jnp.pad(x, ((0, 0), (0, 27), (0, 0))), at, axis=1), noise)
        padded_y, cache, aux = extend(padded, empty, mask)
        np.testing.assert_allclose(padded_y[:, at : at + 20], y, atol=2e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), cache, expected)
        assert not np.asarray(aux["selected"])[np.asarray(mask) == 0].any()
    # One row goes on, the other is padding alone: by a step and by a piece.
    for size in (1, TOKENS):
        mask = jnp.zeros((BATCH, size), jnp.int32).at[1].set(1)
        _, after, _ = extend(noise[:, :size], expected, mask)
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b[0]), after, expected)
        assert after.length.tolist() == [20, 20 + size]


def test_the_cache_is_as_large_as_its_formula_and_can_be_stored_in_bfloat16():
    layer = layer_of()
    for dtype in (jnp.float32, jnp.bfloat16):
        cache = layer.init_cache(3, None, dtype)
        assert sum(leaf.nbytes for leaf in jax.tree.leaves(cache)) == layer.cache_bytes(3, None, dtype)
        assert all(leaf.shape[0] == 3 for leaf in jax.tree.leaves(cache))
    x = inputs()
    empty = layer.init_cache(BATCH, None, jnp.bfloat16)
    y, cache = run_pieces(extender(), x, PIECES, empty)
    steps_y, steps = run_pieces(extender(), x, (1,) * TOKENS, empty)
    np.testing.assert_allclose(steps_y, y, atol=2e-6, rtol=1e-5)
    np.testing.assert_array_equal(steps.store.position, cache.store.position)


def test_the_store_s_positions_are_those_that_a_query_sees():
    x = inputs()
    _, cache, aux = extender()(x, layer_of().init_cache(BATCH, None, jnp.float32))
    kept, selected = np.sort(cache.store.position, axis=1), np.asarray(aux["selected"])
    for b, h in np.ndindex(BATCH, 2):
        np.testing.assert_array_equal(kept[b, kept[b, :, h] >= 0, h], np.flatnonzero(selected[b, : TOKENS - 13, h]))


def test_the_score_s_gradient_is_dv_times_v():
    """dr_j = sum_n dv_jn v_jn, whether or not j is kept: checked against the gradient of a probe added to v."""
    x, layer = inputs(), layer_of(routing_grad=False)
    cotangent = jax.random.normal(jax.random.key(7), x.shape)

    def with_probes(score_probe, value_probe):
        probed = nnx.merge(*build(routing_grad=False))
        inner_router, project = probed.router, probed._project

        def values(x):
            q, k, v = project(x)
            return q, k, v + value_probe

        object.__setattr__(probed, "_project", values)
        object.__setattr__(probed, "_router", lambda _: lambda *args: inner_router(*args) + score_probe)
        return jnp.sum(probed(x, positions=positions_of(x))[0] * cotangent)

    _, _, v = layer._project(x)
    zero = jnp.zeros((*v.shape[:3],))
    d_score, d_value = jax.jit(jax.grad(with_probes, argnums=(0, 1)))(zero, jnp.zeros_like(v))
    expected = jnp.sum(d_value * v, axis=-1)
    assert float(jnp.abs(expected).min()) > 0
    np.testing.assert_allclose(d_score, expected, rtol=1e-4, atol=1e-6)


def test_warm_up_keeps_everything_and_cuts_the_router_off_k_and_v():
    x = inputs()
    state = build()[1]

    def gradient(select, **changes):
        run = full("train", **changes)
        return jax.grad(lambda state: jnp.sum(run(x, None, select, state)[1]["scores"] ** 2))(state)

    y, aux = full("train")(x, None, jnp.asarray(False))
    assert np.asarray(aux["selected"]).all()
    everything = plain_attention(layer_of(), x, jnp.ones((BATCH, TOKENS, 2)), -1)
    np.testing.assert_allclose(y, everything, atol=2e-6, rtol=1e-5)
    np.testing.assert_array_equal(full("train")(x, None, jnp.asarray(True))[0], full("train")(x)[0])
    for cut, grads in (
        (False, gradient(jnp.asarray(True))),
        (True, gradient(jnp.asarray(False))),
        (True, gradient(None, routing_grad=False)),
    ):
        assert bool(jnp.any(grads["k_proj"]["weight"][...] != 0)) is not cut
        assert bool(jnp.any(grads["v_proj"]["weight"][...] != 0)) is not cut
        assert bool(jnp.any(grads["router"]["convs"][0]["weight"][...] != 0))


@pytest.mark.rotating
@pytest.mark.parametrize("shared", ["layer", "all"])
def test_a_shared_router_scores_each_head_with_the_same_weights(shared):
    config = dataclasses.replace(SMALL, routing_shared=shared)
    layer, x = layer_of(routing_shared=shared), inputs(21)
    router = None
    if shared == "all":
        assert needs_shared_router(config) and layer.router is None
        with pytest.raises(ValueError, match="pass router="):
            layer(x, positions=positions_of(x))
        router = make_router(config, WIDTH, Recipe(nnx.Rngs(4)))
    else:
        assert not needs_shared_router(config)
        with pytest.raises(ValueError, match="pass no router"):
            layer(x, positions=positions_of(x), router=layer.router)
    scores = jax.jit(lambda x: layer(x, positions=positions_of(x), router=router))(x)[1]["scores"]
    _, k, v = layer._project(x)
    own = jax.jit(router or layer.router)(k[:, :, :1], v[:, :, :1])
    np.testing.assert_allclose(scores[..., :1], own, atol=1e-6)
    if shared == "layer":
        return
    cache = layer.init_cache(BATCH, None, jnp.float32)
    extend = jax.jit(lambda x, cache: layer.extend(x, cache, router=router))
    y, cache = run_pieces(extend, x, (20, 1), cache)
    full_pass = jax.jit(lambda x: layer(x, positions=positions_of(x), router=router, reading="streaming")[0])
    np.testing.assert_allclose(y, full_pass(x), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(window=11), "window=11 is shorter than the router's reach on both sides, 12"),
        (dict(budget=2), "budget=2 must be greater than sinks=2"),
        (dict(num_heads=3), "width 16 is not a multiple of num_heads=3"),
        (dict(num_heads=16), "head size 1 is odd"),
        (dict(num_kv_heads=3), "num_heads=4 is not a multiple of num_kv_heads=3"),
        (dict(num_heads=0), "num_heads=0 must be at least 1"),
        (dict(num_kv_heads=0), "num_kv_heads=0 must be at least 1"),
        (dict(rope_theta=0.0), "rope_theta=0.0 must be above 0"),
        (dict(sinks=-1), "sinks=-1 must be at least 0"),
        (dict(routing_method="tanh"), "routing_method='tanh' is not one of sigmoid, relu"),
        (dict(routing_shared="none"), "routing_shared='none' is not one of head, layer, all"),
        (dict(retention="oldest"), "retention='oldest' is not one of learned, recency"),
        (dict(dropout=1.0), "dropout=1.0 must be in"),
        (dict(conv_sizes=(3, 3)), "must have the same, non-zero length"),
        (dict(conv_sizes=(3, 3, 0)), "must all be at least 1"),
        (dict(conv_sizes=(3, 2, 3), conv_dilations=(2, 1, 2)), "has no centre"),
        (dict(conv_sizes=(3,) * 4, conv_dilations=(1,) * 4), "are too many"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ValueError, match="lte: .*" + message.replace("(", r"\(")):
        dataclasses.replace(SMALL, **changes).validate(WIDTH)


def test_calls_that_cannot_work_are_refused():
    x = inputs(5)
    with pytest.raises(ValueError, match="reading='fast' is not one of train, prompt, streaming"):
        layer_of()(x, positions=positions_of(x), reading="fast")
    cache = layer_of().init_cache(BATCH, None, jnp.float32)
    with pytest.raises(ValueError, match="reading='train' is not one of prompt, streaming"):
        layer_of().extend(x, cache, reading="train")
    with pytest.raises(ValueError, match=r"needs context\['write_strength'\]"):
        layer_of(retention="write_strength")(x, positions=positions_of(x))
