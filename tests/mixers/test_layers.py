"""Do the small layers follow their equations, and their gradients too where these are written by hand?"""

import jax
import jax.numpy as jnp
import numpy as np

from lte_jax.layers import rotary


def test_rotary_turns_complex_numbers_and_its_gradient_turns_them_back():
    random = np.random.default_rng(0)
    x, dy = random.normal(size=(2, 2, 9, 3, 10))
    positions = random.integers(0, 200, (2, 9))
    angles = positions[:, :, None, None] * 1e4 ** (-np.arange(5) / 5)

    def turned(x, sign):
        z = (x[..., :5] + 1j * x[..., 5:]) * np.exp(sign * 1j * angles)
        return np.concatenate([z.real, z.imag], -1)

    run = lambda x: rotary(x, jnp.asarray(positions, jnp.int32), 1e4)  # noqa: E731
    y, pullback = jax.vjp(run, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(y, turned(x, 1), atol=1e-4)
    np.testing.assert_allclose(pullback(jnp.asarray(dy, jnp.float32))[0], turned(dy, -1), atol=1e-4)
    low, pullback = jax.vjp(run, jnp.asarray(x, jnp.bfloat16))
    assert low.dtype == pullback(low)[0].dtype == jnp.bfloat16
