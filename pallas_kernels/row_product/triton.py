"""The product of few rows in triton.language: one launch, in which every weight is read once, in whole rows.

One row is multiplied without tensor cores, each program summing a few outputs over the whole depth: all loads of a
program are in flight at once, which is what the memory needs. Several rows go through the tensor cores. The norm's
scale multiplies the sums, so that a program sees x once; its weight multiplies x before.
"""

from __future__ import annotations

import dataclasses
from itertools import accumulate

import jax

from pallas_kernels.dispatch import UnsupportedCase
from pallas_kernels.row_product.api import Case
from pallas_kernels.tiles import ceil_div, power_of_2
from pallas_kernels.triton_call import check_installed, jit, tl, triton_call

MAX_PIECES = 6
MAX_ROWS = 256
PROCESSORS = 132  # of an H200; fewer or more only change which tile is best


@jit
def _piece(o, y, rows, columns, valid, START: tl.constexpr, END: tl.constexpr):
    """The part of y that lies in columns START to END goes to the piece o [B, END - START]."""
    inside = valid & (columns >= START) & (columns < END)
    tl.store(o + rows * (END - START) + columns - START, y.to(o.dtype.element_ty), mask=inside)


@jit
def _finish(
    y, gate, rows, columns, valid, bias, residual, o0, o1, o2, o3, o4, o5, F: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, GATED: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr,
    E3: tl.constexpr, E4: tl.constexpr, E5: tl.constexpr,
):  # fmt: skip
    """Bias, gate and residual of sums y and gate (the gate's, where gated), then the pieces."""
    if BIAS:
        y += tl.load(bias + (F if GATED else 0) + columns, mask=columns < F, other=0.0).to(tl.float32)
        if GATED:
            gate += tl.load(bias + columns, mask=columns < F, other=0.0).to(tl.float32)
    if GATED:
        y *= gate * tl.sigmoid(gate)
    if RESIDUAL:
        y += tl.load(residual + rows * F + columns, mask=valid, other=0.0).to(tl.float32)
    _piece(o0, y, rows, columns, valid, 0, E0)
    if E1 > E0:
        _piece(o1, y, rows, columns, valid, E0, E1)
    if E2 > E1:
        _piece(o2, y, rows, columns, valid, E1, E2)
    if E3 > E2:
        _piece(o3, y, rows, columns, valid, E2, E3)
    if E4 > E3:
        _piece(o4, y, rows, columns, valid, E3, E4)
    if E5 > E4:
        _piece(o5, y, rows, columns, valid, E4, E5)


