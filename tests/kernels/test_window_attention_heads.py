"""Do the kernels of window attention hold at every head size, with all kinds of keys in one call, in used memory?"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.window_attention.api import OPERATION
from tests.kernels.test_window_attention import Setup, check_rounded, cotangents, make, rounded, with_gradients

pytestmark = pytest.mark.gpu
backends = pytest.mark.parametrize("backend", [name for name in OPERATION.implementations if name != "xla"])
# Longer than every kernel's tiles, with windows that begin and documents that end inside them.
SETUP = Setup(301, 333, 70, C=77, expiry="until", documents="padded", B=1, K=2, G=2)
SIZES = [
    (64, 64, "bfloat16"),
    (128, 128, "bfloat16"),
    (256, 256, "bfloat16"),
    (72, 40, "bfloat16"),
    (96, 192, "float16"),
]


@backends
@pytest.mark.parametrize("N, V, dtype", SIZES)
def test_head_sizes(N, V, dtype, backend):
    """Sizes that have tiles of their own, and sizes between, which are padded."""
    setup = dataclasses.replace(SETUP, N=N, V=V)
    check_rounded(setup, make(setup), dtype, backend, runs=2)


def fill_free_memory() -> None:
    """Leaves NaN in the memory that the next arrays and scratch buffers are cut from."""
    jax.block_until_ready([jnp.full((1 << size,), jnp.nan) for size in range(8, 26) for _ in range(4)])


@backends
@pytest.mark.parametrize("name", ["all at once", "a long list"])
def test_unwritten_memory_is_not_read(name, backend):
    """The same bits whatever the buffers held before."""
    other = dataclasses.replace(SETUP, T=260, U=260, C=0, expiry="one head", documents="")
    setup = dataclasses.replace(SETUP if name == "all at once" else other, N=64, V=64)
    a, (do, dlse) = rounded(make(setup), "bfloat16"), cotangents(setup)
    do = np.asarray(jnp.asarray(do, "bfloat16"))
    runs = []
    for _ in range(2):
        fill_free_memory()
        runs.append(with_gradients(setup, a, do, dlse, backend))
    jax.tree.map(np.testing.assert_array_equal, *runs)
    finite = jax.tree.map(lambda x: bool(np.isfinite(x).all()), (runs[0][0]["o"], runs[0][1]))
    assert all(jax.tree.leaves(finite))
