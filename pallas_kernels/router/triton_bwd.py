"""The router in triton.language: the backward pass, without atomics, so that a second run gives the same bits.

With a_n = conv_n(dropout(x_{n-1})) + b_n and e_n = dloss/da_n, from the last convolution to the first:

    dW_n[i] = sum_t dropout(x_{n-1})_{t + offset_i}^T e_{n,t}                  db_n = sum_t e_{n,t}
    e_{n-1,s} = silu'(a_{n-1}) * dropped(sum_i e_{n, s - offset_i} W_n[i]^T)   and dk, dv for n = 1, without silu'

The forward kernels run again first and leave dropout(x_n) and what its gradient is multiplied by (the slope of SiLU
where it was kept), in the inputs' dtype, and e of the last convolution. Gradients of weights are sums over parts of the
tokens, in float32, added up in a fixed order. No result of a product is transposed before it enters another one: Triton
up to 3.7 miscompiles that on Hopper.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.router.api import Case, Convolution, Gradients, Operands
from pallas_kernels.router.triton import call_first, call_last, rounded, scratch
from pallas_kernels.router.triton_tiles import (
    PROGRAMS,
    documents,
    dropout_words,
    fresh,
    lane_tokens,
    load_taps,
    load_tile,
    options,
    walk,
)
from pallas_kernels.tiles import ceil_div
from pallas_kernels.triton_call import jit, tl, triton_call


@jit
def _add(e, taps, done, next1, next2, new, SEGMENTS: tl.constexpr, PRECISION: tl.constexpr):
    """One step of a transposed convolution: what is complete, and what is known of the next two steps."""
    done += fresh(tl.dot(e, taps[0], input_precision=PRECISION), new, SEGMENTS)
    next1 = tl.dot(e, taps[1], fresh(next2, new, SEGMENTS), input_precision=PRECISION)
    return done, next1, tl.dot(e, taps[2], input_precision=PRECISION)


@jit
def _data_kernel(
    e, weight, slopes, segments, T, out, sums,
    K: tl.constexpr, DILATION: tl.constexpr, SHARED: tl.constexpr, THRESHOLD: tl.constexpr, SCALE: tl.constexpr,
    SEGMENTS: tl.constexpr, PRECISION: tl.constexpr,
    I: tl.constexpr, O: tl.constexpr, INPUTS: tl.constexpr, STEPS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """e [B,K,T,I] of the convolution before, as out, and its sums over a program's tokens [programs,K,I]."""
    blocks: tl.constexpr = I // INPUTS
    h = tl.program_id(0) // blocks
    c = tl.program_id(0) % blocks * INPUTS + tl.arange(0, INPUTS)
    o = tl.arange(0, O)
    b = tl.program_id(2)
    segments += b * T
    own: tl.constexpr = 0 if SHARED else 1
    place = (b.to(tl.int64) * K + h) * T
    taps = load_taps(weight + own * h * 3 * I * O + c[None, :] * O, o, tl.zeros((INPUTS,), tl.int32), 1, I * O)
    start = lane_tokens(tl.program_id(1), STEPS, DILATION, LANES)
    next1, next2 = tl.zeros((LANES, INPUTS), tl.float32), tl.zeros((LANES, INPUTS), tl.float32)
    total = tl.zeros((LANES, INPUTS), tl.float32)
    d1 = documents(segments, start - 2 * DILATION, T, SEGMENTS)
    for n in range(-1, STEPS + 1):
        t = start + n * DILATION
        d0 = documents(segments, t, T, SEGMENTS)
        tile = load_tile(e + place * O, t, O, o, d0 != 0)
        done, next1, next2 = _add(tile, taps, next1, next1, next2, d0 != d1, SEGMENTS, PRECISION)
        s = t - DILATION
        mine = (n >= 1) & (s < T)
        where = (place + s[:, None]) * I + c[None, :]
        done *= tl.load(slopes + where, mask=mine[:, None], other=0.0)
        tl.store(out + where, done.to(out.dtype.element_ty), mask=mine[:, None])
        total += done
        d1 = d0
    tl.store(sums + ((b * tl.num_programs(1) + tl.program_id(1)) * K + h) * I + c, tl.sum(total, 0))