@jit
def _one_row(
    x, weight, norm, bias, residual, eps, o0, o1, o2, o3, o4, o5,
    ROWS: tl.constexpr, D: tl.constexpr, F: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    NORM: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GATED: tl.constexpr, STAGES: tl.constexpr,
    E0: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr, E3: tl.constexpr, E4: tl.constexpr, E5: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    d = tl.arange(0, DEPTH)
    at = columns.to(tl.int64)[:, None] * D + d[None, :]
    acc = tl.zeros([COLUMNS, DEPTH], tl.float32)
    acc_gate = tl.zeros([COLUMNS, DEPTH], tl.float32)
    squares = tl.zeros([DEPTH], tl.float32)
    # F is the width of y: a gated weight has 2 F rows, the gate's first.
    for start in tl.static_range(0, D, DEPTH):
        inside = d < D - start
        valid = (columns < F)[:, None] & inside[None, :]
        w = tl.load(weight + (F * D if GATED else 0) + at + start, mask=valid, other=0.0).to(tl.float32)
        n = tl.load(x + start + d, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            squares += n * n
            n *= tl.load(norm + start + d, mask=inside, other=0.0).to(tl.float32)
        acc += w * n[None, :]
        if GATED:
            w = tl.load(weight + at + start, mask=valid, other=0.0).to(tl.float32)
            acc_gate += w * n[None, :]
    y = tl.sum(acc, 1)
    gate = tl.sum(acc_gate, 1)
    if NORM:
        scale = tl.rsqrt(tl.sum(squares, 0) / D + eps)
        y *= scale
        gate *= scale
    _finish(
        y, gate, 0, columns, columns < F, bias, residual, o0, o1, o2, o3, o4, o5, F, BIAS, RESIDUAL, GATED,
        E0, E1, E2, E3, E4, E5,
    )  # fmt: skip


@jit
def _some_rows(
    x, weight, norm, bias, residual, eps, o0, o1, o2, o3, o4, o5,
    ROWS: tl.constexpr, D: tl.constexpr, F: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    NORM: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GATED: tl.constexpr, STAGES: tl.constexpr,
    E0: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr, E3: tl.constexpr, E4: tl.constexpr, E5: tl.constexpr,
    B: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, DEPTH)
    at_w = columns.to(tl.int64)[:, None] * D + d[None, :]
    at_x = rows[:, None] * D + d[None, :]
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    acc_gate = tl.zeros([ROWS, COLUMNS], tl.float32)
    squares = tl.zeros([ROWS], tl.float32)
    for start in tl.range(0, D, DEPTH, num_stages=STAGES):
        inside = (d < D - start)[None, :]
        n = tl.load(x + at_x + start, mask=(rows < B)[:, None] & inside, other=0.0)
        w = tl.load(
            weight + (F * D if GATED else 0) + at_w + start, mask=(columns < F)[:, None] & inside, other=0.0
        )  # fmt: skip
        if NORM:
            n32 = n.to(tl.float32)
            squares += tl.sum(n32 * n32, 1)
            factor = tl.load(norm + start + d, mask=d < D - start, other=0.0).to(tl.float32)
            n = (n32 * factor[None, :]).to(n.dtype)
        acc = tl.dot(n, tl.trans(w), acc, input_precision="ieee")
        if GATED:
            w = tl.load(weight + at_w + start, mask=(columns < F)[:, None] & inside, other=0.0)
            acc_gate = tl.dot(n, tl.trans(w), acc_gate, input_precision="ieee")
    if NORM:
        scale = tl.rsqrt(squares / D + eps)[:, None]
        acc *= scale
        acc_gate *= scale
    _finish(
        acc, acc_gate, rows[:, None], columns[None, :], (rows < B)[:, None] & (columns < F)[None, :], bias, residual,
        o0, o1, o2, o3, o4, o5, F, BIAS, RESIDUAL, GATED, E0, E1, E2, E3, E4, E5,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Rows of x and outputs of one program, how much of the depth it takes at a time, warps, and pipeline stages."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def tiles_of(case: Case) -> Tiles:
    """What was fastest for the products of the paper's models on an H200.

    One row: each program has its whole part of the weight in flight. Several: the fewer programs, the fewer times x is
    read, as long as half of the processors have one.
    """
    width, depth = sum(case.widths), power_of_2(case.depth)
    if case.rows == 1:
        few = ceil_div(width, 8) < 2 * PROCESSORS and not case.gated
        columns = 4 if few and case.depth > 1024 else 8
        return Tiles(1, columns, min(depth, 512 if case.gated else 1024), 8 if few else 4, 1)
    rows, depth = min(64, power_of_2(case.rows, 16)), max(depth, 16)  # of a tensor core
    columns = 128
    while columns > 16 and ceil_div(width, columns) < PROCESSORS // 2 - 2:
        columns //= 2
    return Tiles(rows, columns, min(depth, 64 if columns > 16 else 128), 8 if columns > 64 else 4, 4)


def check(case: Case) -> None:
    if len(case.widths) > MAX_PIECES:
        raise UnsupportedCase(f"row_product: {len(case.widths)} pieces; implementation='triton' has {MAX_PIECES}")
    if case.rows > MAX_ROWS:
        raise UnsupportedCase(
            f"row_product: {case.rows} rows; implementation='triton' reads the weight anew for every 64 and is for at "
            f"most {MAX_ROWS}: use implementation='xla'"
        )
    check_installed("row_product")


def forward(x, weight, norm, bias, residual, *, eps: float, gated: bool, widths: tuple[int, ...], dtype):
    case = Case(x.shape[0], x.shape[1], widths, str(x.dtype), gated)
    return launch(tiles_of(case), x, weight, norm, bias, residual, eps, gated, widths, dtype)


def launch(tiles: Tiles, x, weight, norm, bias, residual, eps, gated, widths, dtype) -> tuple[jax.Array, ...]:
    """One call with chosen tiles."""
    B, D = x.shape
    ends = list(accumulate(widths))
    spare = MAX_PIECES - len(widths)
    outputs = [jax.ShapeDtypeStruct((B, width), dtype) for width in widths]
    outputs += [jax.ShapeDtypeStruct((1,), dtype)] * spare  # pointers that the kernel never uses
    ends += ends[-1:] * spare
    several = {} if B == 1 else {"B": B}
    results = triton_call(
        _some_rows if several else _one_row,
        x, weight, norm, bias, residual, float(eps),
        out_shape=tuple(outputs),
        grid=(ceil_div(ends[-1], tiles.columns), ceil_div(B, tiles.rows)),
        num_warps=tiles.warps, num_stages=tiles.stages,
        ROWS=tiles.rows, D=D, F=ends[-1], COLUMNS=tiles.columns, DEPTH=tiles.depth, STAGES=tiles.stages,
        NORM=norm is not None, BIAS=bias is not None, RESIDUAL=residual is not None, GATED=gated,
        **{f"E{index}": end for index, end in enumerate(ends)}, **several,
    )  # fmt: skip
    return results[: len(widths)]
