"""The short convolution in Triton: a program walks over a stretch of time with the last inputs in registers.

    forward    pre_t = sum_j w[taps-1-j] x_{t-j},   y_t = act(pre_t)
    backward   dpre_t = dy_t act'(pre_t),   dx_u = sum_j w[taps-1-j] dpre_{u+j},   dw[taps-1-j] = sum_t dpre_t x_{t-j}

A program owns some channels of one stretch of one row. It loads each row of x (and dy) once, several at a time so that
many loads are on their way, and computes each sigmoid once; only the taps - 1 rows at the edges of a stretch are read
twice. What it needs of earlier tokens stays in registers: their inputs, and in the backward pass the sums of the dx
that later tokens still add to. The forward pass keeps nothing for the backward pass but its inputs.

The rows before a row's first document token are those of the initial state, wherever that token stands.
"""

# Tuples of rows grow in the kernels' loops.
# mypy: disable-error-code="assignment"

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.arguments import Arguments
from pallas_kernels.batching import fold_batch
from pallas_kernels.short_convolution import xla
from pallas_kernels.short_convolution.api import Case
from pallas_kernels.short_convolution.rows import bounds, final_state
from pallas_kernels.short_convolution.triton_tiles import choose
from pallas_kernels.tiles import ceil_div
from pallas_kernels.triton_call import (
    LONGEST_AXIS,
    check_installed,
    interpreting,
    jit,
    tl,
    triton_call,
)
from pallas_kernels.triton_math import sigmoid

MOST_TAPS = 8  # what a program can hold in its registers

step = xla.step  # a fusion of XLA's on every device


@jit
def _input(x_ptr, state_ptr, t, first, T, inside, D: tl.constexpr, PAST: tl.constexpr, STATE: tl.constexpr):
    """Row t of the inputs, float32: of the initial state before ``first``; zeros where there is none."""
    if STATE:
        before = t < first
        row = tl.where(before, PAST + t - first, t)
        rows = tl.where(before, state_ptr, x_ptr)
        there = (row >= 0) & (before | (t < T))
    else:
        row, rows = t, x_ptr
        there = (t >= 0) & (t < T)
    return tl.load(rows + row * D, mask=inside & there, other=0.0)


@jit
def _document(ids_ptr, t, first, first_id, T, PACKED: tl.constexpr, STATE: tl.constexpr):
    """The document of row t, 0 for padding and beyond both ends; the initial state belongs to the first one."""
    document = 1
    if PACKED:
        document = tl.load(ids_ptr + t, mask=(t >= 0) & (t < T), other=0)
        if STATE:
            document = tl.where(t < first, first_id, document)
    return document


