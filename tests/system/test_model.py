"""The model as a whole: caches, masks, depth, policies, settings and what it refuses."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lte_jax import LTE, NSA, FullAttention, GatedDeltaNet, LanguageModel, ModelConfig, WindowAttention
from lte_jax.losses import training_loss
from lte_jax.remat import POLICIES
from tests.tolerances import assert_close, rms_error

GDN = GatedDeltaNet(num_heads=2, head_dim=8, expand_v=1)
RETAINING = LTE(num_heads=2, num_kv_heads=2, window=13, budget=6, sinks=2, dropout=0.2)
PATTERNS = {
    "lalte": (GDN, RETAINING),
    "lalte_shared": (GDN, dataclasses.replace(RETAINING, routing_shared="all")),
    "all others": (
        GDN,
        dataclasses.replace(RETAINING, retention="write_strength"),
        NSA(num_heads=4, num_kv_heads=2, head_dim=8, block_size=4, block_counts=3, window=5),
        WindowAttention(num_heads=2, num_kv_heads=1, window=9),
        FullAttention(num_heads=2, qk_norm=True),
    ),
    "transformer": (FullAttention(num_heads=2),),
}


def config(pattern: str = "lalte", **changes) -> ModelConfig:
    layers = 2 * len(PATTERNS[pattern])
    values = dict(vocab_size=40, width=16, num_layers=layers, pattern=PATTERNS[pattern], init_std=0.2, max_length=128)
    return ModelConfig(**{**values, **changes})


@functools.cache
def build(pattern: str = "lalte", seed: int = 0, **changes) -> LanguageModel:
    return LanguageModel(config(pattern, **changes), rngs=nnx.Rngs(seed))


def tokens(batch: int = 2, length: int = 50, seed: int = 1) -> np.ndarray:
    return np.asarray(jax.random.randint(jax.random.key(seed), (batch, length), 0, 40))


@pytest.mark.rotating
@pytest.mark.parametrize("pattern", ["lalte", "lalte_shared", "all others"])
def test_prompt_and_steps_equal_the_streaming_pass(pattern):
    model, ids = build(pattern), tokens()
    expected = model(ids, reading="streaming").logits
    cache = model.init_cache(2)
    pieces = []
    for start, stop in [(0, 31), (31, 44), *((i, i + 1) for i in range(44, 50))]:
        logits, cache = model.extend(ids[:, start:stop], cache, reading="streaming")
        pieces.append(logits)
    assert_close(jnp.concatenate(pieces, axis=1), expected, "model")
    assert cache.length.tolist() == [50, 50]


@pytest.mark.rotating
@pytest.mark.parametrize("pattern", ["lalte", "all others"])
def test_left_padding_is_invisible(pattern):
    model, ids = build(pattern), tokens(length=40)
    lengths = [40, 23]
    mask = np.stack([np.arange(40) >= 40 - n for n in lengths]).astype(np.int32)
    logits, cache = model.extend(ids, model.init_cache(2), mask)
    whole = model(ids, mask).logits
    step, _ = model.extend(ids[:, :1], cache, np.concatenate([mask, np.ones((2, 1), np.int32)], axis=1))
    assert_close(logits[0], whole[0], "model")
    row, n = 1, lengths[1]
    alone, alone_cache = model.extend(ids[row : row + 1, 40 - n :], model.init_cache(1))
    assert_close(logits[row, 40 - n :], alone[0], "model")
    assert_close(whole[row, 40 - n :], alone[0], "model")
    assert_close(step[row], model.extend(ids[row : row + 1, :1], alone_cache)[0][0], "model")


def test_caches_can_be_forked():
    model, ids = build(), tokens()
    _, cache = model.extend(ids[:, :31], model.init_cache(2), reading="streaming")
    before = jax.tree.map(np.asarray, cache)
    first, _ = model.extend(ids[:, 31:44], cache)
    model.extend(ids[:, 37:50], cache)
    jax.tree.map(np.testing.assert_array_equal, cache, before)
    again, _ = model.extend(ids[:, 31:44], jax.tree.map(jnp.copy, cache))
    np.testing.assert_array_equal(first, again)


def test_compilation_does_not_grow_with_depth():
    def program(layers: int) -> int:
        model = nnx.eval_shape(lambda: LanguageModel(config(num_layers=layers), rngs=nnx.Rngs(0)))
        graph, state = nnx.split(model)
        ids = jax.ShapeDtypeStruct((1, 24), jnp.int32)

        def loss(state, ids):
            return training_loss(nnx.merge(graph, state), ids)[0]

        return len(jax.jit(jax.grad(loss)).lower(state, ids).as_text())

    assert program(24) < 1.02 * program(4)


@functools.cache
def gradients_with(remat: str):
    graph, state = nnx.split(LanguageModel(config(), rngs=nnx.Rngs(0), remat=remat))
    ids = jnp.asarray(tokens(length=33), jnp.int32)

    @jax.jit
    @jax.grad
    def gradients(state):
        return training_loss(nnx.merge(graph, state), ids, jnp.full((2, 2), 0.1), key=jax.random.key(3))[0]

    return gradients(state)


@pytest.mark.rotating
@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "none"])
def test_remat_changes_no_gradient(policy):
    changed, plain = gradients_with(policy), gradients_with("none")
    for ours, expected in zip(jax.tree.leaves(changed), jax.tree.leaves(plain), strict=True):
        assert rms_error(ours, expected) < 1e-5


def test_dropout_needs_a_key_and_repeats_with_it():
    model, ids = build(), tokens()
    plain = model(ids, reading="train").logits
    np.testing.assert_array_equal(plain, model(ids, reading="train").logits)
    first = model(ids, reading="train", key=jax.random.key(0))
    np.testing.assert_array_equal(first.logits, model(ids, reading="train", key=jax.random.key(0)).logits)
    assert not np.array_equal(first.scores[1], model(ids, reading="train", key=jax.random.key(1)).scores[1])


def test_bfloat16_stays_near_float32():
    ids = tokens()
    exact = build().__call__(ids).logits
    rounded = LanguageModel(config(), rngs=nnx.Rngs(0), dtype=jnp.bfloat16)(ids).logits
    assert rounded.dtype == jnp.float32
    assert rms_error(rounded, exact) < 0.1


@pytest.mark.parametrize("pattern", PATTERNS)
def test_settings_survive_json(pattern):
    import json

    original = config(pattern)
    assert ModelConfig.from_dict(json.loads(json.dumps(original.to_dict()))) == original


def test_the_routing_is_keyed_by_layer():
    output = build()(tokens())
    assert sorted(output.scores) == sorted(output.selected) == [1, 3]
    assert output.scores[1].shape == (2, 50, 2) and output.scores[1].dtype == jnp.float32
    assert build("transformer")(tokens()).scores == {}


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(num_layers=3), "num_layers=3 is not a multiple"),
        (dict(vocab_size=0), "vocab_size=0 must be at least 1"),
        (dict(pattern=(dataclasses.replace(RETAINING, window=5),)), "window=5"),
        (dict(pattern=(dataclasses.replace(RETAINING, budget=2),)), "budget=2"),
        (dict(pattern=(dataclasses.replace(RETAINING, num_heads=3),)), "num_heads=3"),
        (dict(pattern=(dataclasses.replace(RETAINING, retention="write_strength"),)), "directly before"),
        (dict(pattern=(RETAINING, dataclasses.replace(RETAINING, num_kv_heads=1))), "the penalty needs one number"),
    ],
)
def test_impossible_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        LanguageModel(dataclasses.replace(config(), **changes), rngs=nnx.Rngs(0))


def test_unknown_settings_are_named():
    values = config().to_dict()
    with pytest.raises(ValueError, match="no setting depth"):
        ModelConfig.from_dict({**values, "depth": 3})
    with pytest.raises(ValueError, match="lte has no setting size"):
        ModelConfig.from_dict({**values, "pattern": [{**values["pattern"][1], "size": 3}]})
    with pytest.raises(ValueError, match="mixer='mamba' is not one of"):
        ModelConfig.from_dict({**values, "pattern": [{"mixer": "mamba"}]})


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: m(np.full((1, 4), 40)), r"token id 40 is outside the vocabulary \[0, 40\)"),
        (lambda m: m(np.full((1, 4), -1)), "token id -1 is outside"),
        (lambda m: m(np.zeros((1, 4), np.float32)), "dtype float32"),
        (lambda m: m(np.zeros(4, np.int32)), r"shape \(4,\)"),
        (lambda m: m(np.zeros((1, 0), np.int32)), "not empty"),
        (lambda m: m(tokens(1, 5), np.array([[1, 0, 1, 1, 1]])), "hole in row 0"),
        (lambda m: m(tokens(1, 5), np.array([[2, 1, 1, 1, 1]])), "values other than 0 and 1"),
        (lambda m: m(tokens(1, 5), np.ones((1, 4), np.int32)), "mask's shape"),
        (lambda m: m.extend(tokens(1, 9), m.init_cache(1, max_length=8)), "max_length=8"),
        (
            lambda m: m.extend(tokens(1, 5), m.extend(tokens(1, 3), m.init_cache(1))[1], reading="prompt"),
            "after 3 tokens",
        ),
        (
            lambda m: jax.jit(lambda c: m.extend(np.zeros((1, 5), np.int32), c)[0])(m.init_cache(1)),
            "inside jit",
        ),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(build("transformer"))
