"""The router in triton.language: the backward pass, without atomics, so that a second run gives the same bits.

With a_n = conv_n(dropout(x_{n-1})) + b_n and e = dloss/da_n, from the last convolution to the first:

    dW_n[i] = sum_t dropout(x_{n-1})_{t + offset_i}^T e_t        db_n = sum_t e_t
    dx_{n-1, s} = dropped(sum_i e_{s - offset_i} W_n[i]^T)       da_{n-1} = dx_{n-1} silu'(a_{n-1})

The forward pass runs again first, and leaves x_n and silu'(a_n) in the inputs' dtype; its last convolution ends with da
at once. Gradients of weights are sums over parts of the tokens, written in float32 and added up in a fixed order. No
result of a product is transposed before it enters another one: Triton up to 3.7 miscompiles that on Hopper.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.router.api import Case, Convolution, Gradients, Operands
from pallas_kernels.router.triton import halves, inner_layers, last_arguments, last_layer, rounded
from pallas_kernels.router.triton_tiles import (
    call_layer,
    convolve_tiles,
    data_tiles,
    documents,
    dropout_words,
    load_tile,
    weight_tiles,
)
from pallas_kernels.tiles import ceil_div
from pallas_kernels.triton_call import jit, tl

PROGRAMS = 512  # of a weight's gradient: enough to fill the GPU, few enough that their sums are small beside the inputs


@jit
def _last_kernel(
    lo, hi, weight, bias, map_weight, map_bias, segments, seeds, dr, T, tokens, heads, da, sums,
    K: tl.constexpr, HALF: tl.constexpr, O: tl.constexpr, TAPS: tl.constexpr, DILATION: tl.constexpr,
    LAYER: tl.constexpr, SHARED: tl.constexpr, THRESHOLD: tl.constexpr, SCALE: tl.constexpr,
    SEGMENTS: tl.constexpr, ROWS: tl.constexpr, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """da of the last convolution, and the sums over the tile of da, dz x_last and dz: sums is [tiles,K,3,O]."""
    h = tl.program_id(0)
    t = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    b = tl.program_id(2)
    y, slope, document = last_layer(
        lo, hi, weight, bias, segments, seeds, b, h, t, T, tokens, heads, K, HALF, O, TAPS, DILATION, LAYER, SHARED,
        THRESHOLD, SCALE, SEGMENTS, ROWS, INPUTS,
    )  # fmt: skip
    own: tl.constexpr = 0 if SHARED else 1
    o = tl.arange(0, O)
    w = tl.load(map_weight + own * h * O + o)[None, :]
    z = tl.sum(y * w, 1) + tl.load(map_bias + own * h)
    place = b.to(tl.int64) * T * K
    dz = tl.load(dr + place + t * K + h, mask=document != 0, other=0.0)
    if RELU:
        dz = tl.where(z > 0, dz, 0.0)
    else:
        gate = tl.sigmoid(z)
        dz *= gate * (1.0 - gate)
    e = dz[:, None] * w * slope
    tl.store(da + (place + h * T) * O + t[:, None] * O + o[None, :], e.to(da.dtype.element_ty), mask=(t < T)[:, None])
    sums += ((b * tl.num_programs(1) + tl.program_id(1)) * K + h) * 3 * O + o
    tl.store(sums, tl.sum(e, 0))
    tl.store(sums + O, tl.sum(dz[:, None] * y, 0))
    tl.store(sums + 2 * O, tl.sum(dz, 0) + tl.zeros((O,), tl.float32))


@jit
def _data_kernel(
    e, weight, slopes, segments, seeds, T, tokens, heads, out_lo, out_hi,
    K: tl.constexpr, HALF: tl.constexpr, O: tl.constexpr, TAPS: tl.constexpr, DILATION: tl.constexpr,
    LAYER: tl.constexpr, SHARED: tl.constexpr, THRESHOLD: tl.constexpr, SCALE: tl.constexpr,
    SEGMENTS: tl.constexpr, ROWS: tl.constexpr, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """For the first convolution dk and dv; for others da of the one before, and its sums over the tile as out_hi."""
    blocks: tl.constexpr = HALF // INPUTS
    h = tl.program_id(0) // blocks
    c = tl.program_id(0) % blocks * INPUTS + tl.arange(0, INPUTS)
    s = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    b = tl.program_id(2)
    place = b.to(tl.int64) * T * K
    own: tl.constexpr = 0 if SHARED else 1
    segments += b * T
    document = documents(segments, s, T, SEGMENTS)
    e += (place + h * T) * O
    weight += own * h * TAPS * 2 * HALF * O
    lo = tl.zeros((ROWS, INPUTS), tl.float32)
    hi = tl.zeros((ROWS, INPUTS), tl.float32)
    for tap in tl.static_range(TAPS):
        t = s - (tap * DILATION - (TAPS - 1) * DILATION // 2)
        real = (documents(segments, t, T, SEGMENTS) == document) & (document != 0)
        for first in range(0, O, OUTPUTS):
            o = first + tl.arange(0, OUTPUTS)
            tile = load_tile(e, t, O, o, real)
            rows = weight + (tap * 2 * HALF + c)[:, None] * O + o[None, :]
            lo = tl.dot(tile, tl.trans(tl.load(rows)), lo)
            hi = tl.dot(tile, tl.trans(tl.load(rows + HALF * O)), hi)
    if THRESHOLD:
        words = dropout_words(seeds, LAYER, b, s, h, c, tokens, heads, HALF)
        lo = tl.where((words & 0xFFFF) >= THRESHOLD, lo * SCALE, 0.0)
        hi = tl.where((words >> 16) >= THRESHOLD, hi * SCALE, 0.0)
    kept = (s < T)[:, None]
    if LAYER == 0:
        where = (place + h) * HALF + s[:, None] * (K * HALF) + c[None, :]
        tl.store(out_lo + where, lo.to(out_lo.dtype.element_ty), mask=kept)
        tl.store(out_hi + where, hi.to(out_hi.dtype.element_ty), mask=kept)
    else:
        where = (place + h * T) * 2 * HALF + s[:, None] * (2 * HALF) + c[None, :]
        # At padding and beyond the row both sums are 0 already.
        slopes += tl.num_programs(2).to(tl.int64) * T * K * 2 * HALF
        lo *= tl.load(slopes + where, mask=kept, other=0.0)
        hi *= tl.load(slopes + where + HALF, mask=kept, other=0.0)
        tl.store(out_lo + where, lo.to(out_lo.dtype.element_ty), mask=kept)
        tl.store(out_lo + where + HALF, hi.to(out_lo.dtype.element_ty), mask=kept)
        sums = out_hi + ((b * tl.num_programs(1) + tl.program_id(1)) * K + h) * 2 * HALF + c
        tl.store(sums, tl.sum(lo, 0))
        tl.store(sums + HALF, tl.sum(hi, 0))


@jit
def _weight_kernel(
    lo, hi, e, segments, seeds, B, T, tokens, heads, out,
    K: tl.constexpr, HALF: tl.constexpr, O: tl.constexpr, TAPS: tl.constexpr, DILATION: tl.constexpr,
    LAYER: tl.constexpr, SHARED: tl.constexpr, THRESHOLD: tl.constexpr, SCALE: tl.constexpr,
    SEGMENTS: tl.constexpr, ROWS: tl.constexpr, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr,
    FIRST_TAP: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """dW of up to three taps over a part of the tokens: out is [parts,K,COUNT,2 HALF,O]."""
    across: tl.constexpr = O // OUTPUTS
    h = tl.program_id(0)
    block = tl.program_id(1)
    o = block % across * OUTPUTS + tl.arange(0, OUTPUTS)
    channel = block // across * INPUTS
    c = channel + tl.arange(0, INPUTS)
    upper = c >= HALF
    acc0 = tl.zeros((INPUTS, OUTPUTS), tl.float32)
    acc1 = tl.zeros((INPUTS, OUTPUTS), tl.float32)
    acc2 = tl.zeros((INPUTS, OUTPUTS), tl.float32)
    tiles = tl.cdiv(T, ROWS)
    for tile in range(tl.program_id(2), B * tiles, tl.num_programs(2)):
        b = tile // tiles
        s = tile % tiles * ROWS + tl.arange(0, ROWS)
        place = b.to(tl.int64) * T * K
        document = documents(segments + b * T, s, T, SEGMENTS)
        if LAYER == 0:
            # A block lies in one half: in k or in v.
            base = lo + (place + h) * HALF
            if channel >= HALF:
                base = hi + (place + h) * HALF - HALF
            x = load_tile(base, s, K * HALF, c, document != 0)
        else:
            x = load_tile(lo + (place + h * T) * 2 * HALF, s, 2 * HALF, c, document != 0)
        if THRESHOLD:
            words = dropout_words(seeds, LAYER, b, s, h, tl.where(upper, c - HALF, c), tokens, heads, HALF)
            bits = tl.where(upper[None, :], words >> 16, words & 0xFFFF)
            x = tl.where(bits >= THRESHOLD, x, 0.0)
        x = tl.trans(x)
        from_token = e + (place + h * T) * O
        for tap in tl.static_range(COUNT):
            t = s - ((FIRST_TAP + tap) * DILATION - (TAPS - 1) * DILATION // 2)
            real = (documents(segments + b * T, t, T, SEGMENTS) == document) & (document != 0)
            d = load_tile(from_token, t, O, o, real)
            if tap == 0:
                acc0 = tl.dot(x, d, acc0)
            if tap == 1:
                acc1 = tl.dot(x, d, acc1)
            if tap == 2:
                acc2 = tl.dot(x, d, acc2)
    where = out + (tl.program_id(2) * K + h).to(tl.int64) * COUNT * 2 * HALF * O + c[:, None] * O + o[None, :]
    tl.store(where, acc0 * SCALE)
    if COUNT > 1:
        tl.store(where + 2 * HALF * O, acc1 * SCALE)
    if COUNT > 2:
        tl.store(where + 4 * HALF * O, acc2 * SCALE)


def backward(case: Case, operands: Operands, dr: jax.Array) -> Gradients:
    """The gradients of every differentiable operand."""
    inputs = inner_layers(case, operands, slopes=True)
    layers = len(case.taps)
    e, sums = _call_last(case, operands, inputs[-1], dr)
    weight, bias = _by_head(case, sums[:, :, 1]), _by_head(case, sums[:, :, 2, 0])
    gradients: list[Convolution] = []
    bias_sums = sums[:, :, 0]
    for layer in range(layers - 1, -1, -1):
        dweight = _call_weight(case, operands, layer, inputs[layer], e)
        gradients.append(Convolution(_by_head(case, dweight), _by_head(case, bias_sums)))
        e, bias_sums = _call_data(case, operands, layer, inputs[layer][-1], e)
    return Gradients(e, bias_sums, tuple(gradients[::-1]), weight, bias)


def _by_head(case: Case, parts: jax.Array) -> jax.Array:
    """[parts,K,...] -> [heads,...]: the sum over parts, and over heads that share their weights."""
    return jnp.sum(parts, axis=(0, 1), keepdims=True)[0] if case.heads == 1 else jnp.sum(parts, axis=0)


def _call_last(
    case: Case, operands: Operands, inputs: tuple[jax.Array, ...], dr: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(da [B,K,T,O], sums [tiles,K,3,O])."""
    layer = len(case.taps) - 1
    tiles, outputs = convolve_tiles(case, layer), case.channels[-1]
    count = ceil_div(case.T, tiles.rows)
    return call_layer(
        _last_kernel, case, layer, tiles, *last_arguments(case, operands, inputs), dr,
        out_shape=(
            jax.ShapeDtypeStruct((case.B, case.K, case.T, outputs), case.dtype),
            jax.ShapeDtypeStruct((case.B * count, case.K, 3, outputs), jnp.float32),
        ),
        grid=(case.K, count, case.B),
        RELU=case.method == "relu",
    )  # fmt: skip


