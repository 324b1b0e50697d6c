"""LTE's inputs of a decode step in triton.language: one launch for three convolutions of 3 taps, 2 apart.

A program takes one KV head of a few sequences. Of the three convolutions only what the last output needs is computed:
5, 3 and 1 places, 2 apart. Each sequence has 8 rows of a tile, one for each place, so that a convolution is three
products, of rows that a product with ones and zeros moves up (exact for 16 bits: activations are rounded to k's dtype).
Products of float32 are three of 11 bits each on the tensor cores: exact ones would take minutes to compile.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.arguments import FLOATS, Arguments
from pallas_kernels.lte_inputs.api import Case, Operands, Results
from pallas_kernels.tiles import ceil_div, power_of_2
from pallas_kernels.triton_call import check_installed, jit, tl, triton_call

ROOM = 8  # rows of a sequence
PAST = 12  # inputs that three convolutions of 3 taps, 2 apart, reach back over


@jit
def _silu(x):
    return x * tl.sigmoid(x)


@jit
def _rotate(x, o, at, valid, cos, sin, HALF: tl.constexpr):
    """x1 cos - x2 sin and x2 cos + x1 sin of the rows that begin ``at``."""
    x1 = tl.load(x + at, mask=valid, other=0.0).to(tl.float32)
    x2 = tl.load(x + at + HALF, mask=valid, other=0.0).to(tl.float32)
    tl.store(o + at, (x1 * cos - x2 * sin).to(o.dtype.element_ty), mask=valid)
    tl.store(o + at + HALF, (x2 * cos + x1 * sin).to(o.dtype.element_ty), mask=valid)


@jit
def _tap(recent, k, v, b, place, h, inside, c, B: tl.constexpr, K: tl.constexpr, N: tl.constexpr):
    """Channels c of the inputs of the sequences b at the places of the remembered and (place 12) the new one."""
    PAST: tl.constexpr = 12
    b, place, c = b[:, None], place[:, None], c[None, :]
    valid = inside[:, None] & (b < B)
    old = tl.load(recent + ((b * PAST + place) * K + h) * 2 * N + c, mask=valid & (place < PAST), other=0.0)
    new = tl.load(k + (b * K + h) * N + c, mask=valid & (place == PAST) & (c < N), other=0.0)
    new += tl.load(v + (b * K + h) * N + c - N, mask=valid & (place == PAST) & (c >= N), other=0.0)
    return tl.where(place < PAST, old.to(k.dtype.element_ty), new)


@jit
def _moved(x, TAP: tl.constexpr, ROWS: tl.constexpr):
    """Row r of the result is row r + TAP of x."""
    r = tl.arange(0, ROWS)
    ones = tl.where(r[:, None] + TAP == r[None, :], 1.0, 0.0).to(x.dtype)
    return tl.dot(ones, x, input_precision="tf32x3").to(x.dtype)


@jit
def _weights(weight, head, i, TAP: tl.constexpr, I: tl.constexpr, O: tl.constexpr, dtype):
    """The rows i of a tap's weight [I, O]."""
    return tl.load(weight + ((head * 3 + TAP) * I + i[:, None]) * O + tl.arange(0, O)[None, :]).to(dtype)


