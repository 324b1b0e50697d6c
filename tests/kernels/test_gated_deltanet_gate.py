"""Do the Triton kernels around the gated delta rule still compile within their registers, without a GPU?"""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import triton_call
from pallas_kernels.gated_deltanet import Parameters, Projections, State, gated_deltanet_step
from pallas_kernels.rms_norm import residual_rms_norm, rms_norm
from pallas_kernels.short_convolution import short_convolution
from tests.kernels import needs_triton

pytestmark = needs_triton

# Spilled bytes per thread allowed, by kernel and case, what the compiler said rounded up; 0 without an entry.
SPILLS = {
    ("_backward", "packed, state"): 16,
    ("_layer_token", "(1, 2, 256, 512)"): 24,
}


def spec(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype)


def convolution(packed: bool, state: bool, taps: int = 4, width: int = 1024):
    def run(x, weight, ids, initial):
        options = dict(segment_ids=ids, initial_state=initial, implementation="triton")
        outputs, pullback = jax.vjp(lambda *a: short_convolution(*a[:2], **options | dict(initial_state=a[2])),
                                    x, weight, initial)  # fmt: skip
        return pullback(outputs if state else (outputs[0], jnp.zeros_like(outputs[1])))

    x = spec(jnp.bfloat16, 2, 1000 if state else 1024, width)
    ids = spec(jnp.int32, *x.shape[:2]) if packed else None
    initial = spec(jnp.bfloat16, 2, taps - 1, width) if state else None
    return triton_call.record_calls(run, x, spec(jnp.float32, taps, width), ids, initial)


def norm(width: int, gated: bool):
    def run(x, weight, gate):
        y, pullback = jax.vjp(lambda *a: rms_norm(*a, eps=1e-6, implementation="triton"), x, weight, gate)
        return pullback(y)

    x = spec(jnp.bfloat16, 512, width)
    return triton_call.record_calls(run, x, spec(jnp.float32, width), x if gated else None)


def stream(width: int):
    def run(x, weight):
        outputs, pullback = jax.vjp(lambda *a: residual_rms_norm(*a, eps=1e-6, implementation="triton"), x, weight)
        return pullback(outputs)

    return triton_call.record_calls(run, spec(jnp.bfloat16, 512, width), spec(jnp.float32, width))


def step(batch: int, key_heads: int, heads: int, size: int, value_size: int):
    B, keys, values = batch, key_heads * size, heads * value_size
    low, high = jnp.bfloat16, jnp.float32
    inputs = Projections(
        spec(low, B, keys), spec(low, B, keys), spec(low, B, values), spec(low, B, heads), spec(low, B, heads),
        spec(low, B, values),
    )  # fmt: skip
    parameters = Parameters(
        spec(high, 4, keys), spec(high, 4, keys), spec(high, 4, values), spec(high, heads), spec(high, heads),
        spec(high, value_size),
    )  # fmt: skip
    last = [spec(low, B, 3, width) for width in (keys, keys, values)]
    state = State(spec(high, B, heads, size, value_size), *last)
    run = lambda *a: gated_deltanet_step(*a, eps=1e-6, implementation="triton")  # noqa: E731
    return triton_call.record_calls(run, inputs, parameters, state)


def check(calls, names, case="", capability=90):
    compiled = [triton_call.compile_call(call, capability) for call in calls]
    assert [kernel.name for kernel in compiled] == names
    for kernel in compiled:
        allowed = SPILLS.get((kernel.name, case), 0)
        assert kernel.spill_bytes <= allowed, (
            f"{kernel.name} ({case}) for sm_{capability} spills {kernel.spill_bytes} bytes per thread "
            f"({kernel.registers} registers); {allowed} are allowed"
        )
    return compiled


def test_convolution_compiles_without_spills():
    forward, backward = check(convolution(False, False), ["_forward", "_backward"])
    # What the speed rests on: 8 bytes for each load, eight rows of them (of x and dy) at a time, and many warps.
    assert forward.ptx.count("ld.global.v2.b32") >= 8 and backward.ptx.count("ld.global.v2.b32") >= 16
    assert forward.registers <= 64 and backward.registers <= 128


def test_packed_convolution_compiles_without_spills():
    check(convolution(True, False), ["_forward", "_backward"], "packed")


@pytest.mark.exhaustive
@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize("packed, state", [(False, True), (True, True)])
@pytest.mark.parametrize("taps, width", [(2, 96), (4, 1024)])
def test_every_convolution_compiles(packed, state, taps, width, capability):
    case = f"{'packed, ' * packed}state"
    check(convolution(packed, state, taps, width), ["_forward", "_backward"], case, capability)


@pytest.mark.parametrize("width, gated", [(128, True), (1024, False)])
def test_norm_compiles_without_spills(width, gated):
    check(norm(width, gated), ["_forward", "_backward"])


@pytest.mark.parametrize("width", [1024, 2048])
def test_norm_of_a_stream_compiles_without_spills(width):
    """Registers for both of the rows that it holds, at 4 warps and 4 programs a multiprocessor."""
    forward, backward = check(stream(width), ["_forward", "_stream_backward"])
    assert forward.num_warps == backward.num_warps == 4 and backward.registers <= 128


@pytest.mark.parametrize("batch", [1, 64])
def test_step_is_one_kernel_without_spills(batch):
    check(step(batch, 8, 8, 128, 128), ["_layer_token"])


@pytest.mark.exhaustive
@pytest.mark.parametrize("batch", [1, 64])
@pytest.mark.parametrize("sizes", [(2, 4, 64, 128), (1, 1, 256, 256), (1, 2, 256, 512), (4, 4, 128, 256)], ids=str)
def test_every_step_compiles(batch, sizes):
    check(step(batch, *sizes), ["_layer_token"], str(sizes))
