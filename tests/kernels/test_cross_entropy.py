"""Cross-entropy with its gradient against float64, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.cross_entropy import cross_entropy
from pallas_kernels.dispatch import UnsupportedCase
from tests.tolerances import rms_error

# Rows, vocabulary: within one block of the kernel, at its edge, over it, and over several with a rest.
SIZES = [(5, 3), (7, 17), (3, 8192), (3, 8193), (2, 20011)]


def inputs(rows, vocabulary, scale=3.0, seed=0):
    """Logits of some spread, labels of which one asks nothing and one is the largest."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, scale, (rows, vocabulary)).astype(np.float32)
    labels = rng.integers(0, vocabulary, rows).astype(np.int32)
    labels[0], labels[-1] = -1, np.argmax(logits[-1])
    return logits, labels


def truth(logits, labels):
    """In float64, row by row."""
    loss, correct, gradient = [], [], []
    for row, label in zip(logits.astype(np.float64), labels, strict=True):
        weights = np.exp(row - row.max())
        loss.append(0.0 if label < 0 else np.log(weights.sum()) + row.max() - row[label])
        correct.append(float(label >= 0 and int(np.argmax(row)) == label))
        gradient.append(np.zeros_like(row) if label < 0 else weights / weights.sum() - np.eye(1, len(row), label)[0])
    return np.array(loss), np.array(correct), np.array(gradient)


@pytest.mark.rotating(5)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loss_and_gradient_against_float64(implementation, size, dtype):
    logits, labels = inputs(*size)
    loss, correct, gradient = cross_entropy(logits, labels, dtype=dtype, implementation=implementation)
    expected = truth(logits, labels)
    assert gradient.dtype == jnp.dtype(dtype)
    np.testing.assert_array_equal(correct, expected[1])
    assert rms_error(loss, expected[0]) < 1e-6
    assert rms_error(gradient, expected[2]) < (1e-6 if dtype == "float32" else 3e-3)
    assert loss[0] == 0 and not np.any(np.asarray(gradient[0], np.float32))


def test_large_logits_equal_ones_and_minus_infinity(implementation):
    logits, labels = inputs(6, 16411)
    logits[1] += 1e4  # an exponential of these overflows
    logits[2, :8192] = -np.inf  # a whole block counts for nothing
    labels[2] = 9000
    logits[3] = 0.25  # all equal: the first column is the best
    labels[3] = 0
    logits[4] = 0.25
    labels[4] = 8500
    loss, correct, gradient = cross_entropy(logits, labels, implementation=implementation)
    expected = truth(logits, labels)
    np.testing.assert_array_equal(correct, expected[1])
    np.testing.assert_allclose(loss, expected[0], rtol=1e-6, atol=2e-3)  # of 1e4, an ulp is 1e-3
    for row in range(6):
        assert rms_error(gradient[row], expected[2][row]) < (1e-3 if row == 1 else 1e-6), row
    assert not np.any(gradient[2, :8192])


def test_what_is_not_finite_shows_in_the_loss(implementation):
    logits, labels = inputs(4, 9000)
    logits[1, 8500] = np.nan
    logits[2, 10] = np.inf
    loss, _, _ = cross_entropy(logits, labels, implementation=implementation)
    assert not np.isfinite(loss[1]) and not np.isfinite(loss[2]) and np.isfinite(loss[3])


def test_a_label_beyond_the_columns_makes_its_loss_nan_and_no_other(implementation):
    """In the last row, where the number that it points at belongs to no array."""
    logits, labels = inputs(4, 9000)
    labels[3] = 9000
    loss, correct, gradient = cross_entropy(logits, labels, implementation=implementation)
    expected = truth(logits[:3], labels[:3])
    assert np.isnan(loss[3]) and correct[3] == 0.0
    assert rms_error(loss[:3], expected[0]) < 1e-6 and rms_error(gradient[:3], expected[2]) < 1e-6


def test_a_gradient_through_it_is_zero(implementation):
    logits, labels = inputs(3, 40)
    found = jax.grad(lambda z: cross_entropy(z, labels, implementation=implementation)[0].sum())(logits)
    assert not np.any(found)


def test_the_same_bits_twice(implementation):
    logits, labels = inputs(9, 17001)
    first, second = (cross_entropy(logits, labels, dtype=jnp.bfloat16, implementation=implementation) for _ in "ab")
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(logits=np.zeros((2, 3), np.float16)), "logits has dtype float16; it must be float32"),
        (dict(logits=np.zeros((2, 3, 1), np.float32)), r"logits has shape .* \[rows, L\]"),
        (dict(labels=np.zeros(2, np.int64)), "labels has dtype int64; it must be int32"),
        (dict(labels=np.zeros(3, np.int32)), "labels has shape .* with rows = 2"),
        (dict(labels=None), "labels has type NoneType"),
        (dict(dtype=jnp.int32), "dtype='int32' is not one of"),
        (dict(implementation="pallas"), "does not exist yet; there is triton, xla"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = dict(logits=np.zeros((2, 3), np.float32), labels=np.zeros(2, np.int32)) | change
    with pytest.raises(UnsupportedCase, match=message):
        cross_entropy(arguments.pop("logits"), arguments.pop("labels"), **arguments)


def test_vmap_of_the_reference():
    logits, labels = inputs(6, 40)
    pairs = jax.vmap(cross_entropy)(logits.reshape(2, 3, 40), labels.reshape(2, 3))
    for batched, whole in zip(pairs, cross_entropy(logits, labels), strict=True):
        np.testing.assert_array_equal(batched.reshape(whole.shape), whole)
