"""What every registered mixer promises (lte_jax/mixers/base.py), at lengths that wrap every buffer."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lte_jax.layers import InitRule, Recipe, document_positions
from lte_jax.mixers import MIXERS, mixer_module
from tests.tolerances import assert_close, rms_error

WIDTH = 24
LENGTH = 61  # a prime, longer than twice every window below
SMALL = {
    "gated_deltanet": dict(num_heads=2, head_dim=6, num_v_heads=4, expand_v=1.5, conv_size=4),
    "window_attention": dict(num_heads=4, num_kv_heads=2, window=7),
    "full_attention": dict(num_heads=4, num_kv_heads=2),
    "lte": dict(num_heads=4, num_kv_heads=2, window=13, budget=5, sinks=2, dropout=0.0),
    "nsa": dict(num_heads=4, num_kv_heads=2, head_dim=6, block_size=4, block_counts=3, window=5),
}
# Only LTE reads a sequence in more than one way; the others' programs do not mention the reading.
READINGS = [
    (name, reading) for name in SMALL for reading in ("train", "prompt", "streaming")[: 3 if name == "lte" else 1]
]


def test_every_registered_mixer_is_here():
    assert set(SMALL) == set(MIXERS)


@functools.cache
def build(name: str, dtype=jnp.float32, **changes):
    config = MIXERS[name][0](**{**SMALL[name], **changes})
    recipe = Recipe(nnx.Rngs(3), InitRule(std=0.3), dtype, max_length=LENGTH + 3)
    module = mixer_module(config)(config, WIDTH, recipe)
    if name == "lte":  # the bias that starts with everything kept would leave nothing to evict
        module.router = _undecided(module.router)
    return nnx.split(module)


def _undecided(router):
    for path, variable in nnx.to_flat_state(nnx.state(router)):
        if "bias" in path:
            variable.set_value(jnp.zeros_like(variable.get_value()))
    return router


@functools.cache
def whole(name: str, reading: str, **changes):
    graph, _ = build(name, **changes)

    @jax.jit
    def run(state, x, segment_ids):
        positions = document_positions(jnp.ones(x.shape[:2], jnp.int32) if segment_ids is None else segment_ids)
        return nnx.merge(graph, state)(x, positions=positions, segment_ids=segment_ids, reading=reading)[0]

    return lambda x, segment_ids=None: run(build(name, **changes)[1], x, segment_ids)


@functools.cache
def extender(name: str):
    graph, state = build(name)

    @functools.partial(jax.jit, static_argnames="reading")
    def run(x, cache, segment_ids, reading):
        return nnx.merge(graph, state).extend(x, cache, segment_ids=segment_ids, reading=reading)[:2]

    def extend(x, cache, segment_ids=None, reading="streaming"):
        return run(x, cache, segment_ids, reading)

    return nnx.merge(graph, state), extend


def inputs(batch: int = 2, length: int = LENGTH, seed: int = 0):
    return jax.random.normal(jax.random.key(seed), (batch, length, WIDTH))


@pytest.mark.rotating(3)
@pytest.mark.parametrize("name, reading", [pair for pair in READINGS if pair[1] != "prompt"])
def test_no_output_depends_on_a_later_token(name, reading):
    changes = {"routing_grad": False} if name == "lte" else {}  # the score's gradient is no derivative of the output
    run = whole(name, reading, **changes)
    x = inputs()
    for cut in (1, 17, 40):
        later = (np.arange(LENGTH) >= cut)[:, None]
        cotangent = np.where(later, 0, jax.random.normal(jax.random.key(1), x.shape))
        gradient = np.asarray(jax.vjp(run, x)[1](cotangent)[0])
        np.testing.assert_array_equal(gradient[:, cut:], 0)
        assert (gradient[:, :cut] != 0).any(axis=-1).all()
        changed = run(np.where(later, -2, 1).astype(np.float32) * x)
        assert_close(changed[:, :cut], run(x)[:, :cut], "mixer")


@pytest.mark.rotating(10)
@pytest.mark.parametrize("pieces", [(1,) * LENGTH, (LENGTH,), (30, 1, 1, 29), (5, 50, 6), (16, 16, 16, 13)], ids=str)
@pytest.mark.parametrize("name", MIXERS)
def test_any_split_gives_the_full_pass(name, pieces):
    x = inputs()
    module, extend = extender(name)
    cache = module.init_cache(2, None if not module.needs_max_length else LENGTH, jnp.float32)
    outputs, start = [], 0
    for size in pieces:
        y, cache = extend(x[:, start : start + size], cache)
        outputs.append(y)
        start += size
    assert_close(jnp.concatenate(outputs, axis=1), whole(name, "streaming" if name == "lte" else "train")(x), "mixer")


@pytest.mark.rotating(3)
@pytest.mark.parametrize("name, reading", READINGS)
def test_packed_documents_equal_the_documents_alone(name, reading):
    lengths, gap = (27, 1, 27), 3  # one shape for two of them
    ids = np.zeros(LENGTH, np.int32)
    starts = (2, 2 + lengths[0], 2 + lengths[0] + lengths[1] + gap)  # padding before, between and after
    for number, (start, length) in enumerate(zip(starts, lengths, strict=True), 1):
        ids[start : start + length] = number
    x = inputs(batch=1)
    run = whole(name, reading)
    cotangent = jax.random.normal(jax.random.key(2), x.shape) * jnp.asarray(ids != 0, jnp.float32)[None, :, None]
    y, pullback = jax.vjp(lambda x: run(x, jnp.asarray(ids)[None]), x)
    gradient = pullback(cotangent)[0]
    np.testing.assert_array_equal(gradient[:, ids == 0], 0)
    for start, length in zip(starts, lengths, strict=True):
        part = slice(start, start + length)
        alone, pullback = jax.vjp(run, x[:, part])
        assert_close(y[:, part], alone, "mixer")
        assert_close(gradient[:, part], pullback(cotangent[:, part])[0], "mixer")


@pytest.mark.rotating(5)
@pytest.mark.parametrize("left, right", [(11, 0), (0, 11), (9, 2)])
@pytest.mark.parametrize("name", MIXERS)
def test_padding_changes_no_value_and_no_cache(name, left, right):
    x, more = inputs(length=29), inputs(length=29, seed=5)  # as long: the same programs read both
    around = ((0, 0), (left, right), (0, 0))
    padded, more_padded = (np.pad(part, around, constant_values=7.0) for part in (x, more))
    mask = np.pad(np.ones(x.shape[:2], np.int32), around[:2])
    for reading in (reading for mixer, reading in READINGS if mixer == name):
        y = whole(name, reading)(padded, mask)
        assert_close(y[:, left : left + 29], whole(name, reading)(x), "mixer")
    module, extend = extender(name)
    empty = module.init_cache(2, LENGTH, jnp.float32)
    y, cache = extend(padded, empty, mask)
    expected, expected_cache = extend(x, empty)
    assert_close(y[:, left : left + 29], expected, "mixer")
    y = extend(more_padded, cache, mask)[0]
    assert_close(y[:, left : left + 29], extend(more, expected_cache)[0], "mixer")
    rows = extend(more_padded, cache, np.stack([0 * mask[0], mask[1]]))[1]  # a row of padding alone keeps its cache
    for new, old in zip(jax.tree.leaves(rows), jax.tree.leaves(cache), strict=True):
        np.testing.assert_array_equal(new[0], old[0])


@pytest.mark.parametrize("name", MIXERS)
def test_every_parameter_gets_a_finite_gradient(name):
    graph, state = build(name)
    x = inputs()
    positions = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), x.shape[:2])

    @jax.jit
    @jax.grad
    def gradients(state):
        y, _ = nnx.merge(graph, state)(x, positions=positions, reading="train")
        return jnp.vdot(y, jax.random.normal(jax.random.key(4), y.shape))

    for path, variable in nnx.to_flat_state(gradients(state)):
        value = np.asarray(variable.get_value())
        assert np.isfinite(value).all(), path
        assert value.any(), path


@pytest.mark.parametrize("name", MIXERS)
def test_the_cache_has_the_declared_size_and_keeps_it(name):
    module, extend = extender(name)
    for batch, dtype in ((2, jnp.float32), (3, jnp.bfloat16)):
        cache = module.init_cache(batch, 40, dtype)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
        assert size == module.cache_bytes(batch, 40, dtype)
    if not module.needs_max_length:
        assert module.cache_bytes(2, 40, jnp.float32) == module.cache_bytes(2, 4000, jnp.float32)
    cache = module.init_cache(2, LENGTH, jnp.float32)
    _, later = extend(inputs(), cache)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), later) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), cache
    )
    assert all(leaf.shape[0] == 2 for leaf in jax.tree.leaves(cache))


@pytest.mark.parametrize("name", MIXERS)
def test_settings_are_frozen_and_checked(name):
    config = MIXERS[name][0](**SMALL[name])
    config.validate(WIDTH)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_heads = 3
    with pytest.raises(ValueError, match="num_heads"):
        dataclasses.replace(config, num_heads=0).validate(WIDTH)


ON_GPU = {
    "gated_deltanet": dict(num_heads=2, head_dim=64, num_v_heads=4, expand_v=2.0, conv_size=4),
    "nsa": dict(num_heads=4, num_kv_heads=2, head_dim=32, block_size=16, block_counts=2, window=5),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", MIXERS)
def test_kernels_agree_with_xla(name):
    """A bfloat16 layer and its gradient, by Triton and by XLA, each beside the float32 layer of the same weights."""
    x, cotangent = inputs(), jax.random.normal(jax.random.key(7), (2, LENGTH, WIDTH))
    positions = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), x.shape[:2])

    def run(kernels, dtype):
        graph, state = build(name, dtype, **ON_GPU.get(name, {}))

        @jax.jit
        def layer(x):
            module = nnx.merge(graph, state)
            module.implementation = kernels
            y = module(x.astype(dtype), positions=positions, reading="train")[0]
            return y.astype(jnp.float32)

        y, pullback = jax.vjp(layer, x)
        return y, pullback(cotangent)[0]

    expected, xla, triton = run("xla", jnp.float32), run("xla", jnp.bfloat16), run("triton", jnp.bfloat16)
    for wanted, rounded, actual in zip(expected, xla, triton, strict=True):
        assert_close(rounded, wanted, "mixer", "bfloat16")
        assert rms_error(actual, wanted) <= 1.2 * rms_error(rounded, wanted)
