"""Do the router's Triton kernels still compile within their registers and shared memory, without a GPU?"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import triton_call
from pallas_kernels.dispatch import UnsupportedCase, lowering_for_gpu
from pallas_kernels.router import Convolution, Dropout, router_scores
from tests.kernels import needs_triton

FORWARD = {"_layer_kernel", "_score_kernel"}
BACKWARD = {"_layer_kernel", "_last_kernel", "_weight_kernel", "_data_kernel"}


def spec(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype)


def calls(size, dtype, documents, backward):
    B, T, K = 2, 4096, 16
    channels, convolutions = 2 * size, []
    for _ in range(3):
        weight = spec(jnp.float32, K, 3, channels, channels // 2)
        convolutions.append(Convolution(weight, spec(jnp.float32, K, channels // 2)))
        channels //= 2
    fixed = {"segments": spec(jnp.int32, B, T) if documents else None, "seeds": spec(jnp.uint32, 3, 2)}
    fixed["dr"] = spec(jnp.float32, B, T, K)

    def program(arrays, fixed):
        def run(arrays):
            dropout = Dropout(0.1, fixed["seeds"])
            options = dict(segment_ids=fixed["segments"], dropout=dropout, implementation="triton")
            return router_scores(*arrays, dilations=(2, 2, 2), **options)

        return jax.vjp(run, arrays)[1](fixed["dr"]) if backward else run(arrays)

    x = spec(dtype, B, T, K, size)
    arrays = (x, x, tuple(convolutions), spec(jnp.float32, K, channels), spec(jnp.float32, K))
    return triton_call.record_calls(program, arrays, fixed)


def check(size, dtype, documents, backward):
    compiled = [triton_call.compile_call(call) for call in calls(size, dtype, documents, backward)]
    assert {kernel.name for kernel in compiled} == (FORWARD | BACKWARD if backward else FORWARD)
    for kernel in compiled:
        assert "wgmma" in kernel.ptx or "mma.sync" in kernel.ptx, f"{kernel.name} does not use the tensor cores"
        assert kernel.shared_bytes <= 227 * 1024
        assert kernel.spill_bytes == 0, (
            f"{kernel.name} at head size {size} spills {kernel.spill_bytes} bytes per thread "
            f"({kernel.registers} registers)"
        )


@needs_triton
def test_the_forward_pass_compiles_without_spills():
    check(64, jnp.bfloat16, False, False)


@needs_triton
@pytest.mark.exhaustive
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("size", "dtype"), [(64, jnp.bfloat16), (128, jnp.bfloat16), (64, jnp.float16)])
def test_every_kernel_compiles_without_spills(size, dtype, documents):
    check(size, dtype, documents, True)


@pytest.mark.parametrize(
    ("count", "size", "dtype", "message"),
    [
        (3, 32, jnp.bfloat16, "head size=32 is not one of 64, 128"),
        (3, 256, jnp.bfloat16, "head size=256 is not one of 64, 128"),
        (4, 64, jnp.bfloat16, "4 convolutions leave 8 of 128 channels"),
        (3, 64, jnp.float32, "dtype='float32' is not one of bfloat16, float16"),
    ],
)
def test_what_the_kernels_do_not_do_is_refused_by_name(count, size, dtype, message):
    convolutions, channels = [], 2 * size
    for _ in range(count):
        weight = jnp.zeros((1, 3, channels, channels // 2))
        convolutions.append(Convolution(weight, jnp.zeros((1, channels // 2))))
        channels //= 2
    x = jnp.zeros((1, 4, 2, size), dtype)
    arrays, options = (x, x, convolutions, jnp.zeros((1, channels)), jnp.zeros(1)), dict(dilations=(2,) * count)
    with lowering_for_gpu(), pytest.raises(UnsupportedCase, match=message):
        router_scores(*arrays, **options, implementation="triton")
    assert router_scores(*arrays, **options).shape == (1, 4, 2)
