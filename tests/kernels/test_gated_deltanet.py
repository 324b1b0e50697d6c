"""One token of a Gated DeltaNet layer against its equations in float64, for every implementation."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dispatch import UnsupportedCase
from pallas_kernels.gated_deltanet import Parameters, Projections, State, gated_deltanet_step
from tests.tolerances import assert_close

EPS = 1e-5
ODD = dict(key_heads=2, heads=6, size=5, value_size=7)
SIZES = {
    "one value head per key head": dict(key_heads=3, heads=3, size=64, value_size=64),
    "grouped": dict(key_heads=2, heads=4, size=64, value_size=128),
    "wide": dict(key_heads=2, heads=2, size=128, value_size=256),
    "widest": dict(key_heads=1, heads=2, size=256, value_size=256),
}


def truth(inputs, parameters, state, active, beta_range):
    """y, the states and u by the equations of ``api``, in float64."""
    wide = lambda x: None if x is None else np.asarray(x, np.float64)  # noqa: E731
    inputs, parameters, state = (type(x)(*map(wide, x)) for x in (inputs, parameters, state))
    silu = lambda x: x / (1 + np.exp(-x))  # noqa: E731
    B, H, N, V = state.state.shape
    streams, last = {}, {}
    for name in ("q", "k", "v"):
        x, taps, before = getattr(inputs, name), getattr(parameters, f"{name}_taps"), getattr(state, name)
        if taps is None:
            streams[name], last[name] = silu(x), None
            continue
        window = np.concatenate([before, x[:, None]], axis=1)
        streams[name], last[name] = silu((window * taps).sum(1)), window[:, 1:]
    unit = lambda x: x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6)  # noqa: E731
    q, k = (unit(streams[name].reshape(B, -1, N)) for name in ("q", "k"))
    q, k = (x.repeat(H // x.shape[1], axis=1) for x in (q, k))
    v = streams["v"].reshape(B, H, V)
    beta = beta_range / (1 + np.exp(-inputs.b))
    decay = np.exp(-np.exp(parameters.decay) * np.logaddexp(inputs.a + parameters.dt_bias, 0))
    S = state.state * decay[..., None, None]
    u = beta[..., None] * (v - np.einsum("bhnv,bhn->bhv", S, k))
    S = S + np.einsum("bhn,bhv->bhnv", k, u)
    o = np.einsum("bhnv,bhn->bhv", S, q) * N**-0.5
    y = o / np.sqrt((o * o).mean(-1, keepdims=True) + EPS) * parameters.norm
    if inputs.gate is not None:
        y = y * silu(inputs.gate.reshape(B, H, V))
    after = State(S, last["q"], last["k"], last["v"])
    if active is not None:
        on = lambda x: np.asarray(active).reshape(-1, *(1,) * (x.ndim - 1))  # noqa: E731
        y, u = np.where(on(y), y, 0), np.where(on(u), u, 0)
        after = State(*(None if new is None else np.where(on(new), new, old) for new, old in zip(after, state)))  # noqa: B905
    return y.reshape(B, H * V), after, u


def make_inputs(
    *, key_heads, heads, size, value_size, batch=3, taps=4, gated=True, dtype="float32", last_dtype=None, seed=0
):
    random = np.random.default_rng([seed, heads, size])
    draw = lambda kind, *shape: jnp.asarray(random.normal(size=shape), kind)  # noqa: E731
    B, keys, values = batch, key_heads * size, heads * value_size
    inputs = Projections(
        draw(dtype, B, keys), draw(dtype, B, keys), draw(dtype, B, values), draw(dtype, B, heads),
        draw(dtype, B, heads), draw(dtype, B, values) if gated else None,
    )  # fmt: skip
    widths = (keys, keys, values)
    weights = [draw("float32", taps, width) if taps > 1 else None for width in widths]
    # Inputs of earlier tokens: numbers that the dtype of the projections has.
    last = [draw(dtype, B, taps - 1, width).astype(last_dtype or dtype) if taps > 1 else None for width in widths]
    # Decays from nearly none to nearly everything.
    per_head = draw("float32", heads), 3 * draw("float32", heads) - 2
    parameters = Parameters(*weights, *per_head, 1 + draw("float32", value_size) / 3)
    return inputs, parameters, State(draw("float32", B, heads, size, value_size), *last)


@functools.partial(jax.jit, static_argnames=("implementation", "beta_range", "return_update"))
def run(inputs, parameters, state, active=None, *, implementation, beta_range=1.0, return_update=True):
    return gated_deltanet_step(
        inputs, parameters, state, active=active, eps=EPS, beta_range=beta_range, return_update=return_update,
        implementation=implementation,
    )  # fmt: skip


def check(arrays, implementation, active=None, beta_range=1.0):
    y, after, update = run(*arrays, active, implementation=implementation, beta_range=beta_range)
    expected = truth(*arrays, active, beta_range)
    dtype = str(arrays[0].q.dtype)
    for name, a, b in zip(("y", "state", "u"), (y, after.state, update), (expected[0], expected[1].state, expected[2]), strict=True):  # fmt: skip # noqa: E501
        assert str(a.dtype) == (dtype if name == "y" else "float32")
        assert_close(a, b, "gated_deltanet", dtype)
    for new, old, wanted in zip(after[1:], arrays[2][1:], expected[1][1:], strict=True):
        if wanted is None:
            assert new is None
        else:
            assert new.dtype == old.dtype
            np.testing.assert_array_equal(new, np.asarray(jnp.asarray(wanted, old.dtype)))
    return y, after


@pytest.mark.rotating(5)
@pytest.mark.parametrize("name", [*SIZES, "odd"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_size(implementation, name, dtype):
    arrays = make_inputs(**{**SIZES, "odd": ODD}[name], dtype=dtype)
    if name == "odd" and implementation != "xla":
        with pytest.raises(UnsupportedCase, match="key head size=5"):
            run(*arrays, implementation=implementation)
    else:
        check(arrays, implementation)


@pytest.mark.parametrize("batch", [1, 137])
def test_few_and_many_rows(implementation, batch):
    """Kernels may take other tiles."""
    check(make_inputs(**SIZES["grouped"], batch=batch, dtype="bfloat16"), implementation)


@pytest.mark.parametrize("content", ["numbers", "nan"])
def test_inactive_rows_keep_their_state(implementation, content):
    arrays = make_inputs(**SIZES["grouped"])
    active = jnp.array([True, False, True])
    y, after = check(arrays, implementation, active)
    if content == "nan":  # of a row without a token anything may stand in the inputs
        spoiled = jax.tree.map(lambda x: x.at[1].set(jnp.nan), arrays[0])
        y, after, _ = run(spoiled, *arrays[1:], active, implementation=implementation)
    assert not np.asarray(y[1]).any()
    for new, old in zip(after, arrays[2], strict=True):
        np.testing.assert_array_equal(new[1], old[1])


@pytest.mark.parametrize(
    "options", [dict(taps=1), dict(gated=False), dict(taps=2, gated=False), dict(last_dtype="float32")], ids=str
)
def test_variants(implementation, options):
    """Without convolutions, without a gate, with other taps, with a cache of another dtype; and beta up to 2."""
    check(make_inputs(**SIZES["grouped"], dtype="bfloat16", **options), implementation, beta_range=2.0)


def test_vmap_and_same_bits_twice(implementation):
    several = [make_inputs(**SIZES["grouped"], seed=seed) for seed in range(2)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *several)
    step = functools.partial(run, implementation=implementation)
    mapped = jax.vmap(step)(*stacked)
    for i, one in enumerate(several):
        first, second = step(*one), step(*one)
        for value, a, b in zip(*map(jax.tree.leaves, (mapped, first, second)), strict=True):
            np.testing.assert_array_equal(a, b)
            assert_close(value[i], a, "gated_deltanet")


def test_many_steps_in_place(implementation):
    """A loop that carries the state gives what as many separate steps give."""
    (inputs, parameters, state), tokens = make_inputs(**SIZES["grouped"], dtype="bfloat16"), 5
    several = jax.tree.map(lambda x: jnp.stack([x * (i + 1) for i in range(tokens)]), inputs)
    step = functools.partial(
        gated_deltanet_step, parameters=parameters, eps=EPS, implementation=implementation, return_update=False
    )

    @jax.jit
    def loop(state):
        def body(state, inputs):
            y, state, _ = step(inputs, state=state)
            return state, y

        return jax.lax.scan(body, state, several)

    last, ys = loop(state)
    for i in range(tokens):
        y, state, _ = run(jax.tree.map(lambda x: x[i], several), parameters, state, implementation=implementation)  # noqa: B023
        np.testing.assert_array_equal(ys[i], y)
    for a, b in zip(last, state, strict=True):
        np.testing.assert_array_equal(a, b)


BAD = {
    "q": ("inputs", dict(q=jnp.zeros((3, 11))), "not a multiple of the head size 5"),
    "heads": ("inputs", dict(q=jnp.zeros((3, 20)), k=jnp.zeros((3, 20))), "must be a multiple of K"),
    "gate": ("inputs", dict(gate=jnp.zeros((3, 6))), "gate has shape"),
    "dtype": ("inputs", dict(v=jnp.zeros((3, 42), jnp.bfloat16)), "v has dtype bfloat16"),
    "taps": ("parameters", dict(k_taps=None), "all arrays or all None"),
    "norm": ("parameters", dict(norm=jnp.zeros((8,))), "norm has shape"),
    "last": ("state", dict(v=jnp.zeros((3, 2, 42))), "the last inputs of v"),
    "state": ("state", dict(state=jnp.zeros((3, 6, 5, 7), jnp.bfloat16)), "the state has dtype"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    which, changes, message = BAD[name]
    arrays = dict(zip(("inputs", "parameters", "state"), make_inputs(**ODD), strict=True))
    arrays[which] = arrays[which]._replace(**changes)
    with pytest.raises(UnsupportedCase, match=message):
        gated_deltanet_step(**arrays, eps=EPS)
    with pytest.raises(UnsupportedCase, match="active has shape"):
        gated_deltanet_step(*make_inputs(**ODD), active=jnp.ones(2, bool), eps=EPS)
