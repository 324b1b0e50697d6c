"""The short convolution against loops in float64: values, gradients, packed documents, states, steps."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dispatch import UnsupportedCase
from pallas_kernels.short_convolution import short_convolution, short_convolution_step
from tests.tolerances import assert_close

BATCH, WIDTH = 3, 11
WIDE = 1061
IDS = {
    "one_document": None,
    "documents": [[1] * 5 + [2] * 1 + [3] * 7, [4] * 2 + [5] * 2 + [1] * 9, [2] * 13],
    "padding": [[0] * 4 + [3] * 6 + [0] * 3, [1] * 3 + [0] * 2 + [2] * 8, [0] * 1 + [5] * 1 + [6] * 1 + [0] * 10],
    "all_padding": [[0] * 13, [0] * 12 + [1], [1] + [0] * 12],
    "negative": [[0] * 4 + [-3] * 6 + [0] * 3, [-1] * 3 + [-7] * 10, [5] * 2 + [-5] * 2 + [0] * 9],
}


def truth(x, weight, segment_ids, state, dy, dstate, activation):
    """y, final state, and the gradients of x, weight and state, by loops over rows and tokens.

    ``history`` holds the last inputs of the current document, each with where it came from.
    """
    x, weight, state, dy, dstate = (np.asarray(a, np.float64) for a in (x, weight, state, dy, dstate))
    taps = len(weight)
    y, final = np.zeros(x.shape), np.zeros(state.shape)
    gradients = {"x": np.zeros(x.shape), "weight": np.zeros(weight.shape), "state": np.zeros(state.shape)}
    for b in range(len(x)):
        history = [("state", i, state[b, i]) for i in range(taps - 1)]
        current = None
        for t in range(x.shape[1]):
            segment = 1 if segment_ids is None else int(segment_ids[b][t])
            if segment == 0:
                continue
            if current is not None and segment != current:
                history = [(None, 0, np.zeros(x.shape[2]))] * (taps - 1)
            current = segment
            history = [*history, ("x", t, x[b, t])][-taps:]
            total = sum(weight[i] * value for i, (_, _, value) in enumerate(history))
            gate = 1 / (1 + np.exp(-total)) if activation else np.ones_like(total)
            y[b, t] = total * gate
            dtotal = dy[b, t] * (gate * (1 + total * (1 - gate)) if activation else 1.0)
            for i, (name, index, value) in enumerate(history):
                gradients["weight"][i] += dtotal * value
                if name:
                    gradients[name][b, index] += dtotal * weight[i]
        for i, (name, index, value) in enumerate(history[-(taps - 1) :]):
            final[b, i] = value
            if name:
                gradients[name][b, index] += dstate[b, i]
    return y, final, gradients["x"], gradients["weight"], gradients["state"]


def make_inputs(tokens=13, taps=4, dtype="float32", seed=0, width=WIDTH):
    random = np.random.default_rng([seed, tokens, taps])
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), dtype)  # noqa: E731
    inputs = draw(BATCH, tokens, width), draw(taps, width), draw(BATCH, taps - 1, width)
    return inputs, (draw(BATCH, tokens, width), draw(BATCH, taps - 1, width))


@functools.partial(jax.jit, static_argnames=("activation", "implementation"))
def outputs_and_gradients(inputs, cotangents, segment_ids, *, activation, implementation):
    def run(x, weight, state):
        return short_convolution(
            x, weight, segment_ids=segment_ids, initial_state=state, activation=activation,
            implementation=implementation,
        )  # fmt: skip

    outputs, pullback = jax.vjp(run, *inputs)
    return (*outputs, *pullback(cotangents))


def check(inputs, cotangents, segment_ids, implementation, activation="silu"):
    ids = None if segment_ids is None else jnp.asarray(segment_ids, jnp.int32)
    actual = outputs_and_gradients(inputs, cotangents, ids, activation=activation, implementation=implementation)
    x, weight, state = inputs
    for a, b in zip(actual, truth(x, weight, segment_ids, state, *cotangents, activation), strict=True):
        assert_close(a, b, "short_convolution", str(x.dtype))
    return actual


@pytest.mark.parametrize("kind", IDS)
def test_values_and_gradients(implementation, kind):
    actual = check(*make_inputs(), IDS[kind], implementation)
    if IDS[kind] is not None:
        padded = np.asarray(IDS[kind]) == 0
        assert not np.asarray(actual[0])[padded].any() and not np.asarray(actual[2])[padded].any()
    if kind == "all_padding":
        np.testing.assert_array_equal(actual[1][0], make_inputs()[0][2][0])


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_sequences_shorter_than_the_taps(implementation, tokens):
    """The final state then still holds inputs of the initial one."""
    check(*make_inputs(tokens), None, implementation)
    check(*make_inputs(tokens), [[1] * tokens, [0] * (tokens - 1) + [2], [3] + [0] * (tokens - 1)], implementation)


@pytest.mark.parametrize("taps", [2, 3, 5])
def test_other_taps_without_activation(implementation, taps):
    check(*make_inputs(taps=taps), IDS["padding"], implementation, activation=None)


@pytest.mark.parametrize("packed", [False, True])
def test_edges_of_tiles(implementation, packed):
    """More tokens and channels than a tile of any kernel, neither a multiple of it, documents that end at its edges."""
    tokens = 137
    ids = [[1] * 31 + [2] * 2 + [3] * 104, [0] * 32 + [1] * 33 + [2] * 72, [1] * 64 + [0] * 64 + [4] * 9]
    check(*make_inputs(tokens, width=WIDE), ids if packed else None, implementation)


def test_gradient_through_the_outputs_alone(implementation):
    """No cotangent of the final state, and no initial state, as in training."""
    (x, weight, state), (dy, dstate) = make_inputs()
    for ids in (None, IDS["padding"]):
        segment_ids = None if ids is None else jnp.asarray(ids, jnp.int32)
        run = lambda x, w: short_convolution(x, w, segment_ids=segment_ids, implementation=implementation)[0]  # noqa: E731, B023
        _, pullback = jax.vjp(run, x, weight)
        expected = truth(x, weight, ids, state * 0, dy, dstate * 0, "silu")
        for a, b in zip(pullback(dy), expected[2:4], strict=True):
            assert_close(a, b, "short_convolution")


def test_gradient_of_the_final_state_without_an_initial_one(implementation):
    """What stands before a row's first document is nothing then, even where the row has tokens of padding there."""
    (x, weight, state), (dy, dstate) = make_inputs()
    for ids in (None, IDS["padding"], IDS["all_padding"]):
        segment_ids = None if ids is None else jnp.asarray(ids, jnp.int32)
        run = lambda x, w: short_convolution(x, w, segment_ids=segment_ids, implementation=implementation)  # noqa: E731, B023
        _, pullback = jax.vjp(run, x, weight)
        expected = truth(x, weight, ids, state * 0, dy, dstate, "silu")
        for a, b in zip(pullback((dy, dstate)), expected[2:4], strict=True):
            assert_close(a, b, "short_convolution")


