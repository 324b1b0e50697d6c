"""The router in triton.language: one kernel per convolution, each reading its inputs once from memory.

A program has a tile of one head's tokens. The taps of a convolution are shifted loads of the same tile, which the first
level of cache holds, and products in the tensor cores; bias, padding and SiLU follow in registers. Between kernels x_n
lies as [B,K,T,C_n] in the inputs' dtype: half of k and v together, then a quarter of that.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.arguments import Arguments
from pallas_kernels.router.api import Case, Gradients, Operands
from pallas_kernels.router.triton_tiles import call_layer, convolve, convolve_tiles, documents, inputs_of, silu
from pallas_kernels.tiles import ceil_div
from pallas_kernels.triton_call import LONGEST_AXIS, check_installed, jit, tl

SIZES = (64, 128)
DTYPES = ("bfloat16", "float16")


@jit
def _convolution(
    lo, hi, weight, bias, segments, seeds, b, h, t, o, T, tokens, heads,
    K: tl.constexpr, HALF: tl.constexpr, O: tl.constexpr, TAPS: tl.constexpr, DILATION: tl.constexpr,
    LAYER: tl.constexpr, SHARED: tl.constexpr, THRESHOLD: tl.constexpr, SCALE: tl.constexpr,
    SEGMENTS: tl.constexpr, ROWS: tl.constexpr, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """(channels o of a tile before SiLU, whatever stands at padding; its documents)."""
    lo, hi, stride = inputs_of(lo, hi, b, h, T, K, HALF, LAYER)
    own: tl.constexpr = 0 if SHARED else 1
    segments += b * T
    document = documents(segments, t, T, SEGMENTS)
    acc = convolve(
        lo, hi, stride, weight + own * h * TAPS * 2 * HALF * O, segments, document, seeds, b, h, t, o, T, tokens, heads,
        HALF, O, TAPS, DILATION, LAYER, THRESHOLD, SEGMENTS, ROWS, INPUTS, OUTPUTS,
    )  # fmt: skip
    return acc * SCALE + tl.load(bias + own * h * O + o)[None, :], document


@jit
def _layer_kernel(
    lo, hi, weight, bias, segments, seeds, T, tokens, heads, out,
    K: tl.constexpr, HALF: tl.constexpr, O: tl.constexpr, TAPS: tl.constexpr, DILATION: tl.constexpr,
    LAYER: tl.constexpr, SHARED: tl.constexpr, THRESHOLD: tl.constexpr, SCALE: tl.constexpr,
    SEGMENTS: tl.constexpr, ROWS: tl.constexpr, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, SLOPES: tl.constexpr,
):  # fmt: skip
    """x_n of a tile, and, where SLOPES, behind all of x_n the slope of SiLU there: out is [1 or 2,B,K,T,O]."""
    blocks: tl.constexpr = O // OUTPUTS
    h = tl.program_id(0) // blocks
    o = tl.program_id(0) % blocks * OUTPUTS + tl.arange(0, OUTPUTS)
    t = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    b = tl.program_id(2)
    y, document = _convolution(
        lo, hi, weight, bias, segments, seeds, b, h, t, o, T, tokens, heads, K, HALF, O, TAPS, DILATION, LAYER, SHARED,
        THRESHOLD, SCALE, SEGMENTS, ROWS, INPUTS, OUTPUTS,
    )  # fmt: skip
    y = tl.where((document != 0)[:, None], y, 0.0)
    x, slope = silu(y)
    place = b.to(tl.int64) * T * K
    where = out + (place + h * T) * O + t[:, None] * O + o[None, :]
    tl.store(where, x.to(out.dtype.element_ty), mask=(t < T)[:, None])
    if SLOPES:
        slopes = where + tl.num_programs(2).to(tl.int64) * T * K * O
        tl.store(slopes, slope.to(out.dtype.element_ty), mask=(t < T)[:, None])


@jit
def _score_kernel(
    lo, hi, weight, bias, map_weight, map_bias, segments, seeds, T, tokens, heads, r,
    K: tl.constexpr, HALF: tl.constexpr, O: tl.constexpr, TAPS: tl.constexpr, DILATION: tl.constexpr,
    LAYER: tl.constexpr, SHARED: tl.constexpr, THRESHOLD: tl.constexpr, SCALE: tl.constexpr,
    SEGMENTS: tl.constexpr, ROWS: tl.constexpr, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """The last convolution of a tile, and its scores."""
    h = tl.program_id(0)
    t = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    b = tl.program_id(2)
    y, _, document = last_layer(
        lo, hi, weight, bias, segments, seeds, b, h, t, T, tokens, heads, K, HALF, O, TAPS, DILATION, LAYER, SHARED,
        THRESHOLD, SCALE, SEGMENTS, ROWS, INPUTS,
    )  # fmt: skip
    own: tl.constexpr = 0 if SHARED else 1
    o = tl.arange(0, O)
    z = tl.sum(y * tl.load(map_weight + own * h * O + o)[None, :], 1) + tl.load(map_bias + own * h)
    score = tl.maximum(z, 0.0) if RELU else tl.sigmoid(z) - 0.5
    score = tl.where(document != 0, score, 0.0)
    tl.store(r + b.to(tl.int64) * T * K + t * K + h, score, mask=t < T)


@jit
def last_layer(
    lo, hi, weight, bias, segments, seeds, b, h, t, T, tokens, heads,
    K: tl.constexpr, HALF: tl.constexpr, O: tl.constexpr, TAPS: tl.constexpr, DILATION: tl.constexpr,
    LAYER: tl.constexpr, SHARED: tl.constexpr, THRESHOLD: tl.constexpr, SCALE: tl.constexpr,
    SEGMENTS: tl.constexpr, ROWS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """(x_last rounded to the inputs' dtype, as float32; slope of SiLU there; documents) of a tile."""
    y, document = _convolution(
        lo, hi, weight, bias, segments, seeds, b, h, t, tl.arange(0, O), T, tokens, heads, K, HALF, O, TAPS, DILATION,
        LAYER, SHARED, THRESHOLD, SCALE, SEGMENTS, ROWS, INPUTS, O,
    )  # fmt: skip
    x, slope = silu(y)
    return x.to(lo.dtype.element_ty).to(tl.float32), slope, document


def check(case: Case) -> None:
    """Raises UnsupportedCase unless these kernels do ``case``."""
    check, fix = Arguments("router: triton"), "use implementation='xla'"
    check.choice("dtype", case.dtype, DTYPES, fix)
    check.choice("head size", case.N, SIZES, fix)
    left = f"{len(case.taps)} convolutions leave {case.channels[-1]} of {2 * case.N} channels"
    check.require(16 <= case.channels[-1] <= 128, f"{left}; a tile has 16 to 128 of them: {fix}")
    numbers = case.T * case.K * case.N
    check.require(numbers < 2**31, f"T K N = {numbers} is no index of 32 bits: split the tokens, or {fix}")
    check.require(case.B <= LONGEST_AXIS, f"B = {case.B}; a grid has at most {LONGEST_AXIS} rows: {fix}")
    check_installed("router")


def forward(case: Case, operands: Operands) -> jax.Array:
    inputs = inner_layers(case, operands, slopes=False)[-1]
    layer = len(case.taps) - 1
    tiles = convolve_tiles(case, layer)
    return call_layer(
        _score_kernel, case, layer, tiles, *last_arguments(case, operands, inputs),
        out_shape=jax.ShapeDtypeStruct((case.B, case.T, case.K), jnp.float32),
        grid=(case.K, ceil_div(case.T, tiles.rows), case.B),
        RELU=case.method == "relu",
    )  # fmt: skip


def backward(case: Case, operands: Operands, dr: jax.Array) -> Gradients:
    from pallas_kernels.router import triton_bwd

    return triton_bwd.backward(case, operands, dr)


def halves(inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    """(lo, hi) as the kernels take them: k and v, or x_n twice."""
    return (inputs[0], inputs[-1])


def rounded(case: Case, operands: Operands, layer: int) -> jax.Array:
    return operands.convolutions[layer].weight.astype(case.dtype)


def last_arguments(case: Case, operands: Operands, inputs: tuple[jax.Array, ...]) -> tuple[Any, ...]:
    layer = len(case.taps) - 1
    return (
        *halves(inputs),
        rounded(case, operands, layer),
        operands.convolutions[layer].bias,
        operands.weight,
        operands.bias,
        operands.segment_ids,
        operands.seeds,
    )


def inner_layers(case: Case, operands: Operands, *, slopes: bool) -> list[tuple[jax.Array, ...]]:
    """The inputs of every convolution: (k, v), then [1,B,K,T,C_n] each; with slopes [2,B,K,T,C_n], x_n first."""
    found: list[tuple[jax.Array, ...]] = [(operands.k, operands.v)]
    for layer in range(len(case.taps) - 1):
        tiles = convolve_tiles(case, layer)
        outputs = case.channels[layer + 1]
        shape = (2 if slopes else 1, case.B, case.K, case.T, outputs)
        x = call_layer(
            _layer_kernel, case, layer, tiles, *halves(found[-1]), rounded(case, operands, layer),
            operands.convolutions[layer].bias, operands.segment_ids, operands.seeds,
            out_shape=jax.ShapeDtypeStruct(shape, case.dtype),
            grid=(case.K * (outputs // tiles.outputs), ceil_div(case.T, tiles.rows), case.B),
            SLOPES=slopes,
        )  # fmt: skip
        found.append((x,))
    return found
