"""Do the router's Triton kernels still compile within their registers and shared memory, without a GPU?"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import triton_call
from pallas_kernels.dispatch import UnsupportedCase, lowering_for_gpu
from pallas_kernels.router import Convolution, Dropout, router_scores

needs_triton = pytest.mark.skipif(
    triton_call.triton is None, reason="triton is not installed; pip install -e '.[gate]'"
)

# Spilled bytes per thread allowed, by dtype and head size, what the compiler said rounded up; 0 without an entry.
SPILLS = {
    ("bfloat16", 128): {"_first_kernel": 136, "_last_kernel": 640, "_data_kernel": 48},
    ("float32", 64): {
        "_first_kernel": 1032, "_last_kernel": 520, "_data_kernel": 352, "_weight_kernel": 1024, "_input_kernel": 104,
    },
}  # fmt: skip
FORWARD = {"_first_kernel", "_last_kernel"}


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

    def program(arrays, fixed):
        def run(arrays):
            dropout = Dropout(0.1, fixed["seeds"])
            options = dict(segment_ids=fixed["segments"], dropout=dropout, implementation="triton")
            return router_scores(*arrays, dilations=(2, 2, 2), **options)

        if not backward:
            return run(arrays)
        r, pullback = jax.vjp(run, arrays)
        return pullback(r)

    x = spec(dtype, B, T, K, size)
    arrays = (x, x, tuple(convolutions), spec(jnp.float32, K, channels), spec(jnp.float32, K))
    return triton_call.record_calls(program, arrays, fixed)


def check(size, dtype, documents, backward, capability=90):
    wanted = FORWARD | ({"_data_kernel", "_input_kernel", "_weight_kernel"} if backward else set())
    compiled = [triton_call.compile_call(call, capability) for call in calls(size, dtype, documents, backward)]
    assert {kernel.name for kernel in compiled} == wanted
    allowance = SPILLS.get((jnp.dtype(dtype).name, size), {})
    for kernel in compiled:
        assert "wgmma" in kernel.ptx or "mma.sync" in kernel.ptx, f"{kernel.name} does not use the tensor cores"
        assert kernel.shared_bytes <= 227 * 1024
        allowed = allowance.get(kernel.name, 0)
        assert kernel.spill_bytes <= allowed, (
            f"{kernel.name} at head size {size}, {jnp.dtype(dtype).name}, spills {kernel.spill_bytes} bytes per thread "
            f"({kernel.registers} registers); {allowed} are allowed"
        )


@needs_triton
def test_the_forward_pass_compiles_without_spills():
    check(64, jnp.bfloat16, False, False)


@needs_triton
@pytest.mark.exhaustive
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("size", "dtype"), [(64, jnp.bfloat16), (128, jnp.bfloat16), (64, jnp.float32)])
def test_every_kernel_compiles_without_further_spills(size, dtype, documents):
    check(size, dtype, documents, True)


@pytest.mark.parametrize(
    ("taps", "dilations", "size", "message"),
    [
        ((3, 3), (2, 2), 64, "three of three taps"),
        ((3, 5, 3), (2, 2, 2), 64, "three of three taps"),
        ((3, 3, 3), (2, 2, 4), 64, "at one dilation"),
        ((3, 3, 3), (65, 65, 65), 64, "dilation 65 is above 64"),
        ((3, 3, 3), (2, 2, 2), 32, "head size=32 is not one of 64, 128"),
    ],
)
def test_what_the_kernels_do_not_do_is_refused_by_name(taps, dilations, size, message):
    convolutions, channels = [], 2 * size
    for count in taps:
        weight = jnp.zeros((1, count, channels, channels // 2))
        convolutions.append(Convolution(weight, jnp.zeros((1, channels // 2))))
        channels //= 2
    x = jnp.zeros((1, 4, 2, size))
    with lowering_for_gpu(), pytest.raises(UnsupportedCase, match=message):
        router_scores(
            x, x, convolutions, jnp.zeros((1, channels)), jnp.zeros(1), dilations=dilations, implementation="triton"
        )