@jit
def _rows(
    x_ptr, state_ptr, dy_ptr, ids_ptr, begin, first, T, inside, D: tl.constexpr, COUNT: tl.constexpr,
    PAST: tl.constexpr, PACKED: tl.constexpr, STATE: tl.constexpr, WHOLE: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """COUNT rows of inputs from ``begin`` on, as they lie in memory, those of dy if BACK, and their documents.

    WHOLE: none of them stands beyond the end. Where there is padding, the initial state lies within the row.
    """
    rows, drows, owns = (), (), ()
    for i in tl.static_range(COUNT):
        t = begin + i
        if WHOLE and not (PACKED and STATE):
            rows += (tl.load(x_ptr + t * D, mask=inside),)
        else:
            rows += (_input(x_ptr, state_ptr, t, first, T, inside, D, PAST, PACKED and STATE),)
        if BACK:
            if WHOLE and not (PACKED and STATE):
                drows += (tl.load(dy_ptr + t * D, mask=inside),)
            else:
                drows += (tl.load(dy_ptr + t * D, mask=inside & (t < T), other=0.0),)
        owns += (_document(ids_ptr, t, 0, 1, T, PACKED, False),)
    return rows, drows, owns


@jit
def _before(
    x_ptr, state_ptr, ids_ptr, start, first, first_id, T, inside,
    D: tl.constexpr, PAST: tl.constexpr, PACKED: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """The PAST inputs before row ``start``, float32, and their documents."""
    past, seen = (), ()
    for i in tl.static_range(PAST):
        t = start - PAST + i
        past += (_input(x_ptr, state_ptr, t, first, T, inside, D, PAST, STATE).to(tl.float32),)
        seen += (_document(ids_ptr, t, first, first_id, T, PACKED, STATE),)
    return past, seen


@jit
def _one_document(owns, seen, ROWS: tl.constexpr, PAST: tl.constexpr):
    """Whether some rows and those that they reach back to are of one document, so that nothing need be masked."""
    one = owns[0] != 0
    for i in tl.static_range(PAST):
        one &= seen[i] == owns[0]
    for i in tl.static_range(1, ROWS):
        one &= owns[i] == owns[0]
    return one


@jit
def _latest(owns, seen, begin, first, first_id, ROWS: tl.constexpr, PAST: tl.constexpr):
    """The documents of the last PAST rows after ROWS more."""
    latest = ()
    for i in tl.static_range(ROWS, ROWS + PAST):
        if i < PAST:
            latest += (seen[i],)
        else:
            latest += (tl.where(begin + i - PAST < first, first_id, owns[i - PAST]),)
    return latest


@jit
def _walk(
    rows, owns, past, seen, weight, y_ptr, begin, first, first_id, T, inside,
    D: tl.constexpr, TAPS: tl.constexpr, ROWS: tl.constexpr, SILU: tl.constexpr, MASKED: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """Writes y of some rows; the last inputs after them."""
    for i in tl.static_range(ROWS):
        t = begin + i
        past += (rows[i].to(tl.float32),)
        if MASKED:
            seen += (owns[i],)
        pre = weight[0] * 0.0
        for j in tl.static_range(TAPS):
            x = past[j]
            if MASKED:
                x = tl.where((seen[j] == owns[i]) & (owns[i] != 0), x, 0.0)
            pre += weight[j] * x
        past = past[1:]
        if MASKED:
            seen = seen[1 : TAPS - 1]
            seen += (tl.where(t < first, first_id, owns[i]),)
        if SILU:
            pre *= sigmoid(pre, FAST)
        tl.store(y_ptr + t * D, pre.to(y_ptr.dtype.element_ty), mask=inside & (t < T))
    return past


@jit
def _forward(
    x_ptr, weight_ptr, ids_ptr, state_ptr, bounds_ptr, T, group,
    y_ptr,
    D: tl.constexpr, TAPS: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
    SILU: tl.constexpr, PACKED: tl.constexpr, STATE: tl.constexpr, EVEN: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    PAST: tl.constexpr = TAPS - 1
    b = tl.program_id(2).to(tl.int64)
    channels = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = channels < D
    start = tl.program_id(0) * CHUNK
    weight_ptr += b // group * TAPS * D + channels
    x_ptr += b * T * D + channels
    y_ptr += b * T * D + channels
    state_ptr += b * PAST * D + channels
    ids_ptr += b * T
    first, first_id = 0, 1
    if PACKED and STATE:
        first, first_id = tl.load(bounds_ptr + 4 * b), tl.load(bounds_ptr + 4 * b + 1)
    weight = ()
    for i in tl.static_range(TAPS):
        weight += (tl.load(weight_ptr + i * D, mask=inside, other=0.0).to(tl.float32),)
    past, seen = _before(x_ptr, state_ptr, ids_ptr, start, first, first_id, T, inside, D, PAST, PACKED, STATE)
    for offset in range(0, CHUNK, ROWS):
        begin = start + offset
        rows, _, owns = _rows(x_ptr, state_ptr, x_ptr, ids_ptr, begin, first, T, inside, D, ROWS, PAST, PACKED, STATE,
                              EVEN, False)  # fmt: skip
        if not PACKED or _one_document(owns, seen, ROWS, PAST):
            past = _walk(rows, owns, past, seen, weight, y_ptr, begin, first, first_id, T, inside, D, TAPS, ROWS,
                         SILU, False, FAST)  # fmt: skip
        else:
            past = _walk(rows, owns, past, seen, weight, y_ptr, begin, first, first_id, T, inside, D, TAPS, ROWS,
                         SILU, True, FAST)  # fmt: skip
        if PACKED:
            seen = _latest(owns, seen, begin, first, first_id, ROWS, PAST)


@jit
def _store_gradient(
    dx, u, document, dx_ptr, dstate_ptr, dfinal_ptr, start, first, last, last_id, T, inside,
    D: tl.constexpr, PAST: tl.constexpr, PACKED: tl.constexpr, STATE: tl.constexpr, FINAL: tl.constexpr,
):  # fmt: skip
    """Of row u, to which every token has added: into dx, or into the gradient of the initial state."""
    if FINAL:
        slot = u - last + PAST - 1
        there = (slot >= 0) & (slot < PAST)
        if PACKED:
            there &= document == last_id
        dx += tl.load(dfinal_ptr + slot * D, mask=inside & there, other=0.0).to(tl.float32)
    dx = dx.to(dx_ptr.dtype.element_ty)
    mine = (u >= start) & (u < T)
    if STATE:
        before = u < first
        slot = PAST + u - first
        # The rows before the row's beginning are the first program's.
        tl.store(dstate_ptr + slot * D, dx, mask=inside & before & (slot >= 0) & (mine | ((start == 0) & (u < 0))))
        if PACKED:
            dx = tl.where(before, 0.0, dx)
    tl.store(dx_ptr + u * D, dx, mask=inside & mine)


@jit
def _walk_back(
    rows, drows, owns, past, seen, sums, dweight, weight, dx_ptr, dstate_ptr, dfinal_ptr, begin, start,
    first, first_id, last, last_id, T, inside,
    D: tl.constexpr, TAPS: tl.constexpr, ROWS: tl.constexpr, SILU: tl.constexpr, PACKED: tl.constexpr,
    STATE: tl.constexpr, FINAL: tl.constexpr, MASKED: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Adds the terms of some tokens and writes the dx that are then complete; the last inputs, sums and dweight."""
    PAST: tl.constexpr = TAPS - 1
    for i in tl.static_range(ROWS):
        past += (rows[i].to(tl.float32),)
        seen += (owns[i],)
        dpre = drows[i].to(tl.float32)
        if MASKED:
            dpre = tl.where(owns[i] != 0, dpre, 0.0)
        inputs = ()
        pre = weight[0] * 0.0
        for j in tl.static_range(TAPS):
            x = past[j]
            if MASKED:
                x = tl.where((seen[j] == owns[i]) & (owns[i] != 0), x, 0.0)
            inputs += (x,)
            pre += weight[j] * x
        if SILU:
            gate = sigmoid(pre, FAST)
            dpre *= gate + pre * gate * (1.0 - gate)
        sums += (weight[0] * 0.0,)  # of dx of the token itself
        new_sums, new_dweight = (), ()
        for j in tl.static_range(TAPS):
            dj = dpre
            if MASKED:
                dj = tl.where(seen[j] == owns[i], dpre, 0.0)
            new_sums += (sums[j] + weight[j] * dj,)
            new_dweight += (dweight[j] + dpre * inputs[j],)
        _store_gradient(
            new_sums[0], begin + i - PAST, seen[0], dx_ptr, dstate_ptr, dfinal_ptr, start, first, last, last_id, T,
            inside, D, PAST, PACKED, STATE, FINAL,
        )  # fmt: skip
        past, sums, dweight = past[1:], new_sums[1:], new_dweight
        seen = seen[1:PAST]
        seen += (tl.where(begin + i < first, first_id, owns[i]),)
    return past, sums, dweight


@jit
def _backward(
    x_ptr, weight_ptr, ids_ptr, state_ptr, bounds_ptr, dy_ptr, dfinal_ptr, T, group,
    dx_ptr, dweight_ptr, dstate_ptr,
    D: tl.constexpr, TAPS: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
    SILU: tl.constexpr, PACKED: tl.constexpr, STATE: tl.constexpr, FINAL: tl.constexpr, EVEN: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    PAST: tl.constexpr = TAPS - 1
    b = tl.program_id(2).to(tl.int64)
    channels = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = channels < D
    start = tl.program_id(0) * CHUNK
    weight_ptr += b // group * TAPS * D + channels
    x_ptr += b * T * D + channels
    dy_ptr += b * T * D + channels
    dx_ptr += b * T * D + channels
    state_ptr += b * PAST * D + channels
    dstate_ptr += b * PAST * D + channels
    dfinal_ptr += b * PAST * D + channels
    ids_ptr += b * T
    dweight_ptr += (b * tl.num_programs(0) + tl.program_id(0)) * TAPS * D + channels
    first, first_id, last, last_id = 0, 1, T - 1, 1
    if PACKED and STATE:
        first, first_id = tl.load(bounds_ptr + 4 * b), tl.load(bounds_ptr + 4 * b + 1)
    if PACKED and FINAL:
        last, last_id = tl.load(bounds_ptr + 4 * b + 2), tl.load(bounds_ptr + 4 * b + 3)
    weight, sums, dweight = (), (), ()
    for i in tl.static_range(TAPS):
        weight += (tl.load(weight_ptr + i * D, mask=inside, other=0.0).to(tl.float32),)
        dweight += (tl.zeros((WIDTH,), tl.float32),)
    for _ in tl.static_range(PAST):
        sums += (tl.zeros((WIDTH,), tl.float32),)  # of dx_t over the tokens so far
    past, seen = _before(x_ptr, state_ptr, ids_ptr, start, first, first_id, T, inside, D, PAST, PACKED, STATE)
    for offset in range(0, CHUNK, ROWS):
        begin = start + offset
        rows, drows, owns = _rows(x_ptr, state_ptr, dy_ptr, ids_ptr, begin, first, T, inside, D, ROWS, PAST, PACKED,
                                  STATE, EVEN, True)  # fmt: skip
        if not PACKED or _one_document(owns, seen, ROWS, PAST):
            past, sums, dweight = _walk_back(
                rows, drows, owns, past, seen, sums, dweight, weight, dx_ptr, dstate_ptr, dfinal_ptr, begin, start,
                first, first_id, last, last_id, T, inside, D, TAPS, ROWS, SILU, PACKED, STATE, FINAL, False, FAST,
            )  # fmt: skip
        else:
            past, sums, dweight = _walk_back(
                rows, drows, owns, past, seen, sums, dweight, weight, dx_ptr, dstate_ptr, dfinal_ptr, begin, start,
                first, first_id, last, last_id, T, inside, D, TAPS, ROWS, SILU, PACKED, STATE, FINAL, True, FAST,
            )  # fmt: skip
        if PACKED:
            seen = _latest(owns, seen, begin, first, first_id, ROWS, PAST)
    for i in tl.static_range(TAPS):
        tl.store(dweight_ptr + i * D, dweight[i], mask=inside)
    # The tokens after the stretch, which its last inputs reach; the weights' gradient of them is the next program's.
    rows, drows, owns = _rows(x_ptr, state_ptr, dy_ptr, ids_ptr, start + CHUNK, first, T, inside, D, PAST, PAST, PACKED,
                              STATE, False, True)  # fmt: skip
    _walk_back(
        rows, drows, owns, past, seen, sums, dweight, weight, dx_ptr, dstate_ptr, dfinal_ptr, start + CHUNK, start,
        first, first_id, last, last_id, T, inside, D, TAPS, PAST, SILU, PACKED, STATE, FINAL, PACKED, FAST,
    )  # fmt: skip


def check(case: Case) -> None:
    """Raises UnsupportedCase unless these kernels do ``case``."""
    check_installed("short_convolution")
    require, other = Arguments("short_convolution: triton").require, "use implementation='xla'"
    require(case.taps <= MOST_TAPS, f"{case.taps} taps; a program holds at most {MOST_TAPS} in registers: {other}")
    require(case.batch <= LONGEST_AXIS, f"{case.batch} rows; a grid has at most {LONGEST_AXIS}: {other}")
    require(
        case.tokens * case.width < 2**31,
        f"{case.tokens} tokens of {case.width} channels are more than a 32-bit index of a row reaches: {other}",
    )


def _plan(
    kernel: str, x: jax.Array, weight: jax.Array, activation: str | None, PACKED: bool, **flags: bool
) -> dict[str, Any]:
    """The grid and the compile-time values of a launch."""
    (B, T, D), taps = x.shape, weight.shape[1]
    tile = choose(kernel, D, PACKED)
    return dict(
        grid=(ceil_div(T, tile.chunk), ceil_div(D, tile.width), B), num_warps=tile.warps, num_stages=1,
        D=D, TAPS=taps, WIDTH=tile.width, CHUNK=tile.chunk, ROWS=tile.rows, SILU=activation == "silu",
        EVEN=T % tile.chunk == 0, FAST=not interpreting(), PACKED=PACKED, **flags,
    )  # fmt: skip


@functools.partial(fold_batch, static=("activation",))
def _values(x, weight, segment_ids, initial_state, *, activation):
    """y; weight is [G,taps,D], one for each B / G rows."""
    packed, state = segment_ids is not None, initial_state is not None
    edges = jnp.stack(bounds(segment_ids), axis=1) if packed and state else None
    return triton_call(
        _forward, x, weight, segment_ids, initial_state, edges, x.shape[1], x.shape[0] // weight.shape[0],
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        **_plan("forward", x, weight, activation, PACKED=packed, STATE=state),
    )  # fmt: skip


def forward(x, weight, segment_ids, initial_state, *, activation):
    """y, final_state; the protocol is in ``api``."""
    y = _values(x, weight[None], segment_ids, initial_state, activation=activation)
    return y, final_state(x, segment_ids, initial_state, weight.shape[0] - 1)


@functools.partial(fold_batch, static=("activation",))
def _gradients(x, weight, segment_ids, initial_state, dy, dfinal_state, *, activation):
    """dx, dweight [G,taps,D] and dinitial_state."""
    (B, T, D), (G, taps, _) = x.shape, weight.shape
    packed, state, final = segment_ids is not None, initial_state is not None, dfinal_state is not None
    edges = jnp.stack(bounds(segment_ids), axis=1) if packed and (state or final) else None
    plan = _plan("backward", x, weight, activation, PACKED=packed, STATE=state, FINAL=final)
    small = jax.ShapeDtypeStruct((B, 1), x.dtype)
    dx, dweight, dinitial = triton_call(
        _backward, x, weight, segment_ids, initial_state, edges, dy, dfinal_state, T, B // G,
        out_shape=(
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct((B, plan["grid"][0], taps, D), jnp.float32),
            jax.ShapeDtypeStruct((B, taps - 1, D), x.dtype) if state else small,
        ),
        **plan,
    )  # fmt: skip
    dweight = jnp.sum(dweight.reshape(G, -1, taps, D), axis=1)
    return dx, dweight.astype(weight.dtype), dinitial if state else None


def backward(x, weight, segment_ids, initial_state, dy, dfinal_state, *, activation):
    """dx, dweight, dinitial_state; the protocol is in ``api``."""
    dx, dweight, dinitial = _gradients(
        x, weight[None], segment_ids, initial_state, dy, dfinal_state, activation=activation
    )
    return dx, dweight[0], dinitial