def _call_data(
    case: Case, operands: Operands, layer: int, slopes: jax.Array, e: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(dk, dv) for the first convolution; otherwise (da [B,K,T,C], sums [tiles,K,C]) of the one before."""
    tiles = data_tiles(case, layer)
    count, channels = ceil_div(case.T, tiles.rows), case.channels[layer]
    whole = jax.ShapeDtypeStruct((case.B, case.T, case.K, case.N), case.dtype)
    before = jax.ShapeDtypeStruct((case.B, case.K, case.T, channels), case.dtype)
    sums = jax.ShapeDtypeStruct((case.B * count, case.K, channels), jnp.float32)
    return call_layer(
        _data_kernel, case, layer, tiles, e, rounded(case, operands, layer), slopes, operands.segment_ids,
        operands.seeds,
        out_shape=(whole, whole) if layer == 0 else (before, sums),
        grid=(case.K * (channels // 2 // tiles.inputs), count, case.B),
    )  # fmt: skip


def _call_weight(case: Case, operands: Operands, layer: int, inputs: tuple[jax.Array, ...], e: jax.Array) -> jax.Array:
    """[parts,K,taps,I,O] float32."""
    tiles = weight_tiles(case, layer)
    channels, outputs, taps = case.channels[layer], case.channels[layer + 1], case.taps[layer]
    blocks = (channels // tiles.inputs) * (outputs // tiles.outputs)
    parts = max(1, min(PROGRAMS // (case.K * blocks), case.B * ceil_div(case.T, tiles.rows)))
    found: list[Any] = []
    for first in range(0, taps, 3):
        count = min(3, taps - first)
        found.append(
            call_layer(
                _weight_kernel, case, layer, tiles, *halves(inputs), e, operands.segment_ids, operands.seeds, case.B,
                out_shape=jax.ShapeDtypeStruct((parts, case.K, count, channels, outputs), jnp.float32),
                grid=(case.K, blocks, parts),
                FIRST_TAP=first, COUNT=count,
            )
        )  # fmt: skip
    return found[0] if len(found) == 1 else jnp.concatenate(found, axis=2)
