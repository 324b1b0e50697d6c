"""The gated delta rule against a float64 recurrence with hand-derived gradients, for every implementation."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gated_delta_rule import gated_delta_rule, gated_delta_rule_step, triton_tiles
from pallas_kernels.gated_delta_rule import segments as split
from pallas_kernels.gated_delta_rule.xla import recurrence
from tests.kernels.gated_delta_truth import NAMES, truth
from tests.tolerances import assert_close, rms_error

ODD = dict(batch=2, kv_heads=2, heads=6, size=5, value_size=7)
TILED = dict(batch=2, kv_heads=2, heads=4, size=64, value_size=128, dtype="bfloat16")  # what kernels are made for
# Below this, factors of a float32 product fall under the smallest normal number and only smallness can be asked.
UNDERFLOW = 1e-30
DECAYS = (0.0, 1e-3, 20.0, 80.0)


def sizes(implementation):
    return ODD if implementation == "xla" else TILED


def close(actual, expected, implementation, dtype, label=""):
    what = "gated_delta_rule" if implementation == "xla" else "gated_delta_rule_gpu"
    assert_close(actual, expected, what + label, str(dtype))


def make_inputs(tokens, *, batch, kv_heads, heads, size, value_size, decays=(0.01, 0.1, 1.0), dtype="float32", seed=0):
    """q, k, v, g, beta, initial state, and the cotangents of o and of the final state."""
    random = np.random.default_rng([seed, tokens])
    q, k = random.normal(size=(2, batch, tokens, kv_heads, size))
    v, do = random.normal(size=(2, batch, tokens, heads, value_size))
    g = -random.choice(decays, size=(batch, tokens, heads))
    beta = random.uniform(0, 1, size=(batch, tokens, heads))
    state, dstate = random.normal(size=(2, batch, heads, size, value_size))
    low = [jnp.asarray(x, dtype) for x in (q, k, v)]
    high = [jnp.asarray(x, jnp.float32) for x in (g, beta, state)]
    return (*low, *high), (jnp.asarray(do, dtype), jnp.asarray(dstate, jnp.float32))


@functools.partial(jax.jit, static_argnames=("implementation", "scale", "normalize"))
def outputs_and_gradients(inputs, cotangents, segment_ids=None, *, implementation, scale=None, normalize=True):
    def run(q, k, v, g, beta, state):
        return gated_delta_rule(
            q, k, v, g, beta, segment_ids=segment_ids, initial_state=state, scale=scale, normalize=normalize,
            implementation=implementation,
        )  # fmt: skip

    outputs, pullback = jax.vjp(run, *inputs)
    return (*outputs, *pullback(cotangents))


def check(inputs, cotangents, implementation, segment_ids=None, label="", **options):
    actual = outputs_and_gradients(inputs, cotangents, segment_ids, implementation=implementation, **options)
    expected = truth(*inputs, segment_ids, *cotangents, **options)
    for name, value in zip(NAMES, actual, strict=True):
        assert np.isfinite(np.asarray(value, np.float32)).all(), f"{name} is not finite"
        if np.linalg.norm(expected[name]) < UNDERFLOW:
            assert np.linalg.norm(np.asarray(value, np.float64)) < UNDERFLOW, f"{name} does not vanish"
        else:
            close(value, expected[name], implementation, inputs[0].dtype, label)
    return actual, expected


@pytest.mark.rotating(3)
@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65, 131])
def test_values_and_gradients(implementation, tokens):
    check(*make_inputs(tokens, **sizes(implementation)), implementation)


def test_low_precision_inputs(implementation):
    actual, _ = check(*make_inputs(131, **{**sizes(implementation), "dtype": "bfloat16"}), implementation)
    assert [str(x.dtype) for x in actual] == ["bfloat16", "float32"] + ["bfloat16"] * 3 + ["float32"] * 3


def test_scale_and_raw_keys(implementation):
    """Without normalisation, with keys short enough that the transition does not grow."""
    (q, k, *rest), cotangents = make_inputs(65, **sizes(implementation))
    check((q, k * 0.2, *rest), cotangents, implementation, scale=0.3, normalize=False)


def adversarial(kind, implementation):
    (q, k, v, g, beta, state), cotangents = make_inputs(131, decays=DECAYS, **sizes(implementation))
    if kind == "mixed_decays":
        pass
    elif kind == "negative_eigenvalues":
        g, beta = jnp.where(g < -1, -0.1, g), 2 * beta
    elif kind == "dominant_key":
        k = k.at[:, 17].multiply(1e4)
        g = jnp.zeros_like(g)
    elif kind.startswith("decay_"):
        g = jnp.full_like(g, -float(kind.removeprefix("decay_")))
    else:  # equal keys without decay: the system to solve is a full triangle of ones (or twos)
        k, g = jnp.broadcast_to(k[:, :1], k.shape), jnp.zeros_like(g)
        beta = jnp.full_like(beta, 2.0 if kind == "equal_keys_reflected" else 1.0)
    return (q, k, v, g, beta, state), cotangents


@pytest.mark.parametrize(
    "kind",
    ["mixed_decays", "negative_eigenvalues", "dominant_key", "decay_0", "decay_1e-3", "decay_20", "decay_80",
     "equal_keys"],
)  # fmt: skip
def test_adversarial_inputs(implementation, kind):
    """Where powers of the triangle, or differences of running sums of decays, would lose everything."""
    check(*adversarial(kind, implementation), implementation)


def test_reflections(implementation):
    """Equal keys with beta 2: every token reflects the state, so that all roundings stay and add up.

    In 16 bits the outputs keep their bound. Gradients are held to the largest error that the float64 recurrence has
    when it rounds v - S^T k and dv once per token: storing them in 16 bits costs that much.
    """
    inputs, cotangents = adversarial("equal_keys_reflected", implementation)
    if implementation == "xla":
        check(inputs, cotangents, implementation, label="_reflected")
        return
    actual = outputs_and_gradients(inputs, cotangents, implementation=implementation)
    expected = truth(*inputs, None, *cotangents)
    floor = truth(*inputs, None, *cotangents, rounded=lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64))
    bound = max(rms_error(floor[name], expected[name]) for name in NAMES)
    for name, value in zip(NAMES, actual, strict=True):
        if name in ("o", "final_state"):
            close(value, expected[name], implementation, inputs[0].dtype)
        else:
            assert rms_error(value, expected[name]) <= bound, name


def rows(*documents):
    """Segment ids from runs of (id, length)."""
    return jnp.asarray([np.concatenate([np.full(n, i) for i, n in row]) for row in documents], jnp.int32)


PACKED = {
    "documents": rows([(3, 70), (1, 1), (2, 60)], [(1, 64), (2, 64), (9, 3)]),
    "padding": rows([(0, 5), (4, 60), (0, 3), (2, 59), (0, 4)], [(7, 3), (0, 126), (1, 2)]),
    "all_padding": rows([(0, 131)], [(0, 66), (1, 65)]),
    "length_one": rows([(i + 1, 1) for i in range(131)], [(0, 64)] + [(i + 1, 1) for i in range(67)]),
}


def test_few_tokens_survive(implementation):
    """Decays leave few inner products to make up dg and dbeta: rounding one factor of them to 8 bits showed in a norm.

    With D rounded before r.(k D), one such draw in twenty had an error of dg above 5e-3.
    """
    shape = ODD if implementation == "xla" else dict(TILED, batch=1, kv_heads=1, heads=2, size=128)
    for seed in range(4):
        check(*make_inputs(158, decays=(0.01, 0.1, 20.0), seed=seed, **shape), implementation)


@pytest.mark.parametrize("kind", PACKED)
def test_packed_documents(implementation, kind):
    segment_ids = PACKED[kind]
    inputs, cotangents = make_inputs(131, decays=(0.0, 0.1, 20.0), **sizes(implementation))
    actual, _ = check(inputs, cotangents, implementation, segment_ids)
    padded = np.asarray(segment_ids) == 0
    for name, value in zip(NAMES, actual, strict=True):
        if value.ndim and value.shape[1] == 131:
            assert not np.asarray(value, np.float32)[padded].any(), f"{name} is not 0 at padding"
    if kind == "all_padding":
        np.testing.assert_array_equal(actual[1][0], inputs[-1][0])
        np.testing.assert_array_equal(actual[-1][0], cotangents[1][0])


def test_padding_content_changes_no_bit(implementation):
    segment_ids = PACKED["padding"]
    inputs, cotangents = make_inputs(131, **sizes(implementation))

    def spoil(x):
        return jnp.where((segment_ids == 0).reshape(*segment_ids.shape, *(1,) * (x.ndim - 2)), -3e3, x)

    spoilt = (*map(spoil, inputs[:-1]), inputs[-1])
    first = outputs_and_gradients(inputs, cotangents, segment_ids, implementation=implementation)
    second = outputs_and_gradients(
        spoilt, (spoil(cotangents[0]), cotangents[1]), segment_ids, implementation=implementation
    )
    for name, a, b in zip(NAMES, first, second, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


def test_packed_equals_alone(implementation):
    """Two documents in a row of 131, values and gradients, against the truth of each of them alone."""
    segment_ids = rows([(3, 65), (5, 65), (0, 1)], [(1, 65), (0, 1), (2, 65)])
    (*arrays, state), (do, dstate) = make_inputs(131, **sizes(implementation))
    packed = outputs_and_gradients((*arrays, state), (do, dstate), segment_ids, implementation=implementation)
    expected = [np.zeros(x.shape) for x in packed]
    zeros = jnp.zeros_like(state)
    for row, places in enumerate(((0, 65), (0, 66))):
        for start, first, last in zip(places, (state, zeros), (zeros, dstate), strict=True):
            piece = slice(start, start + 65)
            alone = truth(*(x[:, piece] for x in arrays), first, None, do[:, piece], last)
            for i in (0, 2, 3, 4, 5, 6):
                expected[i][row, piece] = alone[NAMES[i]][row]
    for i in (0, 2, 3, 4, 5, 6):
        close(packed[i], expected[i], implementation, do.dtype)


@functools.partial(jax.jit, static_argnames=("implementation", "cuts"))
def _split_loss(inputs, cotangents, *, implementation, cuts):
    *arrays, state = inputs
    outputs = []
    for start, end in itertools.pairwise(cuts):
        o, state = gated_delta_rule(
            *(x[:, start:end] for x in arrays), initial_state=state, implementation=implementation
        )
        outputs.append(o)
    outputs = (jnp.concatenate(outputs, 1), state)
    return sum(jnp.vdot(a.astype(jnp.float32), b.astype(jnp.float32)) for a, b in zip(outputs, cotangents, strict=True))


def test_split_calls_equal_one(implementation):
    """Gradients pass through the state between calls, and depend on its value."""
    inputs, cotangents = make_inputs(70, **sizes(implementation))
    split = functools.partial(_split_loss, cotangents=cotangents, implementation=implementation)
    gradients = jax.grad(split)(inputs, cuts=(0, 3, 70))
    expected = truth(*inputs, None, *cotangents)
    for name, gradient in zip(NAMES[2:], gradients, strict=True):
        close(gradient, expected[name], implementation, inputs[0].dtype)


def test_without_initial_state(implementation):
    """None is zeros, and the gradients of the rest are the same."""
    inputs, cotangents = make_inputs(3, **sizes(implementation))
    zeros = (*inputs[:-1], jnp.zeros_like(inputs[-1]))

    @jax.jit
    def run(arrays):
        return jax.vjp(lambda *a: gated_delta_rule(*a, implementation=implementation), *arrays)[1](cotangents)

    expected = truth(*zeros, None, *cotangents)
    for name, gradient in zip(NAMES[2:-1], run(inputs[:-1]), strict=True):
        close(gradient, expected[name], implementation, inputs[0].dtype)


def test_updates(implementation):
    """The writes u are returned, change nothing else, are 0 at padding, and carry no gradient."""
    (q, k, v, g, beta, state), _ = make_inputs(131, **sizes(implementation))
    segment_ids = PACKED["padding"]

    def run(v):
        return gated_delta_rule(
            q, k, v, g, beta, segment_ids=segment_ids, initial_state=state, return_updates=True,
            implementation=implementation,
        )  # fmt: skip

    @jax.jit
    def run_with_gradient(v):
        (o, _, updates), pullback = jax.vjp(run, v)
        return o, updates, pullback((jnp.zeros_like(o), jnp.zeros_like(state), jnp.ones_like(updates)))[0]

    o, updates, gradient = run_with_gradient(v)
    expected = truth(q, k, v, g, beta, state, segment_ids)
    assert updates.dtype == jnp.float32
    close(updates, expected["updates"], implementation, v.dtype)
    close(o, expected["o"], implementation, v.dtype)
    assert not np.asarray(updates)[np.asarray(segment_ids) == 0].any()
    assert not gradient.any()


def test_steps_equal_the_sequence(implementation):
    (q, k, v, g, beta, state), _ = make_inputs(7, **sizes(implementation))
    expected = truth(q, k, v, g, beta, state)
    step = jax.jit(functools.partial(gated_delta_rule_step, return_update=True, implementation=implementation))
    for t in range(7):
        o, state, update = step(q[:, t], k[:, t], v[:, t], g[:, t], beta[:, t], state)
        close(o, expected["o"][:, t], implementation, v.dtype)
        close(update, expected["updates"][:, t], implementation, v.dtype)
    close(state, expected["final_state"], implementation, v.dtype)


def test_inactive_rows_keep_their_state(implementation):
    (q, k, v, g, beta, state), _ = make_inputs(1, **sizes(implementation))
    arrays = [x[:, 0] for x in (q, k, v, g, beta)]
    active = jnp.array([False, True])
    o, after = gated_delta_rule_step(*arrays, state, active=active, implementation=implementation)
    everyone, moved = gated_delta_rule_step(*arrays, state, implementation=implementation)
    np.testing.assert_array_equal(after[0], state[0])
    assert not o[0].any()
    np.testing.assert_array_equal(o[1], everyone[1])
    np.testing.assert_array_equal(after[1], moved[1])


def test_vmap(implementation):
    """A mapped axis in front, of the gradients too."""
    several = [make_inputs(5, seed=seed, **sizes(implementation)) for seed in range(3)]
    inputs, cotangents = jax.tree.map(lambda *x: jnp.stack(x), *several)
    run = functools.partial(outputs_and_gradients, implementation=implementation)
    mapped = jax.vmap(run)(inputs, cotangents)
    for i, one in enumerate(several):
        for value, alone in zip(mapped, run(*one), strict=True):
            close(value[i], alone, implementation, one[0][0].dtype)


def test_same_bits_twice(implementation):
    inputs, cotangents = make_inputs(131, **sizes(implementation))
    first = outputs_and_gradients(inputs, cotangents, PACKED["padding"], implementation=implementation)
    second = outputs_and_gradients(inputs, cotangents, PACKED["padding"], implementation=implementation)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


def test_long_sequence(implementation):
    """32,768 tokens: errors do not grow, and memory is a small multiple of the inputs'."""
    shape = dict(batch=1, kv_heads=1, heads=1, size=8, value_size=5)
    shape = shape if implementation == "xla" else {**TILED, "batch": 1}
    inputs, cotangents = make_inputs(32768, decays=(0.0, 0.001, 0.1), **shape)
    check(inputs, cotangents, implementation)
    if implementation == "xla":
        compiled = outputs_and_gradients.lower(inputs, cotangents, implementation="xla").compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 8 * sum(x.nbytes for x in inputs)


