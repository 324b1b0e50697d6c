"""Do the Triton kernels of window attention still compile within their registers and shared memory, without a GPU?"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import triton_call
from pallas_kernels.dispatch import UnsupportedCase
from pallas_kernels.window_attention import (
    Columns,
    DecodeCache,
    triton,
    triton_tiles,
    window_attention,
    window_attention_step,
    window_attention_update_step,
)
from tests.kernels import needs_triton

pytestmark = needs_triton

# Shared memory that one program may have, in KB, by compute capability.
SHARED = {80: 163, 89: 99, 90: 227, 120: 99}
# Spilled bytes per thread allowed on Hopper, by head size and kernel; 0 without an entry, and for every other GPU. With
# documents and columns the kernel of keys spills some. Tiles that do not were slower on an H200, without either: 32 x
# 64 for heads of 128, 0.65 ms against 0.48, and 32 x 32 for heads of 256, 0.90 against 0.54.
SPILLS = {
    64: {"_dkv_kernel": 64},
    128: {"_dkv_kernel": 96},
    256: {"_dq_kernel": 8, "_dkv_kernel": 280},
}


def spec(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype)


def attention_calls(size, dtype=jnp.bfloat16, columns=0, documents=False):
    """Every kernel call of the forward and the backward pass."""
    B, T, H, K = 2, 1024, 4, 2
    arrays = [spec(dtype, B, T, H, size), spec(dtype, B, T, K, size), spec(dtype, B, T, K, size)]
    fixed = {"expiry": spec(jnp.int32, B, T, K)}
    if documents:
        fixed["segment_ids"] = spec(jnp.int32, B, T)
    held = [spec(dtype, B, columns, K, size)] * 2 if columns else []
    slots = [spec(jnp.int32, B, columns, K)] * 2 if columns else []

    def program(arrays, scores, held, slots, fixed):
        def attend(arrays, scores, held):
            store = Columns(*held, *slots) if held else None
            return window_attention(
                *arrays, scores, window=300, columns=store, return_lse=True, implementation="triton", **fixed
            )

        o, pullback = jax.vjp(attend, arrays, scores, held)
        return pullback(o)

    return triton_call.record_calls(program, arrays, spec(jnp.float32, B, T, K), held, slots, fixed)


def step_calls(size, group, dtype=jnp.bfloat16):
    B, K, R, M = 4, 2, 65, 32
    cache = DecodeCache(
        spec(dtype, B, R, K, size),
        spec(dtype, B, R, K, size),
        spec(jnp.float32, B, R, K),
        spec(dtype, B, M, K, size),
        spec(dtype, B, M, K, size),
        spec(jnp.int32, B, M, K),
        spec(jnp.float32, B, M, K),
    )

    def program(q, k, v, score, cache, length):
        options = {"implementation": "triton"}
        o, _ = window_attention_update_step(q, k, v, score, cache, length, sinks=4, reach=6, **options)
        valid = (jnp.ones((B, R, K), bool), jnp.ones((B, K), jnp.int32))
        return o, window_attention_step(
            q, (cache.ring_k, cache.store_k), (cache.ring_v, cache.store_v), valid, **options
        )

    token = spec(dtype, B, K, size)
    return triton_call.record_calls(
        program, spec(dtype, B, K * group, size), token, token, spec(jnp.float32, B, K), cache, spec(jnp.int32, B)
    )


def check(calls, capability, wanted, allowance):
    """``allowance``: spilled bytes per kernel name, 0 without an entry."""
    compiled = [triton_call.compile_call(call, capability) for call in calls]
    assert {kernel.name for kernel in compiled} == wanted
    for kernel in compiled:
        allowed = allowance.get(kernel.name, 0)
        assert kernel.spill_bytes <= allowed, (
            f"{kernel.name} {kernel.constexprs.get('KIND', '')} for sm_{capability} spills {kernel.spill_bytes} bytes "
            f"per thread ({kernel.registers} registers); {allowed} are allowed"
        )
        assert kernel.shared_bytes <= SHARED[capability] * 1024, f"{kernel.name}: {kernel.shared_bytes} bytes"
        if capability == 90 and kernel.name in ("_forward_kernel", "_dq_kernel", "_dkv_kernel"):
            assert "wgmma" in kernel.ptx or kernel.constexprs["PRECISION"] != "tf32", f"{kernel.name}: no tensor cores"


PASSES = {"_list_kernel", "_forward_kernel", "_dq_kernel", "_dkv_kernel"}
STEPS = {"_part_kernel", "_join_kernel", "_update_part_kernel", "_update_join_kernel"}


def test_training_kernels_compile_without_spills():
    check(attention_calls(64), 90, PASSES, {"_dkv_kernel": 16})


def test_decode_kernels_compile_without_spills():
    check(step_calls(64, 1), 90, STEPS, {})


@pytest.mark.parametrize("documents", [False, True])
def test_loads_ahead_of_a_loop_keep_their_masks(documents):
    """A tile of keys may have no whole tile of queries: what the pipeline loads first must then not be read.

    The number of bytes of an asynchronous copy is its mask: where the compiler takes a loop's rounds for granted, it is
    a constant, and rows behind the end of an array are read.
    """
    for call in attention_calls(64, columns=77, documents=documents):
        kernel = triton_call.compile_call(call)
        sizes = re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*, (%r\d+);", kernel.ptx)
        constants = set(re.findall(r"mov\.b32\s+(%r\d+), \d+;", kernel.ptx))
        assert sizes or kernel.name != "_dkv_kernel", "no asynchronous copies: look for another form of them"
        assert not constants.intersection(sizes), f"{kernel.name} {kernel.constexprs.get('KIND', '')}"


@pytest.mark.parametrize("name", triton_tiles.TOGETHER)
@pytest.mark.parametrize("heads", [1, 7, 96, 65_535, 65_536, 131_072, 65_537])
def test_no_axis_of_a_grid_is_longer_than_a_gpu_takes(heads, name):
    together = triton_tiles.heads_together(heads, name)
    columns, rows = triton_tiles.grid_of(heads, 5, together)
    assert columns * rows == 5 * heads and rows <= 65_535
    assert together <= triton_tiles.TOGETHER[name] or heads > 65_535


@pytest.mark.exhaustive
@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize(
    "dtype, size", [("bfloat16", 64), ("bfloat16", 128), ("bfloat16", 256), ("float16", 64), ("float32", 64)]
)
def test_every_kernel_compiles(dtype, size, capability, monkeypatch):
    """The variants with documents and columns, which need the most registers."""
    monkeypatch.setattr(triton_tiles, "capability", lambda: capability)
    monkeypatch.setattr(triton, "capability", lambda: capability)
    allowance = SPILLS[size] if capability == 90 and dtype != "float32" else {}
    if dtype == "float32" and SHARED[capability] < 100:
        with pytest.raises(UnsupportedCase, match=rf"float32 with head sizes N=64, V=64 on {capability / 10}"):
            attention_calls(size, jnp.dtype(dtype))
    else:
        check(attention_calls(size, jnp.dtype(dtype), columns=33, documents=True), capability, PASSES, allowance)
    for group in (1, 4):
        check(step_calls(size, group, jnp.dtype(dtype)), capability, STEPS, allowance)


def test_float32_of_large_heads_is_refused_before_a_launch():
    with pytest.raises(UnsupportedCase, match="float32 with head sizes N=128, V=128"):
        attention_calls(128, jnp.float32)


@pytest.mark.parametrize("capability", [86, 89, 120])
def test_tiles_for_99_kilobytes(capability, monkeypatch):
    """What is compiled for 8.9 serves every GPU with as little shared memory, newer than Hopper or not."""
    for module in (triton_tiles, triton):
        monkeypatch.setattr(module, "capability", lambda: capability)
    passes = {call.kernel.__name__: call for call in attention_calls(64)}
    dkv, small = passes["_dkv_kernel"], triton_tiles.SMALL_TILES["dkv", 64]
    assert (dict(dkv.constexprs)["QUERIES"], dkv.num_stages) == (small.queries, small.stages) == (32, 2)
    with pytest.raises(UnsupportedCase, match=rf"float32 with head sizes N=64, V=64 on {capability / 10}"):
        attention_calls(64, jnp.float32)
