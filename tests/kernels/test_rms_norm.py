"""The norm, gated or of a residual stream, against its equations and hand-derived gradients in float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lte_jax.remat import checkpointed
from pallas_kernels.dispatch import UnsupportedCase
from pallas_kernels.rms_norm import residual_rms_norm, rms_norm
from tests.tolerances import assert_close

EPS = 1e-3  # large enough that leaving it out would show


def truth(x, weight, gate, dy, eps=EPS):
    """y and the gradients of x, weight and gate."""
    x, weight, dy = (np.asarray(a, np.float64) for a in (x, weight, dy))
    r = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    silu, slope = np.ones_like(x), np.zeros_like(x)
    if gate is not None:
        z = np.asarray(gate, np.float64)
        sigmoid = 1 / (1 + np.exp(-z))
        silu, slope = z * sigmoid, sigmoid * (1 + z * (1 - sigmoid))
    n, dn = x * r, dy * weight * silu
    dx = r * (dn - n * (n * dn).mean(-1, keepdims=True))
    dweight = (dy * n * silu).reshape(-1, x.shape[-1]).sum(0)
    gradients = (dx, dweight) if gate is None else (dx, dweight, dy * weight * n * slope)
    return weight * n * silu, *gradients


def make_inputs(shape, gated=True, dtype="float32", seed=0):
    random = np.random.default_rng([seed, *shape])
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), dtype)  # noqa: E731
    x, gate, dy = draw(*shape), draw(*shape) if gated else None, draw(*shape)
    weight = jnp.asarray(1 + random.normal(size=shape[-1:]) / 3, jnp.float32)
    return (x, weight, gate), dy


@functools.partial(jax.jit, static_argnames=("implementation", "eps"))
def outputs_and_gradients(inputs, dy, *, implementation, eps=EPS):
    run = functools.partial(rms_norm, eps=eps, implementation=implementation)
    y, pullback = jax.vjp(run, *inputs)
    return (y, *(x for x in pullback(dy) if x is not None))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("shape", [(5,), (3, 2), (7, 13), (2, 3, 5, 128), (1031, 64), (5, 1000)], ids=str)
def test_values_and_gradients(implementation, shape, gated):
    """Widths that are no power of two, rows that fill no block, and more of them than one program takes."""
    inputs, dy = make_inputs(shape, gated)
    found = outputs_and_gradients(inputs, dy, implementation=implementation)
    for a, b in zip(found, truth(*inputs, dy), strict=True):
        assert_close(a, b, "rms_norm")


@functools.partial(jax.jit, static_argnames=("implementation", "eps"))
def stream(x, weight, cotangents, *, implementation, eps=EPS):
    """x, y, dx, dweight."""
    run = functools.partial(residual_rms_norm, eps=eps, implementation=implementation)
    outputs, pullback = jax.vjp(run, x, weight)
    return (*outputs, *pullback(cotangents))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(5,), (7, 13), (2, 3, 5, 128), (37, 1000), (19, 2048)], ids=str)
def test_a_stream_goes_on_beside_its_norm(implementation, shape, dtype):
    """x stays as it is, and its gradient is the sum of both ways."""
    (x, weight, past), dy = make_inputs(shape, dtype=dtype)
    y, dx, dweight = truth(x, weight, None, dy)
    found = stream(x, weight, (past, dy), implementation=implementation)
    np.testing.assert_array_equal(found[0], x)
    for a, b in zip(found[1:], (y, dx + np.asarray(past, np.float64), dweight), strict=True):
        assert_close(a, b, "rms_norm", dtype)
    assert [str(a.dtype) for a in found] == [dtype, dtype, dtype, "float32"]


@pytest.mark.parametrize("gated", [True, False])
def test_without_epsilon(implementation, gated):
    """Rows that fill no block: what lies beyond them has a norm of 0, whose inverse is infinite."""
    inputs, dy = make_inputs((7, 13), gated)
    expected = truth(*inputs, dy, eps=0.0)
    found = outputs_and_gradients(inputs, dy, implementation=implementation, eps=0.0)
    if not gated:
        streamed = stream(*inputs[:2], (0 * dy, dy), implementation=implementation, eps=0.0)
        found, expected = (*found, *streamed[1:]), expected * 2
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, "rms_norm")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_inputs(implementation, dtype):
    inputs, dy = make_inputs((3, 37, 128), dtype=dtype)
    found = outputs_and_gradients(inputs, dy, implementation=implementation)
    assert [str(x.dtype) for x in found] == [dtype, dtype, "float32", dtype]
    for a, b in zip(found, truth(*inputs, dy), strict=True):
        assert_close(a, b, "rms_norm", "bfloat16")


def test_dtype_of_the_output(implementation):
    (x, weight, gate), _ = make_inputs((5, 64), dtype="bfloat16")
    y = rms_norm(x, weight, gate, eps=EPS, dtype=jnp.float32, implementation=implementation)
    assert y.dtype == jnp.float32
    assert_close(y, truth(x, weight, gate, x)[0], "rms_norm")


def test_gates_beyond_the_exponential(implementation):
    """SiLU of -200 is 0 and of 200 is 200; neither its value nor its slope is NaN."""
    (x, weight, gate), dy = make_inputs((4, 64))
    gate = jnp.where(jnp.arange(64) % 2 == 0, -200.0, 200.0) + 0 * gate
    found = outputs_and_gradients((x, weight, gate), dy, implementation=implementation)
    assert all(np.isfinite(a).all() for a in found)
    assert_close(found[0], truth(x, weight, gate, dy)[0], "rms_norm")


@pytest.mark.gpu
def test_more_numbers_under_vmap_than_32_bits_count():
    """All rows lie behind one another then, those of the second weight beyond 2^31 numbers."""
    if (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0) < 20 * 2**30:
        pytest.skip("needs 20 GB of a GPU's memory")
    rows = 2**24 + 64
    x = jax.jit(lambda: jax.lax.broadcasted_iota(jnp.bfloat16, (2, rows, 64), 2) - 31)()
    weight = jnp.stack([jnp.ones(64), jnp.arange(64.0)])
    run = functools.partial(rms_norm, eps=EPS, implementation="triton")
    y = jax.jit(jax.vmap(run))(x, weight)
    for number in range(2):
        few = x[number, -9:]
        assert_close(y[number, -9:], truth(few, weight[number], None, few)[0], "rms_norm", "bfloat16")


def test_vmap_and_same_bits_twice(implementation):
    several = [make_inputs((11, 64), seed=seed) for seed in range(2)]
    inputs, dy = jax.tree.map(lambda *x: jnp.stack(x), *several)
    run = functools.partial(outputs_and_gradients, implementation=implementation)
    mapped = jax.vmap(run)(inputs, dy)
    for i, one in enumerate(several):
        first, second = run(*one), run(*one)
        for value, a, b in zip(mapped, first, second, strict=True):
            np.testing.assert_array_equal(a, b)
            assert_close(value[i], a, "rms_norm")


def test_remat_keeps_its_output():
    """Under the policy that names it, a backward pass computes no norm again."""
    (x, weight, gate), _ = make_inputs((5, 64))

    def kept(policy):
        run = checkpointed(lambda x: jnp.sin(rms_norm(x, weight, gate, eps=EPS)), policy)
        return str(jax.make_jaxpr(jax.grad(lambda x: run(x).sum()))(x)).count("rsqrt")

    assert kept("kernels") == kept("none") < kept("full")


BAD = {
    "x": (dict(x=jnp.zeros((3, 8), jnp.int32)), "x has dtype int32"),
    "weight": (dict(weight=jnp.zeros(7)), "weight has shape"),
    "gate": (dict(gate=jnp.zeros((2, 8))), "gate has shape"),
    "gate_dtype": (dict(gate=jnp.zeros((3, 8), jnp.int32)), "gate has dtype"),
    "nothing": (dict(x=jnp.zeros((0, 8))), "at least 1"),
    "implementation": (dict(implementation="pallas"), "does not exist yet"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    changes, message = BAD[name]
    arguments: dict = {"x": jnp.zeros((3, 8)), "weight": jnp.zeros(8), **changes}
    x, weight, gate = arguments.pop("x"), arguments.pop("weight"), arguments.pop("gate", None)
    with pytest.raises(UnsupportedCase, match=message):
        rms_norm(x, weight, gate, eps=EPS, **arguments)