def test_split_over_segments(implementation):
    """One long row of few heads: the kernels' scans are split, over a sequence that ends inside a chunk."""
    shape = {**sizes(implementation), "batch": 1, "kv_heads": 1, "heads": 2}
    tokens = 48 * 64 + 5
    if implementation != "xla":
        assert split.plan(shape["heads"] * shape["value_size"] // 64, 49, wanted=132).segments > 2
    inputs, cotangents = make_inputs(tokens, decays=(0.0, 0.001, 0.1), **shape)
    check(inputs, cotangents, implementation)
    check(inputs, cotangents, implementation, rows([(1, 1500), (0, 20), (2, tokens - 1520)]))


@pytest.mark.gpu
@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize(("size", "value_size"), [(64, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 512)])
@pytest.mark.parametrize("kernels", ["triton", "triton, wide", "pallas"])
def test_every_tile(monkeypatch, kernels, size, value_size, segments):
    """Every choice of tile that ships, in one scan and in a split one; the wide ones are for many programs."""
    tokens = 150 + segments
    if kernels == "triton, wide":
        always = {key: (0, tile) for key, (_, tile) in triton_tiles._WIDE.items()}
        monkeypatch.setattr(triton_tiles, "_WIDE", always)
        kernels, tokens = "triton", 155 + segments  # not a program that jit has kept
    monkeypatch.setattr(split, "plan", lambda _, chunks, wanted: split.Plan(segments, -(-chunks // segments)))
    shape = dict(batch=1, kv_heads=1, heads=2, size=size, value_size=value_size, dtype="bfloat16")
    check(*make_inputs(tokens, decays=(0.01, 0.1, 20.0), **shape), kernels)


def test_recurrence_is_the_reference():
    inputs, _ = make_inputs(131, decays=DECAYS, **ODD)
    expected = truth(*inputs, PACKED["padding"])
    o, state, updates = jax.jit(functools.partial(recurrence, return_updates=True))(
        *inputs[:-1], initial_state=inputs[-1], segment_ids=PACKED["padding"]
    )
    assert_close(o, expected["o"], "gated_delta_rule")
    assert_close(state, expected["final_state"], "gated_delta_rule")
    assert_close(updates, expected["updates"], "gated_delta_rule")


def test_remat_keeps_what_it_names():
    """With outputs and residuals kept by name, the backward pass does not run the forward scan again."""
    inputs, cotangents = make_inputs(65, **ODD)

    def scans(policy):
        def run(*arrays):
            o, state = jax.checkpoint(
                lambda *a: gated_delta_rule(*a[:-1], initial_state=a[-1]), policy=policy
            )(*arrays)  # fmt: skip
            return jnp.vdot(jnp.sin(o), cotangents[0]) + jnp.vdot(state, cotangents[1])

        return str(jax.make_jaxpr(jax.grad(run))(*inputs)).count(" scan[")

    names = ("gated_delta_rule_out", "gated_delta_rule_residual")
    kept = scans(jax.checkpoint_policies.save_only_these_names(*names))
    assert kept == 2 and scans(jax.checkpoint_policies.nothing_saveable) == 3
