"""LTE's inputs of a decode step against float64 loops: scores, rotations, remembered inputs, rows at rest."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import triton_call
from pallas_kernels.dispatch import UnsupportedCase
from pallas_kernels.lte_inputs import Convolution, lte_inputs_step
from pallas_kernels.lte_inputs.api import Operands
from tests.kernels import needs_triton
from tests.tolerances import assert_close

# name: sequences, query heads, KV heads, size, sets of the router's weights
CASES = {
    "one": (1, 3, 3, 64, 3),
    "groups": (5, 6, 2, 64, 2),
    "shared": (9, 2, 2, 64, 1),
    "many": (67, 3, 3, 64, 3),
    "wide": (11, 4, 1, 128, 1),
}


def make_operands(name: str, dtype: str) -> Operands:
    batch, heads, kv_heads, size, sets = CASES[name]
    random = np.random.default_rng(batch)
    draw = lambda *shape, scale=1.0: jnp.asarray(scale * random.normal(size=shape), dtype)  # noqa: E731
    width = 2 * size
    convolutions = tuple(
        Convolution(draw(sets, 3, c, c // 2, scale=(2 / (3 * c)) ** 0.5), draw(sets, c // 2, scale=0.3), 2)
        for c in (width, width // 2, width // 4)
    )
    position = jnp.asarray((np.arange(batch) * 5) % 37, jnp.int32)  # 0 first; some have not seen 12 tokens
    angles = random.normal(size=(batch, size // 2)).astype(np.float32)
    return Operands(
        draw(batch, heads, size),
        draw(batch, kv_heads, size),
        draw(batch, kv_heads, size),
        position,
        jnp.cos(angles),
        jnp.sin(angles),
        draw(batch, 12, kv_heads, width),
        convolutions,
        draw(sets, width // 8),
        draw(sets),
    )


def truth(operands: Operands, method: str):
    """q, k, score and remembered inputs, with loops over sequences, heads, places and taps."""
    q, k, v, cos, sin, recent = (np.asarray(operands[i], np.float64) for i in (0, 1, 2, 4, 5, 6))
    joined = np.concatenate([recent, np.concatenate([k, v], -1)[:, None]], axis=1)
    scores = np.zeros(k.shape[:2])
    for b, position in enumerate(np.asarray(operands.position)):
        real = position - 12 + np.arange(13) >= 0
        for h in range(k.shape[1]):
            x = joined[b, :, h] * real[:, None]
            for weight, bias, dilation in operands.convolutions:
                which = h % weight.shape[0] if weight.shape[0] > 1 else 0
                w, c = np.asarray(weight[which], np.float64), np.asarray(bias[which], np.float64)
                y = np.zeros((13, w.shape[2]))
                for t in np.flatnonzero(real):
                    places = [t + (tap - 1) * dilation for tap in range(3)]
                    y[t] = c + sum(x[p] @ w[tap] for tap, p in enumerate(places) if 0 <= p < 13)
                x = y / (1 + np.exp(-y)) * real[:, None]
            which = h if operands.weight.shape[0] > 1 else 0
            z = float(x[6] @ np.asarray(operands.weight[which], np.float64)) + float(operands.bias[which])
            r = max(z, 0.0) if method == "relu" else 1 / (1 + np.exp(-z)) - 0.5
            scores[b, h] = r if real[6] else 0.0

    def rotate(x):
        x1, x2 = np.split(x, 2, axis=-1)
        return np.concatenate([x1 * cos[:, None] - x2 * sin[:, None], x2 * cos[:, None] + x1 * sin[:, None]], -1)

    return rotate(q), rotate(k), scores, joined[:, 1:]


@pytest.mark.rotating(4)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_values(name, dtype, implementation):
    operands, method = make_operands(name, dtype), "relu" if name == "groups" else "sigmoid"
    arrays = operands._replace(convolutions=())

    @jax.jit
    def run(arrays, weights):
        convolutions = tuple(Convolution(*pair, 2) for pair in weights)
        whole = arrays._replace(convolutions=convolutions)
        return lte_inputs_step(whole, method=method, implementation=implementation)

    weights = [convolution[:2] for convolution in operands.convolutions]
    found, again = run(arrays, weights), run(arrays, weights)
    assert all(np.array_equal(one, two) for one, two in zip(found, again, strict=True))
    q, k, score, recent = truth(operands, method)
    assert_close(found.q, q, "lte_inputs", dtype)
    assert_close(found.k, k, "lte_inputs", dtype)
    assert_close(found.score, score, "lte_inputs score", dtype)
    assert np.array_equal(np.asarray(found.recent, np.float64), recent)


def test_rows_at_rest_keep_their_inputs(implementation):
    operands = make_operands("groups", "float32")
    active = jnp.asarray([True, False, True, False, False])
    step = functools.partial(lte_inputs_step, method="sigmoid", implementation=implementation)
    moved, found = step(operands).recent, step(operands, active=active).recent
    for b in range(5):
        assert np.array_equal(found[b], moved[b] if active[b] else operands.recent[b])


def test_bad_arguments():
    operands = make_operands("one", "float32")
    with pytest.raises(UnsupportedCase, match="recent has shape"):
        lte_inputs_step(operands._replace(recent=operands.recent[:, 1:]), method="sigmoid")
    with pytest.raises(UnsupportedCase, match="method='tanh' is not one of sigmoid, relu"):
        lte_inputs_step(operands, method="tanh")


@needs_triton
@pytest.mark.parametrize("name", ["one", "many"])
def test_compiles_without_spills(name):
    operands = make_operands(name, "bfloat16")
    step = functools.partial(lte_inputs_step, method="sigmoid", implementation="triton")
    (call,) = triton_call.record_calls(lambda q, k: step(operands._replace(q=q, k=k)), operands.q, operands.k)
    kernel = triton_call.compile_call(call)
    assert kernel.spill_bytes == 0 and "mma" in kernel.ptx
