"""Parts that the router's Triton kernels share: which tokens a tap may read, dropout's words, products, tile sizes.

Inputs of a convolution are two halves of channels, ``lo`` and ``hi``: k and v, or the halves of x_n, which lie as
[B,K,T,C_n] between kernels. A word of dropout serves one channel of each half.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from pallas_kernels.router.api import Case
from pallas_kernels.router.dropout import FIRST as _FIRST
from pallas_kernels.router.dropout import SECOND as _SECOND
from pallas_kernels.router.dropout import STEP as _STEP
from pallas_kernels.triton_call import jit, tl, triton_call

if tl is not None:
    FIRST, SECOND, STEP = tl.constexpr(_FIRST), tl.constexpr(_SECOND), tl.constexpr(_STEP)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tokens of a program, how many channels it multiplies at a time, and how many it writes."""

    rows: int
    inputs: int
    outputs: int
    warps: int
    stages: int = 2


@jit
def documents(segments, t, T, SEGMENTS: tl.constexpr):
    """The document of each token, 0 for padding and outside of the row."""
    inside = (t >= 0) & (t < T)
    if SEGMENTS:
        return tl.load(segments + t, mask=inside, other=0)
    return inside.to(tl.int32)


@jit
def inputs_of(lo, hi, b, h, T, K: tl.constexpr, HALF: tl.constexpr, LAYER: tl.constexpr):
    """(lo, hi, from one token to the next) of a row's head: its k and v, or the halves of its x_n."""
    place = b.to(tl.int64) * T * K
    if LAYER == 0:
        lo += (place + h) * HALF
        hi += (place + h) * HALF
        stride = K * HALF
    else:
        lo += (place + h * T) * 2 * HALF
        hi += (place + h * T) * 2 * HALF + HALF
        stride = 2 * HALF
    return lo, hi, stride


@jit
def silu(y):
    """(silu(y), its slope)"""
    gate = tl.sigmoid(y)
    return y * gate, gate * (1.0 + y * (1.0 - gate))


@jit
def dropout_words(
    seeds, LAYER: tl.constexpr, b, t, h, c, tokens, heads, HALF: tl.constexpr,
):  # fmt: skip
    """[tokens, channels of a half] words of ``dropout.py``."""
    row = ((b * tokens + t) * heads + h).to(tl.uint32)
    start = row * ((HALF * STEP) & 0xFFFFFFFF) + tl.load(seeds + 2 * LAYER)
    x = start[:, None] + (c.to(tl.uint32) * STEP)[None, :]
    x = (x ^ (x >> 16)) * FIRST
    x = (x ^ (x >> 13) ^ tl.load(seeds + 2 * LAYER + 1)) * SECOND
    return x ^ (x >> 16)


@jit
def load_tile(base, rows, stride, c, real):
    return tl.load(base + rows[:, None] * stride + c[None, :], mask=real[:, None], other=0.0)


@jit
def convolve(
    lo, hi, stride, weight, segments, document, seeds, b, h, t, o, T, tokens, heads,
    HALF: tl.constexpr, O: tl.constexpr, TAPS: tl.constexpr, DILATION: tl.constexpr, LAYER: tl.constexpr,
    THRESHOLD: tl.constexpr, SEGMENTS: tl.constexpr, ROWS: tl.constexpr, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """[ROWS, OUTPUTS] float32: the sum over taps, without scale and bias; ``lo``, ``hi``, ``weight`` are one head's."""
    acc = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for tap in tl.static_range(TAPS):
        s = t + (tap * DILATION - (TAPS - 1) * DILATION // 2)
        real = (documents(segments, s, T, SEGMENTS) == document) & (document != 0)
        for first in range(0, HALF, INPUTS):
            c = first + tl.arange(0, INPUTS)
            x_lo = load_tile(lo, s, stride, c, real)
            x_hi = load_tile(hi, s, stride, c, real)
            if THRESHOLD:
                words = dropout_words(seeds, LAYER, b, s, h, c, tokens, heads, HALF)
                x_lo = tl.where((words & 0xFFFF) >= THRESHOLD, x_lo, 0.0)
                x_hi = tl.where((words >> 16) >= THRESHOLD, x_hi, 0.0)
            rows = weight + (tap * 2 * HALF + c)[:, None] * O + o[None, :]
            acc = tl.dot(x_lo, tl.load(rows), acc)
            acc = tl.dot(x_hi, tl.load(rows + HALF * O), acc)
    return acc


def call_layer(
    kernel: Any, case: Case, layer: int, tiles: Tiles, *arguments: Any, out_shape: Any, grid: Any, **constexprs: Any
) -> Any:
    """``triton_call`` of a kernel of one convolution, which ends its arguments with T and dropout's extent."""
    return triton_call(
        kernel, *arguments, case.T, *case.extent, out_shape=out_shape, grid=grid, num_warps=tiles.warps,
        num_stages=tiles.stages, ROWS=tiles.rows, INPUTS=tiles.inputs, OUTPUTS=tiles.outputs, K=case.K,
        HALF=case.channels[layer] // 2, O=case.channels[layer + 1], TAPS=case.taps[layer],
        DILATION=case.dilations[layer], LAYER=layer, SHARED=case.heads == 1, THRESHOLD=case.threshold,
        SCALE=case.scale, SEGMENTS=case.segment_ids, **constexprs,
    )  # fmt: skip


def convolve_tiles(case: Case, layer: int) -> Tiles:
    """For the forward pass of a convolution."""
    half, outputs = case.channels[layer] // 2, case.channels[layer + 1]
    if layer == len(case.taps) - 1:
        return Tiles(128 if outputs <= 32 else 64, min(half, 64), outputs, 4)
    return Tiles(64, min(half, 64), min(outputs, 64), 4)


def data_tiles(case: Case, layer: int) -> Tiles:
    """For the gradient of a convolution's input: ``inputs`` channels of each half are written."""
    half, outputs = case.channels[layer] // 2, case.channels[layer + 1]
    return Tiles(128 if half <= 32 else 64, min(half, 64), min(outputs, 64), 4)


def weight_tiles(case: Case, layer: int) -> Tiles:
    """For the gradient of a convolution's weight: ``inputs`` x ``outputs`` of up to three taps."""
    inputs = min(case.channels[layer] // (2 if layer == 0 else 1), 64)
    return Tiles(64, inputs, min(case.channels[layer + 1], 64), 4, 3)
