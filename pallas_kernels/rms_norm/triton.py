"""The gated norm in Triton: each pass reads its inputs once and writes its outputs once.

    r = 1 / sqrt(mean(x^2) + eps),   n = x r,   s = silu(gate),   y = weight n s
    dn = dy weight s,   dx = r (dn - n mean(n dn)),   dweight = sum of dy n s,   dgate = dy weight n silu'(gate)

A program takes a stretch of rows, a few at a time; in the backward pass it keeps their sum for dweight, and XLA adds
the programs' sums in a fixed order. r and n are computed again from x, which the backward pass reads anyway.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import UnsupportedCase
from pallas_kernels.tiles import ceil_div
from pallas_kernels.triton_call import check_installed, fold_batch, interpreting, jit, tl, triton_call
from pallas_kernels.triton_math import sigmoid

WIDEST = 8192  # a whole row stands in the registers of one program
ELEMENTS = {"forward": (2048, 4), "backward": (1024, 1)}  # of a program at a time, and its warps
STRETCH = {"forward": 1, "backward": 16}  # how many times a program takes rows


def check(case: Any) -> None:
    """Raises UnsupportedCase unless these kernels do ``case``."""
    check_installed("rms_norm")
    if case.width > WIDEST or case.rows * case.width >= 2**31:
        raise UnsupportedCase(
            f"rms_norm: {case.rows} rows of {case.width}: at most {WIDEST} in a row and 2^31 in all; "
            "use implementation='xla'"
        )


@jit
def _forward(
    x_ptr, weight_ptr, gate_ptr, R, eps,
    y_ptr,
    V: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, GATED: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, WIDTH)[None, :]
    base = tl.program_id(1) * R  # the rows of one weight
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
    FAST: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, WIDTH)[None, :]
    base = tl.program_id(1) * R
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
        n = x * r
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


def _plan(kernel: str, x: jax.Array, weight: jax.Array, gated: bool) -> dict[str, Any]:
    """The grid and the compile-time values of a launch."""
    (G, V), rows = weight.shape, x.shape[0] // weight.shape[0]
    elements, warps = ELEMENTS[kernel]
    width = max(1 << (V - 1).bit_length(), 16)
    at_once = max(elements // width, 1)
    steps = STRETCH[kernel]
    return dict(
        grid=(ceil_div(rows, at_once * steps), G), num_warps=warps, num_stages=1,
        V=V, WIDTH=width, ROWS=at_once, STEPS=steps, GATED=gated, FAST=not interpreting(),
    )  # fmt: skip


@functools.partial(fold_batch, static=("eps", "dtype"))
def _values(x, weight, gate, *, eps, dtype):
    """y; weight is [G,V], one for each R / G rows."""
    return triton_call(
        _forward, x, weight, gate, x.shape[0] // weight.shape[0], eps,
        out_shape=jax.ShapeDtypeStruct(x.shape, dtype), **_plan("forward", x, weight, gate is not None),
    )  # fmt: skip


def forward(x, weight, gate, *, eps, dtype):
    """y; the protocol is in ``api``."""
    return _values(x, weight[None], gate, eps=eps, dtype=dtype)


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


def backward(x, weight, gate, dy, *, eps):
    """dx, dweight, dgate; the protocol is in ``api``."""
    dx, dweight, dgate = _gradients(x, weight[None], gate, dy, eps=eps)
    return dx, dweight[0], dgate