@jit
def _input_kernel(
    e, weight, segments, seeds, T, tokens, heads, dk, dv,
    K: tl.constexpr, DILATION: tl.constexpr, SHARED: tl.constexpr, THRESHOLD: tl.constexpr, SCALE: tl.constexpr,
    SEGMENTS: tl.constexpr, PRECISION: tl.constexpr,
    N: tl.constexpr, INPUTS: tl.constexpr, STEPS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """dk and dv."""
    blocks: tl.constexpr = N // INPUTS
    h = tl.program_id(0) // blocks
    c = tl.program_id(0) % blocks * INPUTS + tl.arange(0, INPUTS)
    o = tl.arange(0, N)
    b = tl.program_id(2)
    segments += b * T
    own: tl.constexpr = 0 if SHARED else 1
    weight += own * h * 6 * N * N + c[None, :] * N
    none = tl.zeros((INPUTS,), tl.int32)
    lo_taps, hi_taps = load_taps(weight, o, none, 1, 2 * N * N), load_taps(weight + N * N, o, none, 1, 2 * N * N)
    e += (b.to(tl.int64) * K + h) * T * N
    start = lane_tokens(tl.program_id(1), STEPS, DILATION, LANES)
    lo1, lo2 = tl.zeros((LANES, INPUTS), tl.float32), tl.zeros((LANES, INPUTS), tl.float32)
    hi1, hi2 = tl.zeros((LANES, INPUTS), tl.float32), tl.zeros((LANES, INPUTS), tl.float32)
    d1 = documents(segments, start - 2 * DILATION, T, SEGMENTS)
    for n in range(-1, STEPS + 1):
        t = start + n * DILATION
        d0 = documents(segments, t, T, SEGMENTS)
        tile = load_tile(e, t, N, o, d0 != 0)
        lo, lo1, lo2 = _add(tile, lo_taps, lo1, lo1, lo2, d0 != d1, SEGMENTS, PRECISION)
        hi, hi1, hi2 = _add(tile, hi_taps, hi1, hi1, hi2, d0 != d1, SEGMENTS, PRECISION)
        s = t - DILATION
        if THRESHOLD:
            words = dropout_words(seeds, 0, b, s, h, c, tokens, heads, N)
            lo = tl.where((words & 0xFFFF) >= THRESHOLD, lo * SCALE, 0.0)
            hi = tl.where((words >> 16) >= THRESHOLD, hi * SCALE, 0.0)
        mine = ((n >= 1) & (s < T))[:, None]
        where = ((b.to(tl.int64) * T + s[:, None]) * K + h) * N + c[None, :]
        tl.store(dk + where, lo.to(dk.dtype.element_ty), mask=mine)
        tl.store(dv + where, hi.to(dv.dtype.element_ty), mask=mine)
        d1 = d0


@jit
def _weight_kernel(
    lo, hi, e, segments, seeds, B, T, tokens, heads, out,
    K: tl.constexpr, DILATION: tl.constexpr, SHARED: tl.constexpr, THRESHOLD: tl.constexpr, SCALE: tl.constexpr,
    SEGMENTS: tl.constexpr, PRECISION: tl.constexpr,
    I: tl.constexpr, O: tl.constexpr, FIRST: tl.constexpr, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """dW over a part of the tokens, [parts,K,3,I,O]: of k and v for the FIRST convolution, else of x_n, as lo."""
    across: tl.constexpr = O // OUTPUTS
    h = tl.program_id(0)
    o = tl.program_id(1) % across * OUTPUTS + tl.arange(0, OUTPUTS)
    c = tl.program_id(1) // across * INPUTS + tl.arange(0, INPUTS)
    lo0, lo1, lo2 = (
        tl.zeros((INPUTS, OUTPUTS), tl.float32), tl.zeros((INPUTS, OUTPUTS), tl.float32),
        tl.zeros((INPUTS, OUTPUTS), tl.float32),
    )  # fmt: skip
    if FIRST:
        hi0, hi1, hi2 = lo0, lo1, lo2
    tiles = tl.cdiv(T, ROWS)
    for tile in range(tl.program_id(2), B * tiles, tl.num_programs(2)):
        b = tile // tiles
        s = tile % tiles * ROWS + tl.arange(0, ROWS)
        place = b.to(tl.int64) * T * K
        documents_of = segments + b * T
        document = documents(documents_of, s, T, SEGMENTS)
        rows = e + (place + h * T) * O
        here = document != 0
        after, before = s + DILATION, s - DILATION
        # A tap that reads token s - d for its token s reads token s for its token s + d.
        d0 = load_tile(rows, after, O, o, here & (documents(documents_of, after, T, SEGMENTS) == document))
        d1 = load_tile(rows, s, O, o, here)
        d2 = load_tile(rows, before, O, o, here & (documents(documents_of, before, T, SEGMENTS) == document))
        if FIRST:
            x_lo = load_tile(lo + (place + h) * (I // 2), s, K * (I // 2), c, here)
            x_hi = load_tile(hi + (place + h) * (I // 2), s, K * (I // 2), c, here)
            if THRESHOLD:
                words = dropout_words(seeds, 0, b, s, h, c, tokens, heads, I // 2)
                x_lo = tl.where((words & 0xFFFF) >= THRESHOLD, x_lo, 0.0)
                x_hi = tl.where((words >> 16) >= THRESHOLD, x_hi, 0.0)
            x_hi = tl.trans(x_hi)
            hi0 = tl.dot(x_hi, d0, hi0, input_precision=PRECISION)
            hi1 = tl.dot(x_hi, d1, hi1, input_precision=PRECISION)
            hi2 = tl.dot(x_hi, d2, hi2, input_precision=PRECISION)
        else:
            x_lo = load_tile(lo + (place + h * T) * I, s, I, c, here)
        x_lo = tl.trans(x_lo)
        lo0 = tl.dot(x_lo, d0, lo0, input_precision=PRECISION)
        lo1 = tl.dot(x_lo, d1, lo1, input_precision=PRECISION)
        lo2 = tl.dot(x_lo, d2, lo2, input_precision=PRECISION)
    where = out + (tl.program_id(2) * K + h).to(tl.int64) * 3 * I * O + c[:, None] * O + o[None, :]
    tl.store(where, lo0 * SCALE)
    tl.store(where + I * O, lo1 * SCALE)
    tl.store(where + 2 * I * O, lo2 * SCALE)
    if FIRST:
        where += I // 2 * O
        tl.store(where, hi0 * SCALE)
        tl.store(where + I * O, hi1 * SCALE)
        tl.store(where + 2 * I * O, hi2 * SCALE)


def backward(case: Case, operands: Operands, dr: jax.Array) -> Gradients:
    """The gradients of every differentiable operand."""
    x1, slope1 = call_first(case, operands, backward=True)
    e3, x2, slope2, last = call_last(case, operands, x1, dr)
    dweight2 = _call_weight(case, operands, (x2, x2), e3, first=False)
    e2, bias1 = _call_data(case, operands, rounded(case, operands, 2), slope2, e3)
    dweight1 = _call_weight(case, operands, (x1, x1), e2, first=False)
    e1, bias0 = _call_data(case, operands, rounded(case, operands, 1), slope1, e2)
    dweight0 = _call_weight(case, operands, (operands.k, operands.v), e1, first=True)
    dk, dv = _call_input(case, operands, rounded(case, operands, 0), e1)
    found = [(dweight0, bias0), (dweight1, bias1), (dweight2, last[:, :, 0])]
    convolutions = tuple(Convolution(_by_head(case, dw), _by_head(case, db)) for dw, db in found)
    return Gradients(dk, dv, convolutions, _by_head(case, last[:, :, 1]), _by_head(case, last[:, :, 2, 0]))


def _by_head(case: Case, parts: jax.Array) -> jax.Array:
    """[parts,K,...] -> [heads,...]: the sum over parts, and over heads that share their weights."""
    return jnp.sum(parts, axis=(0, 1), keepdims=True)[0] if case.heads == 1 else jnp.sum(parts, axis=0)


def _call_data(
    case: Case, operands: Operands, weight: jax.Array, slopes: jax.Array, e: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(e [B,K,T,I] of the convolution before, its sums [programs,K,I])."""
    inputs, outputs = weight.shape[2:]
    block = min(inputs, 64)
    steps = walk(case, inputs // block)
    return triton_call(
        _data_kernel,
        e,
        weight,
        slopes,
        operands.segment_ids,
        case.T,
        out_shape=(
            scratch(case, inputs),
            jax.ShapeDtypeStruct((case.B * steps.chunks, case.K, inputs), jnp.float32),
        ),
        grid=(case.K * (inputs // block), steps.chunks, case.B),
        num_warps=4,
        num_stages=3,
        I=inputs,
        O=outputs,
        INPUTS=block,
        STEPS=steps.steps,
        **options(case),
    )


def _call_input(case: Case, operands: Operands, weight: jax.Array, e: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(dk, dv)."""
    block = 64 if case.dtype != "float32" else 32
    steps = walk(case, case.N // block)
    whole = jax.ShapeDtypeStruct((case.B, case.T, case.K, case.N), case.dtype)
    return triton_call(
        _input_kernel,
        e,
        weight,
        operands.segment_ids,
        operands.seeds,
        case.T,
        *case.extent,
        out_shape=(whole, whole),
        grid=(case.K * (case.N // block), steps.chunks, case.B),
        num_warps=8,
        num_stages=2,
        N=case.N,
        INPUTS=block,
        STEPS=steps.steps,
        **options(case),
    )


def _call_weight(
    case: Case, operands: Operands, inputs: tuple[jax.Array, jax.Array], e: jax.Array, *, first: bool
) -> jax.Array:
    """[parts,K,3,I,O] float32."""
    rows = 64 if case.dtype != "float32" else 32
    width, outputs = inputs[0].shape[3], e.shape[3]
    block, across = min(width, 64), min(outputs, 64)
    channels = 2 * width if first else width
    blocks = (width // block) * (outputs // across)
    parts: Any = max(1, min(PROGRAMS // (case.K * blocks), case.B * ceil_div(case.T, rows)))
    return triton_call(
        _weight_kernel,
        *inputs,
        e,
        operands.segment_ids,
        operands.seeds,
        case.B,
        case.T,
        *case.extent,
        out_shape=jax.ShapeDtypeStruct((parts, case.K, 3, channels, outputs), jnp.float32),
        grid=(case.K, blocks, parts),
        num_warps=8 if first else 4,
        num_stages=3,
        I=channels,
        O=outputs,
        FIRST=first,
        INPUTS=block,
        OUTPUTS=across,
        ROWS=rows,
        **options(case),
    )