def test_low_precision_inputs(implementation):
    inputs, cotangents = make_inputs(dtype="bfloat16")
    actual = check(inputs, cotangents, IDS["padding"], implementation)
    assert {str(x.dtype) for x in actual} == {"bfloat16"}


def test_padding_content_changes_no_bit(implementation):
    (x, *rest), (dy, dstate) = make_inputs()
    ids = jnp.asarray(IDS["padding"], jnp.int32)
    spoil = functools.partial(jnp.where, (ids == 0)[..., None], jnp.float32(-3e4))
    run = functools.partial(outputs_and_gradients, activation="silu", implementation=implementation)
    first, second = run((x, *rest), (dy, dstate), ids), run((spoil(x), *rest), (spoil(dy), dstate), ids)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


def test_split_calls_equal_one(implementation):
    """Pieces of 1, 2 and 10 tokens and padding between them, with the gradient through the states."""
    (x, weight, state), (dy, dstate) = make_inputs()

    @jax.jit
    def run(x, weight, state):
        y1, state = short_convolution(x[:, :1], weight, initial_state=state, implementation=implementation)
        y2, state = short_convolution(
            jnp.pad(x[:, 1:3], ((0, 0), (1, 3), (0, 0)), constant_values=9.0), weight,
            segment_ids=jnp.tile(jnp.array([[0, 1, 1, 0, 0, 0]], jnp.int32), (BATCH, 1)), initial_state=state,
            implementation=implementation,
        )  # fmt: skip
        y3, state = short_convolution(x[:, 3:], weight, initial_state=state, implementation=implementation)
        return jnp.concatenate([y1, y2[:, 1:3], y3], axis=1), state

    outputs, pullback = jax.vjp(run, x, weight, state)
    expected = truth(x, weight, None, state, dy, dstate, "silu")
    for a, b in zip((*outputs, *pullback((dy, dstate))), expected, strict=True):
        assert_close(a, b, "short_convolution")


def test_without_initial_state(implementation):
    (x, weight, state), (dy, dstate) = make_inputs()
    for ids in (None, IDS["padding"]):
        segment_ids = None if ids is None else jnp.asarray(ids, jnp.int32)
        outputs = short_convolution(x, weight, segment_ids=segment_ids, implementation=implementation)
        for a, b in zip(outputs, truth(x, weight, ids, state * 0, dy, dstate, "silu"), strict=False):
            assert_close(a, b, "short_convolution")


