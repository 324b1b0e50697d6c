"""The router in triton.language: one kernel for the first convolution, one for the other two and the score.

Three taps of one dilation each. At step n (``triton_tiles``) the inputs x_n of all lanes are read. What they give to
the convolution's results at n - 1, n and n + 1 goes into three accumulators; the first of these is complete then, and
is the next convolution's input, one step late. All weights that a program needs stay in shared memory.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import UnsupportedCase
from pallas_kernels.router.api import Case, Gradients, Operands
from pallas_kernels.router.triton_tiles import (
    LANES,
    documents,
    dropout_words,
    fresh,
    kept,
    lane_tokens,
    load_taps,
    load_tile,
    options,
    walk,
)
from pallas_kernels.tiles import check_choice
from pallas_kernels.triton_call import check_installed, jit, tl, triton_call

SIZES = (64, 128)


@jit
def finish(acc, bias, document, SCALE: tl.constexpr):
    """(silu, its slope) of a convolution's result, 0 at padding."""
    a = acc * SCALE + bias[None, :]
    a = tl.where((document != 0)[:, None], a, 0.0)
    gate = tl.sigmoid(a)
    return a * gate, gate * (1.0 + a * (1.0 - gate))


@jit
def _first_kernel(
    k, v, weight, bias, segments, seeds, T, tokens, heads, x1, slope1,
    K: tl.constexpr, DILATION: tl.constexpr, SHARED: tl.constexpr, THRESHOLD: tl.constexpr, SCALE: tl.constexpr,
    SEGMENTS: tl.constexpr, PRECISION: tl.constexpr,
    N: tl.constexpr, OUTPUTS: tl.constexpr, STEPS: tl.constexpr, LANES: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """x_1 with the next convolution's dropout, [B,K,T,N]; for the backward pass also what its gradient is scaled by."""
    blocks: tl.constexpr = N // OUTPUTS
    h = tl.program_id(0) // blocks
    b = tl.program_id(2)
    o = tl.program_id(0) % blocks * OUTPUTS + tl.arange(0, OUTPUTS)
    c = tl.arange(0, N)
    place = b.to(tl.int64) * T * K
    segments += b * T
    own: tl.constexpr = 0 if SHARED else 1
    weight += own * h * 6 * N * N
    lo_taps = load_taps(weight, c, o, N, 2 * N * N)
    hi_taps = load_taps(weight + N * N, c, o, N, 2 * N * N)
    shift = tl.load(bias + own * h * N + o)
    k += (place + h) * N
    v += (place + h) * N
    start = lane_tokens(tl.program_id(1), STEPS, DILATION, LANES)
    next1, next2 = tl.zeros((LANES, OUTPUTS), tl.float32), tl.zeros((LANES, OUTPUTS), tl.float32)
    d1 = documents(segments, start - 2 * DILATION, T, SEGMENTS)
    for n in range(-1, STEPS + 1):
        t = start + n * DILATION
        d0 = documents(segments, t, T, SEGMENTS)
        lo = load_tile(k, t, K * N, c, d0 != 0)
        hi = load_tile(v, t, K * N, c, d0 != 0)
        if THRESHOLD:
            words = dropout_words(seeds, 0, b, t, h, c, tokens, heads, N)
            lo = tl.where((words & 0xFFFF) >= THRESHOLD, lo, 0.0)
            hi = tl.where((words >> 16) >= THRESHOLD, hi, 0.0)
        new = d0 != d1
        last = tl.dot(hi, hi_taps[2], tl.dot(lo, lo_taps[2], input_precision=PRECISION), input_precision=PRECISION)
        acc = next1 + fresh(last, new, SEGMENTS)
        next1 = tl.dot(lo, lo_taps[1], fresh(next2, new, SEGMENTS), input_precision=PRECISION)
        next1 = tl.dot(hi, hi_taps[1], next1, input_precision=PRECISION)
        next2 = tl.dot(hi, hi_taps[0], tl.dot(lo, lo_taps[0], input_precision=PRECISION), input_precision=PRECISION)
        y, slope = finish(acc, shift, d1, SCALE)
        s = t - DILATION
        if THRESHOLD:
            keep = kept(seeds, 1, b, s, h, o, tokens, heads, THRESHOLD, N)
            y = tl.where(keep, y, 0.0)
            slope = tl.where(keep, slope * SCALE, 0.0)
        mine = (n >= 1) & (s < T)
        where = (place + h * T + s[:, None]) * N + o[None, :]
        tl.store(x1 + where, y.to(x1.dtype.element_ty), mask=mine[:, None])
        if BACKWARD:
            tl.store(slope1 + where, slope.to(x1.dtype.element_ty), mask=mine[:, None])
        d1 = d0


@jit
def _last_kernel(
    x1, weight1, bias1, weight2, bias2, map_weight, map_bias, segments, seeds, dr, T, tokens, heads,
    out, x2, slope2, sums,
    K: tl.constexpr, DILATION: tl.constexpr, SHARED: tl.constexpr, THRESHOLD: tl.constexpr, SCALE: tl.constexpr,
    SEGMENTS: tl.constexpr, PRECISION: tl.constexpr,
    N: tl.constexpr, RELU: tl.constexpr, STEPS: tl.constexpr, LANES: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Scores [B,T,K] as out; for the backward pass da of the last convolution [B,K,T,C3], and what it needs."""
    C2: tl.constexpr = N // 2
    C3: tl.constexpr = N // 4
    h = tl.program_id(0)
    b = tl.program_id(2)
    place = b.to(tl.int64) * T * K
    segments += b * T
    own: tl.constexpr = 0 if SHARED else 1
    o1, o2, o3 = tl.arange(0, N), tl.arange(0, C2), tl.arange(0, C3)
    shift2 = tl.load(bias1 + own * h * C2 + o2)
    shift3 = tl.load(bias2 + own * h * C3 + o3)
    w = tl.load(map_weight + own * h * C3 + o3)[None, :]
    map_b = tl.load(map_bias + own * h)
    taps2 = load_taps(weight1 + own * h * 3 * N * C2, o1, o2, C2, N * C2)
    taps3 = load_taps(weight2 + own * h * 3 * C2 * C3, o2, o3, C3, C2 * C3)
    start = lane_tokens(tl.program_id(1), STEPS, DILATION, LANES)
    # By the number of the convolution: what is known of its results at the next step, and at the one after that.
    next21, next22 = tl.zeros((LANES, C2), tl.float32), tl.zeros((LANES, C2), tl.float32)
    next31, next32 = tl.zeros((LANES, C3), tl.float32), tl.zeros((LANES, C3), tl.float32)
    d1 = documents(segments, start - 3 * DILATION, T, SEGMENTS)
    d2 = d1
    sum_bias, sum_weight = tl.zeros((LANES, C3), tl.float32), tl.zeros((LANES, C3), tl.float32)
    sum_dz = tl.zeros((LANES,), tl.float32)
    for n in range(-2, STEPS + 2):
        t = start + n * DILATION
        d0 = documents(segments, t, T, SEGMENTS)
        x = load_tile(x1 + (place + h * T) * N, t, N, o1, d0 != 0)
        new = d0 != d1
        acc = next21 + fresh(tl.dot(x, taps2[2], input_precision=PRECISION), new, SEGMENTS)
        next21 = tl.dot(x, taps2[1], fresh(next22, new, SEGMENTS), input_precision=PRECISION)
        next22 = tl.dot(x, taps2[0], input_precision=PRECISION)
        y, slope = finish(acc, shift2, d1, SCALE)
        s = t - DILATION
        if THRESHOLD:
            keep = kept(seeds, 2, b, s, h, o2, tokens, heads, THRESHOLD, C2)
            y = tl.where(keep, y, 0.0)
            slope = tl.where(keep, slope * SCALE, 0.0)
        x = y.to(x1.dtype.element_ty)
        if BACKWARD:
            mine = (n >= 1) & (n <= STEPS) & (s < T)
            where = (place + h * T + s[:, None]) * C2 + o2[None, :]
            tl.store(x2 + where, x, mask=mine[:, None])
            tl.store(slope2 + where, slope.to(x.dtype), mask=mine[:, None])

        new = d1 != d2
        acc = next31 + fresh(tl.dot(x, taps3[2], input_precision=PRECISION), new, SEGMENTS)
        next31 = tl.dot(x, taps3[1], fresh(next32, new, SEGMENTS), input_precision=PRECISION)
        next32 = tl.dot(x, taps3[0], input_precision=PRECISION)
        y, slope = finish(acc, shift3, d2, SCALE)
        y = y.to(x1.dtype.element_ty).to(tl.float32)
        z = tl.sum(y * w, 1) + map_b
        s = t - 2 * DILATION
        mine = (n >= 2) & (s < T)
        if BACKWARD:
            dz = tl.load(dr + place + s * K + h, mask=mine & (d2 != 0), other=0.0)
            gate = tl.sigmoid(z)
            dz *= tl.where(z > 0, 1.0, 0.0) if RELU else gate * (1.0 - gate)
            e = dz[:, None] * w * slope
            where = (place + h * T + s[:, None]) * C3 + o3[None, :]
            tl.store(out + where, e.to(out.dtype.element_ty), mask=mine[:, None])
            sum_bias += e
            sum_weight += dz[:, None] * y
            sum_dz += dz
        else:
            score = tl.maximum(z, 0.0) if RELU else tl.sigmoid(z) - 0.5
            tl.store(out + place + s * K + h, tl.where(d2 != 0, score, 0.0), mask=mine)
        d2, d1 = d1, d0
    if BACKWARD:
        sums += ((b * tl.num_programs(1) + tl.program_id(1)) * K + h) * 3 * C3 + o3
        tl.store(sums, tl.sum(sum_bias, 0))
        tl.store(sums + C3, tl.sum(sum_weight, 0))
        tl.store(sums + 2 * C3, tl.sum(sum_dz, 0) + tl.zeros((C3,), tl.float32))


def check(case: Case) -> None:
    alike = len(case.taps) == 3 and set(case.taps) == {3} and len(set(case.dilations)) == 1
    if not alike:
        raise UnsupportedCase(
            f"router: triton: convolutions of {case.taps} taps at dilations {case.dilations}; it does three of three "
            "taps at one dilation: use implementation='xla'"
        )
    check_choice("router: triton", "head size", case.N, SIZES, "use implementation='xla'")
    if case.dilations[0] > LANES:
        raise UnsupportedCase(
            f"router: triton: dilation {case.dilations[0]} is above {LANES}: use implementation='xla'"
        )
    if case.T * case.K * case.N >= 2**31:
        raise UnsupportedCase(
            f"router: triton: T K N = {case.T * case.K * case.N} does not fit an index of 32 bits: split the tokens"
        )
    check_installed("router")


def forward(case: Case, operands: Operands) -> jax.Array:
    x1, _ = call_first(case, operands, backward=False)
    return call_last(case, operands, x1, None)[0]


def backward(case: Case, operands: Operands, dr: jax.Array) -> Gradients:
    from pallas_kernels.router import triton_bwd

    return triton_bwd.backward(case, operands, dr)


def rounded(case: Case, operands: Operands, layer: int) -> jax.Array:
    return operands.convolutions[layer].weight.astype(case.dtype)


def scratch(case: Case, channels: int) -> jax.ShapeDtypeStruct:
    """What lies in memory between kernels."""
    return jax.ShapeDtypeStruct((case.B, case.K, case.T, channels), case.dtype)


def call_first(case: Case, operands: Operands, *, backward: bool) -> tuple[jax.Array, jax.Array]:
    """(dropout(x_1), what its gradient is multiplied by: for the backward pass alone)."""
    block = 64 if case.dtype != "float32" else 32
    steps = walk(case, case.N // block)
    x1 = scratch(case, case.N)
    return triton_call(
        _first_kernel,
        operands.k,
        operands.v,
        rounded(case, operands, 0),
        operands.convolutions[0].bias,
        operands.segment_ids,
        operands.seeds,
        case.T,
        *case.extent,
        out_shape=(x1, x1 if backward else jax.ShapeDtypeStruct((1,), case.dtype)),
        grid=(case.K * (case.N // block), steps.chunks, case.B),
        num_warps=4,
        num_stages=2,
        N=case.N,
        OUTPUTS=block,
        STEPS=steps.steps,
        BACKWARD=backward,
        **options(case),
    )


def call_last(case: Case, operands: Operands, x1: jax.Array, dr: jax.Array | None) -> tuple[jax.Array, ...]:
    """(r,) or, with dr, (e_3, dropout(x_2), what its gradient is multiplied by, sums [B chunks,K,3,C3])."""
    steps, channels = walk(case), case.N // 4
    outputs: list[Any] = [jax.ShapeDtypeStruct((case.B, case.T, case.K), jnp.float32)]
    outputs += [jax.ShapeDtypeStruct((1,), case.dtype)] * 3
    if dr is not None:
        x2 = scratch(case, case.N // 2)
        sums = jax.ShapeDtypeStruct((case.B * steps.chunks, case.K, 3, channels), jnp.float32)
        outputs = [scratch(case, channels), x2, x2, sums]
    return triton_call(
        _last_kernel,
        x1,
        rounded(case, operands, 1),
        operands.convolutions[1].bias,
        rounded(case, operands, 2),
        operands.convolutions[2].bias,
        operands.weight,
        operands.bias,
        operands.segment_ids,
        operands.seeds,
        dr,
        case.T,
        *case.extent,
        out_shape=outputs,
        grid=(case.K, steps.chunks, case.B),
        num_warps=4,
        num_stages=2,
        N=case.N,
        RELU=case.method == "relu",
        STEPS=steps.steps,
        BACKWARD=dr is not None,
        **options(case),
    )
