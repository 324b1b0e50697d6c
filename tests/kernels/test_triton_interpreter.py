"""Do kernels run without a GPU in Triton's interpreter, and is an access outside a call's arrays an error there?

Triton reads TRITON_INTERPRET when it is imported: in a process of its own.
"""

import os
import subprocess
import sys

from tests.kernels import needs_triton

pytestmark = needs_triton

PROGRAM = """
import jax
import jax.numpy as jnp
import numpy as np
from pallas_kernels.dispatch import lowering_for_gpu
from pallas_kernels.short_convolution import short_convolution
from pallas_kernels.triton_call import jit, tl, triton_call

@jit
def _double(x_ptr, y_ptr, SIZE: tl.constexpr, CHECKED: tl.constexpr):
    i = tl.arange(0, 16)
    x = tl.load(x_ptr + i, mask=(i < SIZE) | (not CHECKED), other=0.0)
    tl.store(y_ptr + i, 2 * x, mask=i < SIZE - 1)

x = np.arange(11, dtype=np.float32)
run = lambda checked: triton_call(_double, x, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), grid=(1,), SIZE=11,
                                  CHECKED=checked)
y = np.asarray(run(True))
np.testing.assert_array_equal(y[:10], 2 * x[:10])
assert np.isnan(y[10]), "nothing has written the last number"
try:
    jax.block_until_ready(run(False))
except jax.errors.JaxRuntimeError as error:
    print(next(line for line in str(error).splitlines() if "OutOfBounds" in line))

rows, weight = (np.random.default_rng(0).normal(size=shape).astype(np.float32) for shape in ((2, 37, 19), (4, 19)))
with lowering_for_gpu():
    found = short_convolution(rows, weight, implementation="triton")[0]
np.testing.assert_allclose(found, short_convolution(rows, weight, implementation="xla")[0], atol=1e-5)
print("equal")

@jit
def _arithmetic(x_ptr, y_ptr, z_ptr, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, tl.dot(x, tl.trans(x)))
    tl.store(z_ptr + at, (x * x - 0.5).to(tl.bfloat16))

x = np.random.default_rng(0).normal(size=(16, 16)).astype(jnp.bfloat16)
shapes = jax.ShapeDtypeStruct(x.shape, np.float32), jax.ShapeDtypeStruct(x.shape, x.dtype)
product, square = triton_call(_arithmetic, x, out_shape=shapes, grid=(1,), N=16)
wide = x.astype(np.float64)
np.testing.assert_allclose(product, wide @ wide.T, rtol=1e-5, atol=1e-5)
np.testing.assert_array_equal(square, ((wide * wide).astype(x.dtype).astype(np.float64) - 0.5).astype(x.dtype))
print("bfloat16")
"""


def test_addresses_are_checked_what_is_not_written_is_nan_and_bfloat16_is_rounded():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    fault, equal, bfloat16 = done.stdout.splitlines()
    assert "_double: program (0, 0, 0) reads 5 of 16 numbers outside its arrays" in fault
    assert "44 bytes from the start of 'x_ptr', which has 44" in fault and equal == "equal"
    assert bfloat16 == "bfloat16"