def test_steps_equal_the_sequence(implementation):
    (x, weight, state), (dy, dstate) = make_inputs()
    y, final, *_ = truth(x, weight, None, state, dy, dstate, "silu")
    step = jax.jit(functools.partial(short_convolution_step, implementation=implementation))
    for t in range(x.shape[1]):
        current, state = step(x[:, t], weight, state)
        assert_close(current, y[:, t], "short_convolution")
    np.testing.assert_array_equal(state, np.asarray(final, np.float32))


def test_inactive_rows_keep_their_state(implementation):
    (x, weight, state), _ = make_inputs()
    active = jnp.array([True, False, True])
    y, after = short_convolution_step(x[:, 0], weight, state, active=active, implementation=implementation)
    everyone, moved = short_convolution_step(x[:, 0], weight, state, implementation=implementation)
    np.testing.assert_array_equal(after, jnp.where(active[:, None, None], moved, state))
    np.testing.assert_array_equal(y, jnp.where(active[:, None], everyone, 0.0))


def test_vmap_and_same_bits_twice(implementation):
    several = [make_inputs(seed=seed) for seed in range(2)]
    inputs, cotangents = jax.tree.map(lambda *x: jnp.stack(x), *several)
    ids = jnp.asarray(IDS["padding"], jnp.int32)
    run = functools.partial(outputs_and_gradients, activation="silu", implementation=implementation)
    mapped = jax.vmap(run, in_axes=(0, 0, None))(inputs, cotangents, ids)
    for i, one in enumerate(several):
        first, second = run(*one, ids), run(*one, ids)
        for value, a, b in zip(mapped, first, second, strict=True):
            np.testing.assert_array_equal(a, b)
            assert_close(value[i], a, "short_convolution")


def test_long_sequence_keeps_no_shifted_copies():
    """32,768 tokens; what the backward pass keeps is the inputs."""
    (x, weight, state), _ = make_inputs(32768)

    def run(x, weight, state):
        return short_convolution(x, weight, initial_state=state)

    _, residuals = jax.eval_shape(lambda *inputs: jax.vjp(run, *inputs), x, weight, state)
    kept = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(residuals) if leaf.ndim == 3)
    assert kept <= x.size + state.size
    y, _ = short_convolution(x, weight, initial_state=state)
    tail, _ = short_convolution(x[:, -20:], weight)
    assert_close(y[:, -17:], tail[:, 3:], "short_convolution")


BAD = {
    "x_rank": (dict(x=jnp.zeros((3, 5))), "x has shape"),
    "x_dtype": (dict(x=jnp.zeros((3, 5, 11), jnp.int32)), "x has dtype int32"),
    "weight_width": (dict(weight=jnp.zeros((4, 10))), r"weight has shape .* \[taps, D\] with D = 11"),
    "weight_dtype": (dict(weight=jnp.zeros((4, 11), jnp.int32)), "weight has dtype"),
    "one_tap": (dict(weight=jnp.zeros((1, 11))), "at least 2"),
    "state_shape": (dict(initial_state=jnp.zeros((3, 4, 11))), "initial_state has shape .* with taps-1 = 3"),
    "state_dtype": (dict(initial_state=jnp.zeros((3, 3, 11), jnp.bfloat16)), "initial_state has dtype"),
    "segments_shape": (dict(segment_ids=jnp.ones((3, 6), jnp.int32)), "segment_ids has shape .* with T = 5"),
    "segments_dtype": (dict(segment_ids=jnp.ones((3, 5))), "segment_ids has dtype"),
    "activation": (dict(activation="relu"), "activation='relu'"),
    "no_tokens": (dict(x=jnp.zeros((3, 0, 11))), "x has shape .* with T at least 1"),
    "implementation": (dict(implementation="pallas"), "does not exist yet"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    changes, message = BAD[name]
    with pytest.raises(UnsupportedCase, match=message):
        short_convolution(**{**dict(x=jnp.zeros((3, 5, 11)), weight=jnp.zeros((4, 11))), **changes})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("state", None, "state has type NoneType"),
        ("state", jnp.zeros((3, 2, 11)), "state has shape .* with taps-1 = 3"),
        ("active", jnp.ones((2,), bool), "active has shape .* with B = 3"),
        ("active", jnp.ones((3,), jnp.int32), "active has dtype"),
        ("x", jnp.zeros((3, 1, 11)), "x has shape"),
    ],
)
def test_bad_step_input(name, value, message):
    arguments = dict(x=jnp.zeros((3, 11)), weight=jnp.zeros((4, 11)), state=jnp.zeros((3, 3, 11)))
    with pytest.raises(UnsupportedCase, match=message):
        short_convolution_step(**{**arguments, name: value})
