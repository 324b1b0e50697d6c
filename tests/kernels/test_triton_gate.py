"""Do the Triton kernels still compile for Hopper, within their registers, on a machine without a GPU?

Triton compiles to PTX and its assembler reports registers and spilled bytes. A kernel that spills more than the number
stated here has become slower, even where it is still right.
"""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import triton_call
from pallas_kernels.dispatch import UnsupportedCase, lowering_for_gpu
from pallas_kernels.gated_delta_rule import triton as gated_delta_rule
from pallas_kernels.gated_delta_rule import triton_tiles
from pallas_kernels.short_convolution import short_convolution
from pallas_kernels.window_attention import window_attention_step
from tests.kernels import needs_triton

# Spilled bytes per thread allowed to each kernel, by head size: what the compiler reported when its speed was measured.
SPILLS = {
    ("_within_chunks", 64): 0,
    ("_within_chunks", 128): 0,
    ("_within_chunks", 256): 0,
    ("_scan_chunks", 64): 0,
    ("_scan_chunks", 128): 8,
    ("_scan_chunks", 256): 8,
    ("_reverse_scan", 64): 0,
    ("_reverse_scan", 128): 36,
    ("_reverse_scan", 256): 0,
    ("_pairs", 64): 0,
    ("_pairs", 128): 0,
    ("_pairs", 256): 0,
    ("_gradients", 64): 248,
    ("_gradients", 128): 116,
    ("_gradients", 256): 116,
    ("_join", 64): 0,
    ("_join", 128): 0,
    ("_join", 256): 0,
    ("_one_token", 64): 0,
    ("_one_token", 128): 0,
    ("_one_token", 256): 0,
}
WIDE_SPILLS = {("_scan_chunks", 256): 200, ("_reverse_scan", 256): 112}
WITHOUT_DOTS = ("_one_token",)


def spec(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype)


def _arguments(size: int, packed: bool = False, long: bool = False):
    """Inputs of two rows of 256 tokens, or of one row that is split over the GPU."""
    batch, tokens = (1, 4096) if long else (2, 256)
    q = spec(jnp.bfloat16, batch, tokens, 2, size)
    v = spec(jnp.bfloat16, batch, tokens, 4, size)
    gates = spec(jnp.float32, batch, tokens, 4)
    segment_ids = spec(jnp.int32, batch, tokens) if packed else None
    return q, q, v, gates, gates, segment_ids, spec(jnp.float32, batch, 4, size, size)


def _forward_and_backward(*inputs):
    options = {"scale": 0.1, "normalize": True}
    o, state, _, residuals = gated_delta_rule.forward(*inputs, **options, return_updates=False)
    gradients = gated_delta_rule.backward(*inputs, residuals, o, state, **options)
    q, k, v, g, beta = (x[:, 0] for x in inputs[:5])
    return gradients, gated_delta_rule.step(q, k, v, g, beta, inputs[6], **options, return_update=False)


@needs_triton
@pytest.mark.parametrize(
    ("size", "long"),
    [(128, False)] + [pytest.param(n, long, marks=pytest.mark.exhaustive) for n in (64, 128, 256) for long in (0, 1)],
)
def test_gated_delta_rule_compiles_without_further_spills(size, long):
    calls = triton_call.record_calls(_forward_and_backward, *_arguments(size, long=bool(long)))
    compiled = [triton_call.compile_call(call) for call in calls]
    names = {name for name, _ in SPILLS if long or name != "_join"}
    assert {kernel.name for kernel in compiled} == names
    for kernel in compiled:
        dots = ("wgmma", "mma.sync")  # wgmma takes 64 rows; smaller blocks are left to the older instruction
        assert any(x in kernel.ptx for x in dots) or kernel.name in WITHOUT_DOTS, f"{kernel.name} has no tensor cores"
        assert kernel.shared_bytes <= 227 * 1024
        assert kernel.spill_bytes <= SPILLS[kernel.name, size], (
            f"{kernel.name} at head size {size} spills {kernel.spill_bytes} bytes per thread "
            f"({kernel.registers} registers); {SPILLS[kernel.name, size]} are allowed"
        )


@needs_triton
@pytest.mark.exhaustive
@pytest.mark.parametrize("size", [128, 256])
def test_wide_scans_compile_without_further_spills(size, monkeypatch):
    always = {key: (0, tile) for key, (_, tile) in triton_tiles._WIDE.items()}
    monkeypatch.setattr(triton_tiles, "_WIDE", always)
    calls = triton_call.record_calls(_forward_and_backward, *_arguments(size))
    for call in calls:
        name = call.kernel.__name__
        if name in ("_scan_chunks", "_reverse_scan"):
            scan = triton_call.compile_call(call)
            assert "wgmma" in scan.ptx
            assert scan.spill_bytes <= WIDE_SPILLS.get((name, size), 0)


SLOTS = 2**31 // (16 * 128)
LARGE = {
    "rows of the short convolution": (
        lambda x, w: short_convolution(x, w, implementation="triton"),
        (spec(jnp.bfloat16, 65_536, 2, 16), spec(jnp.float32, 4, 16)),
        "65536 rows; a grid has at most 65535",
    ),
    "rows of the short convolution under vmap": (
        jax.vmap(lambda x, w: short_convolution(x, w, implementation="triton")[0], in_axes=(0, None)),
        (spec(jnp.bfloat16, 2, 32_768, 2, 16), spec(jnp.float32, 4, 16)),
        r"_forward: \(1, 1, 65536\) programs; all axes but the first have at most 65535",
    ),
    "numbers in a row of the short convolution": (
        lambda x, w: short_convolution(x, w, implementation="triton"),
        (spec(jnp.bfloat16, 1, 2**21, 1024), spec(jnp.float32, 4, 1024)),
        "2097152 tokens of 1024 channels are more than a 32-bit index of a row reaches",
    ),
    "heads of a decode step": (
        lambda q, k, n: window_attention_step(q, k, k, n, implementation="triton"),
        (spec(jnp.bfloat16, 4096, 16, 64), spec(jnp.bfloat16, 4096, 3, 16, 64), spec(jnp.int32, 4096, 16)),
        "B K = 65536; a grid has at most 65535",
    ),
    "numbers in a row of a cache": (
        lambda q, k, n: window_attention_step(q, k, k, n, implementation="triton"),
        (spec(jnp.bfloat16, 1, 16, 128), spec(jnp.bfloat16, 1, SLOTS, 16, 128), spec(jnp.int32, 1, 16)),
        "the slots of a row hold 2147483648 numbers, which are counted in 32 bits",
    ),
}


@needs_triton
@pytest.mark.parametrize("name", LARGE)
def test_what_a_grid_or_32_bits_do_not_count_is_refused(name):
    function, arrays, message = LARGE[name]
    with pytest.raises(UnsupportedCase, match=message):
        triton_call.record_calls(function, *arrays)


def test_without_triton_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(triton_call, "triton", None)
    with lowering_for_gpu(), pytest.raises(UnsupportedCase, match=r"pip install '\.\[cuda\]'"):
        triton_call.check_installed("gated_delta_rule")
