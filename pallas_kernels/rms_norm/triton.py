"""The gated norm in Triton: each pass reads its inputs once and writes its outputs once.

    r = 1 / sqrt(mean(x^2) + eps),   n = x r,   s = silu(gate),   y = weight n s
    dn = dy weight s,   dx = r (dn - n mean(n dn)),   dweight = sum of dy n s,   dgate = dy weight n silu'(gate)

In a residual stream dx begins with the gradient of x itself, and rows are as wide as the model: ``_stream_backward``
takes one at a time, and loads the next while it works on this one.

A program takes a stretch of rows, a few at a time; in the backward pass it keeps their sum for dweight, and XLA adds
the programs' sums in a fixed order. r and n are computed again from x, which the backward pass reads anyway.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.batching import fold_batch
from pallas_kernels.dispatch import UnsupportedCase
from pallas_kernels.rms_norm.api import Case
from pallas_kernels.tiles import ceil_div, power_of_2
from pallas_kernels.triton_call import check_installed, interpreting, jit, tl, triton_call
from pallas_kernels.triton_math import sigmoid

WIDEST = 8192  # a whole row stands in the registers of one program
ELEMENTS = {"forward": (2048, 4), "backward": (1024, 1)}  # of a program at a time, and its warps
STRETCH = {"forward": 1, "backward": 16}  # how many times a program takes rows
STREAM = 512  # elements of a stream's row that a warp takes, of at least 4


def check(case: Case) -> None:
    """Raises UnsupportedCase unless these kernels do ``case``."""
    check_installed("rms_norm")
    if case.width > WIDEST:
        raise UnsupportedCase(f"rms_norm: rows of {case.width}; at most {WIDEST}: use implementation='xla'")


@jit
def _forward(
    x_ptr, weight_ptr, gate_ptr, R, eps,
    y_ptr,
    V: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, GATED: tl.constexpr,
    WIDE: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, WIDTH)[None, :]
    base = tl.program_id(1) * R  # the rows of one weight
    if WIDE:
        base = base.to(tl.int64)
    weight = tl.load(weight_ptr + tl.program_id(1) * V + column, mask=column < V, other=0.0).to(tl.float32)
    for step in range(STEPS):
        row = (tl.program_id(0) * STEPS + step) * ROWS + tl.arange(0, ROWS)[:, None]
        inside = (row < R) & (column < V)
        at = (base + row) * V + column
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        y = x * tl.rsqrt(tl.sum(x * x, 1) / V + eps)[:, None] * weight
        if GATED:
            gate = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
            y *= gate * sigmoid(gate, FAST)
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@jit
def _backward(
    x_ptr, weight_ptr, gate_ptr, dy_ptr, R, eps,
    dx_ptr, dweight_ptr, dgate_ptr,
    V: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, GATED: tl.constexpr,
    WIDE: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, WIDTH)[None, :]
    base = tl.program_id(1) * R
    if WIDE:
        base = base.to(tl.int64)
    weight = tl.load(weight_ptr + tl.program_id(1) * V + column, mask=column < V, other=0.0).to(tl.float32)
    dweight = tl.zeros((ROWS, WIDTH), tl.float32)
    for step in range(STEPS):
        row = (tl.program_id(0) * STEPS + step) * ROWS + tl.arange(0, ROWS)[:, None]
        inside = (row < R) & (column < V)
        at = (base + row) * V + column
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            gate = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
        r = tl.rsqrt(tl.sum(x * x, 1) / V + eps)[:, None]
        n = tl.where(inside, x * r, 0.0)  # no 0 * inf in dweight where there is no row and eps is 0
        dn = dy * weight
        if GATED:
            slope = sigmoid(gate, FAST)
            silu = gate * slope
            dgate = dn * n * (slope + silu * (1.0 - slope))
            tl.store(dgate_ptr + at, dgate.to(dgate_ptr.dtype.element_ty), mask=inside)
            dn *= silu
            dy *= silu
        dweight += dy * n
        dx = r * (dn - n * (tl.sum(n * dn, 1) / V)[:, None])
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    at = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    total = tl.sum(dweight, 0)[None, :]
    tl.store(dweight_ptr + at * V + column, total, mask=column < V)


@jit
def _stream_backward(
    x_ptr, weight_ptr, dy_ptr, past_ptr, R, eps,
    dx_ptr, dweight_ptr,
    V: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, WIDTH)
    base = tl.program_id(1) * R
    if WIDE:
        base = base.to(tl.int64)
    weight = tl.load(weight_ptr + tl.program_id(1) * V + column, mask=column < V, other=0.0).to(tl.float32)
    dweight = tl.zeros((WIDTH,), tl.float32)
    row = tl.program_id(0) * STEPS
    end = tl.minimum(row + STEPS, R)
    at = (base + row) * V + column
    inside = (row < end) & (column < V)
    x = tl.load(x_ptr + at, mask=inside, other=0.0)
    dy = tl.load(dy_ptr + at, mask=inside, other=0.0)
    past = tl.load(past_ptr + at, mask=inside, other=0.0)
    for _ in range(STEPS):
        row += 1
        ahead = (row < end) & (column < V)
        next_x = tl.load(x_ptr + at + V, mask=ahead, other=0.0)
        next_dy = tl.load(dy_ptr + at + V, mask=ahead, other=0.0)
        next_past = tl.load(past_ptr + at + V, mask=ahead, other=0.0)
        n = x.to(tl.float32)
        dn = dy.to(tl.float32) * weight
        r = tl.rsqrt(tl.sum(n * n, 0) / V + eps)
        n = tl.where(inside, n * r, 0.0)
        dweight += dy.to(tl.float32) * n
        dx = r * (dn - n * (tl.sum(n * dn, 0) / V)) + past.to(tl.float32)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        at += V
        inside = ahead
        x = next_x
        dy = next_dy
        past = next_past
    at = (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)) * V + column
    tl.store(dweight_ptr + at, dweight, mask=column < V)


def _plan(kernel: str, x: jax.Array, weight: jax.Array, gated: bool) -> dict[str, Any]:
    """The grid and the compile-time values of a launch."""
    (G, V), rows = weight.shape, x.shape[0] // weight.shape[0]
    elements, warps = ELEMENTS[kernel]
    width = power_of_2(V, 16)
    at_once = max(elements // width, 1)
    steps = STRETCH[kernel]
    return dict(
        grid=(ceil_div(rows, at_once * steps), G), num_warps=warps, num_stages=1,
        V=V, WIDTH=width, ROWS=at_once, STEPS=steps, GATED=gated,
        WIDE=x.size >= 2**31, FAST=not interpreting(),
    )  # fmt: skip


@functools.partial(fold_batch, static=("eps", "dtype"))
def _values(x, weight, gate, *, eps, dtype):
    """y; weight is [G,V], one for each R / G rows."""
    return triton_call(
        _forward, x, weight, gate, x.shape[0] // weight.shape[0], eps,
        out_shape=jax.ShapeDtypeStruct(x.shape, dtype), **_plan("forward", x, weight, gate is not None),
    )  # fmt: skip


def _rows(x):
    """[..., V] to [R,V]; None stays."""
    return None if x is None else x.reshape(-1, x.shape[-1])


def forward(x, weight, gate, *, eps, dtype):
    """y; the protocol is in ``api``."""
    return _values(_rows(x), weight[None], _rows(gate), eps=eps, dtype=dtype).reshape(x.shape)


@functools.partial(fold_batch, static=("eps",))
def _gradients(x, weight, gate, dy, *, eps):
    """dx, dweight [G,V], dgate."""
    (R, V), G = x.shape, weight.shape[0]
    plan = _plan("backward", x, weight, gate is not None)
    dx, dweight, dgate = triton_call(
        _backward, x, weight, gate, dy, R // G, eps,
        out_shape=(
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct((G, plan["grid"][0], V), jnp.float32),
            jax.ShapeDtypeStruct((R, 1), x.dtype) if gate is None else jax.ShapeDtypeStruct(gate.shape, gate.dtype),
        ),
        **plan,
    )  # fmt: skip
    return dx, jnp.sum(dweight, axis=1).astype(weight.dtype), None if gate is None else dgate


@functools.partial(fold_batch, static=("eps",))
def _stream_gradients(x, weight, dy, past, *, eps):
    """dx, dweight [G,V] of the norm of a stream; ``past``: what x receives beside the norm."""
    (R, V), G, steps = x.shape, weight.shape[0], STRETCH["backward"]
    width = power_of_2(V, 16)
    grid = (ceil_div(R // G, steps), G)
    dx, dweight = triton_call(
        _stream_backward, x, weight, dy, past, R // G, eps,
        out_shape=(jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct((G, grid[0], V), jnp.float32)),
        grid=grid, num_warps=max(4, width // STREAM), num_stages=1,
        V=V, WIDTH=width, STEPS=steps, WIDE=x.size >= 2**31,
    )  # fmt: skip
    return dx, jnp.sum(dweight, axis=1).astype(weight.dtype)


def backward(x, weight, gate, dy, past=None, *, eps):
    """dx, dweight, dgate; the protocol is in ``api``."""
    rows, weight = _rows(x), weight[None]
    if past is not None:
        dx, dweight = _stream_gradients(rows, weight, _rows(dy), _rows(past), eps=eps)
        return dx.reshape(x.shape), dweight[0], None
    dx, dweight, dgate = _gradients(rows, weight, _rows(gate), _rows(dy), eps=eps)
    return dx.reshape(x.shape), dweight[0], None if gate is None else dgate.reshape(gate.shape)