@jit
def _inputs_kernel(
    q, k, v, position, cos, sin, _recent, w1, b1, w2, b2, w3, b3, w, bias, active, q_out, k_out, score, recent,
    B: tl.constexpr, H: tl.constexpr, K: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr,
    PART: tl.constexpr, SHARED: tl.constexpr, SIGMOID: tl.constexpr, ACTIVE: tl.constexpr,
):  # fmt: skip
    ROOM: tl.constexpr = 8
    PAST: tl.constexpr = 12
    HALF: tl.constexpr = N // 2
    C: tl.constexpr = 2 * N
    G: tl.constexpr = H // K
    h = tl.program_id(1)
    head = 0 if SHARED else h
    dtype = k.dtype.element_ty
    first = tl.program_id(0) * (ROWS // ROOM)
    r = tl.arange(0, ROWS)
    b = first + r // ROOM
    place = r % ROOM
    at = tl.load(position + b, mask=b < B, other=0)

    # The scores: place r of convolution n is input 2 (r + n), and of the sequence position p - 12 + that.
    y1 = tl.load(b1 + head * (C // 2) + tl.arange(0, C // 2))[None, :].to(tl.float32)
    for tap in tl.static_range(3):
        index = 2 * (place + tap)
        inside = (place < 5) & (at - PAST + index >= 0)
        for start in tl.static_range(0, C, PART):
            c = start + tl.arange(0, PART)
            x = _tap(recent, k, v, b, index, h, inside, c, B, K, N)
            y1 += tl.dot(x, _weights(w1, head, c, tap, C, C // 2, dtype), input_precision="tf32x3")
    real = ((place < 5) & (at - PAST + 2 * (place + 1) >= 0))[:, None]
    x1 = tl.where(real, _silu(y1), 0.0).to(dtype)
    y2 = tl.load(b2 + head * (C // 4) + tl.arange(0, C // 4))[None, :].to(tl.float32)
    i = tl.arange(0, C // 2)
    for tap in tl.static_range(3):
        y2 += tl.dot(_moved(x1, tap, ROWS), _weights(w2, head, i, tap, C // 2, C // 4, dtype), input_precision="tf32x3")
    real = ((place < 3) & (at - PAST + 2 * (place + 2) >= 0))[:, None]
    x2 = tl.where(real, _silu(y2), 0.0).to(dtype)
    y3 = tl.load(b3 + head * (C // 8) + tl.arange(0, C // 8))[None, :].to(tl.float32)
    i = tl.arange(0, C // 4)
    for tap in tl.static_range(3):
        y3 += tl.dot(_moved(x2, tap, ROWS), _weights(w3, head, i, tap, C // 4, C // 8, dtype), input_precision="tf32x3")
    x3 = _silu(y3).to(dtype).to(tl.float32)
    z = tl.sum(x3 * tl.load(w + head * (C // 8) + tl.arange(0, C // 8))[None, :].to(tl.float32), 1)
    z += tl.load(bias + head).to(tl.float32)
    z = tl.sigmoid(z) - 0.5 if SIGMOID else tl.maximum(z, 0.0)
    z = tl.where(at - PAST + 6 >= 0, z, 0.0)
    tl.store(score + b * K + h, z, mask=(b < B) & (place == 0))

    half = tl.arange(0, HALF)[None, :]
    rows = first + tl.arange(0, ROWS // ROOM * GROUP) // GROUP
    g = tl.arange(0, ROWS // ROOM * GROUP) % GROUP
    c = tl.load(cos + rows[:, None] * HALF + half, mask=rows[:, None] < B, other=0.0)
    s = tl.load(sin + rows[:, None] * HALF + half, mask=rows[:, None] < B, other=0.0)
    inside = (rows < B)[:, None]
    _rotate(q, q_out, (rows * H + h * G + g)[:, None] * N + half, inside & (g < G)[:, None], c, s, HALF)
    _rotate(k, k_out, (rows * K + h)[:, None] * N + half, inside & (g == 0)[:, None], c, s, HALF)

    # The inputs move on by one: all are read before any is written, as all threads of a program wait in between.
    SLOTS: tl.constexpr = 16
    move = tl.arange(0, ROWS // ROOM * SLOTS)
    b = first + move // SLOTS
    slot = move % SLOTS
    kept = _tap(recent, k, v, b, slot + 1, h, slot < PAST, tl.arange(0, C), B, K, N)
    moves = (slot < PAST) & (b < B)
    if ACTIVE:
        moves = moves & (tl.load(active + b, mask=b < B, other=0) != 0)
    tl.debug_barrier()
    to = recent + ((b * PAST + slot) * K + h)[:, None] * C + tl.arange(0, C)[None, :]
    tl.store(to, kept.to(recent.dtype.element_ty), mask=moves[:, None])


def check(case: Case) -> None:
    fix = "use implementation='xla'"
    require = Arguments("lte_inputs: triton").require
    threefold = case.taps == (3, 3, 3) and case.dilations == (2, 2, 2)
    require(threefold, f"taps {case.taps} with dilations {case.dilations}; it does 3 taps 2 apart, three times: {fix}")
    C, N = 2 * case.size, case.size
    halved = case.channels == (C, C // 2, C // 4, C // 8)
    require(N in (64, 128) and halved, f"heads of {N}, channels {case.channels}; it halves twice 64 or 128: {fix}")
    alike = case.dtype in FLOATS and case.recent_dtype == case.dtype
    require(alike, f"k is {case.dtype}, recent {case.recent_dtype}; it takes one float dtype: {fix}")
    numbers = case.batch * PAST * case.kv_heads * C
    require(
        numbers < 2**31, f"{numbers} numbers are remembered, which are counted in 32 bits: split the batch or {fix}"
    )
    check_installed("lte_inputs")


def step(operands: Operands, active: jax.Array | None, *, method: str) -> Results:
    q, k, v, position, cos, sin, recent, convolutions, weight, bias = operands
    B, K, N = k.shape
    H = q.shape[1]
    # In float32 threefold products spill least in 64 rows of 64-wide heads; those of 128 would then need more shared
    # memory than there is, even with the first convolution's channels in parts.
    full = k.dtype == jnp.float32
    rows = 64 if (N == 64 if full else B > 8) else 16
    part = 64 if full and N == 128 else 2 * N
    flags = None if active is None else active.astype(jnp.int8)
    parts = [array for convolution in convolutions for array in convolution[:2]]
    arguments = (q, k, v, position, cos, sin, recent, *parts, weight, bias, flags)
    return Results(*triton_call(
        _inputs_kernel, *arguments,
        out_shape=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct(k.shape, k.dtype),
            jax.ShapeDtypeStruct((B, K), jnp.float32),
            jax.ShapeDtypeStruct(recent.shape, recent.dtype),
        ),
        grid=(ceil_div(B, rows // ROOM), K), num_warps=4, num_stages=1, input_output_aliases={6: 3},
        B=B, H=H, K=K, N=N, ROWS=rows, GROUP=power_of_2(H // K), SHARED=weight.shape[0] == 1,
        PART=part, SIGMOID=method == "sigmoid", ACTIVE=active is not None,
    ))  # fmt: skip
