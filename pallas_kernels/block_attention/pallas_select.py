"""Block attention on Hopper (Pallas, Mosaic GPU): the compressed branch, and which blocks each token selects.

A program owns 64 tokens of a KV head and takes its query heads in turn. All block means lie in shared memory and all
logits of a head in registers, so one product and one exponential give the softmax and the importances, whose sum over
the heads is an addition in place; and in the same registers the best are found.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from pallas_kernels.block_attention.blocks import Layout
from pallas_kernels.block_attention.triton_tiles import slots
from pallas_kernels.tiles import ceil_div
from pallas_kernels.window_attention.pallas_plan import pad_rows
from pallas_kernels.window_attention.pallas_stream import BARRIERS, BY_ROW, LOG2_E, SWIZZLED

ROWS = 64  # tokens of a program
COLUMNS = (64, 128)  # block means that a program can hold
NUMBER_BITS = 8  # of a column
STAGES = 3  # heads of queries in flight
NOTHING = 2**30


@dataclasses.dataclass(frozen=True)
class _Size:
    """What a kernel is compiled for: heads to a KV head, columns, blocks to select, the logits' scale in base 2."""

    G: int
    V: int
    C: int
    M: int
    scale: float
    interpreted: bool


def _across(row, shape):
    return jax.lax.broadcast_in_dim(row, shape, [0])


def _count(flags):
    return flags.astype(jnp.int32).sum(axis=1)


def _product(shape, a, b):
    def multiply(acc):
        plgpu.wgmma(acc, a, b)
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def _chosen(bits, column, wanted):
    """Which columns of each row have its ``wanted`` largest bits; of equal ones, the smaller column.

    bits are not negative; -1 is no candidate. As ``triton_select.chosen`` does it, by counting, without a sort.
    """
    zero = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.int32), BY_ROW)
    across = functools.partial(_across, shape=bits.shape)

    def raise_bound(i, bound):
        trial = bound | (jnp.int32(2**30) >> i)
        return jnp.where(_count(bits >= across(trial)) >= wanted, trial, bound)

    bound = across(jax.lax.fori_loop(0, 31, raise_bound, zero))
    left = wanted - _count(bits > bound)

    def raise_end(i, end):
        trial = end | (jnp.int32(2 ** (NUMBER_BITS - 1)) >> i)
        return jnp.where(_count((bits == bound) & (column < across(trial))) <= left, trial, end)

    end = across(jax.lax.fori_loop(0, NUMBER_BITS, raise_end, zero))
    return (bits > bound) | ((bits == bound) & (column < end))


def _select(size: _Size, importance, begin, current, store) -> None:
    """Gives ``store`` the m-th selected block of each row, ascending, -1 behind the last one."""
    shape = (ROWS, size.C)
    column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
    number, own = column - _across(begin, shape), _across(current, shape)
    forced = (number == 0) | (number >= own - 1)
    value = jnp.where(forced, float(size.G), jnp.minimum(importance, float(size.G)))
    bits = jnp.where((number >= 0) & (number <= own), jax.lax.bitcast_convert_type(value, jnp.int32), -1)
    # The token's own block may be incomplete, and so have no column; it is forced, with the largest number of those.
    outside = (begin + current >= size.C) & ((current < size.M) | (size.M >= 3)) & (current >= 0)
    take = _chosen(bits, column, size.M - outside.astype(jnp.int32))

    def write(m, carry):
        left, own_left = carry
        first = left.min(axis=1)
        found = first < NOTHING
        store(m, jnp.where(found, first, jnp.where(own_left > 0, current, -1)))
        return jnp.where(left == _across(first, shape), NOTHING, left), jnp.where(found, own_left, 0)

    jax.lax.fori_loop(0, size.M, write, (jnp.where(take, number, NOTHING), outside.astype(jnp.int32)))


def _kernel(size: _Size, refs: Any, scratch: Any) -> None:
    q_ref, k_ref, v_ref, begin_ref, end_ref, current_ref, o_ref, lse_ref, indices_ref = refs
    q_smem, k_smem, v_smem, o_smem, p_smem, q_full, means_full = scratch
    h, b = jax.lax.axis_index("heads"), jax.lax.axis_index("batch")
    rows = pl.ds(pl.multiple_of(jax.lax.axis_index("tiles") * ROWS, ROWS), ROWS)
    shape = (ROWS, size.C)

    def fetch(g):
        slot = jax.lax.rem(g, jnp.int32(STAGES))
        plgpu.copy_gmem_to_smem(q_ref.at[b, rows, h * size.G + g], q_smem.at[slot], q_full.at[slot])

    plgpu.copy_gmem_to_smem(k_ref.at[b, :, h], k_smem, means_full)
    plgpu.copy_gmem_to_smem(v_ref.at[b, :, h], v_smem, means_full)
    for g in range(min(STAGES, size.G)):
        fetch(jnp.int32(g))
    begin, end, current = (
        plgpu.load(x.at[b, rows], layout=BY_ROW, optimized=False) for x in (begin_ref, end_ref, current_ref)
    )
    column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
    seen = (column >= _across(begin, shape)) & (column < _across(end, shape))
    plgpu.barrier_wait(means_full)

    def attend(g, importance):
        slot = jax.lax.rem(g, jnp.int32(STAGES))
        plgpu.barrier_wait(q_full.at[slot])
        logits = jnp.where(seen, _product(shape, q_smem.at[slot], k_smem.transpose((1, 0))), -jnp.inf)
        pl.when(g + STAGES < size.G)(lambda: fetch(g + STAGES))
        # The maximum is finite, so a row that sees nothing gives exp2(-inf) = 0 and not NaN.
        m = jnp.maximum(logits.max(axis=1) * size.scale, -1e30)
        p = jnp.exp2(logits * size.scale - _across(m, shape))
        l = p.sum(axis=1)
        whole = jnp.where(l > 0, l, 1.0)
        p *= _across(1.0 / whole, shape)
        lse_ref[b, rows, h * size.G + g] = jnp.where(l > 0, m + jnp.log(whole) * LOG2_E, 0.0)
        low = p.astype(q_smem.dtype)
        if size.interpreted:  # the interpreter multiplies from shared memory alone
            p_smem[...] = low
            plgpu.commit_smem()
            low = p_smem
        o = _product((ROWS, size.V), low, v_smem)
        buffer = o_smem.at[jax.lax.rem(g, jnp.int32(2))]
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # the output before the last one has left this buffer
        buffer[...] = o.astype(o_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(buffer, o_ref.at[b, rows, h * size.G + g])
        return importance + p

    importance = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)
    importance = jax.lax.fori_loop(0, size.G, attend, importance)

    def store(m, value):
        indices_ref[b, rows, h, m] = value

    _select(size, importance, begin, current, store)
    plgpu.wait_smem_to_gmem(0)


def columns_of(C: int) -> int:
    """How many columns hold a table of C blocks; 0 where none does."""
    return min((columns for columns in COLUMNS if columns >= C), default=0)


def _width(size: int) -> int:
    return ceil_div(size, 64) * 64


def shared_memory(N: int, V: int, C: int) -> dict[str, int]:
    """Bytes of shared memory that the kernel's buffers take, of 16-bit numbers."""
    N, V = _width(N), _width(V)
    return {
        "queries": STAGES * ROWS * N * 2,
        "block means": C * (N + V) * 2,
        "outputs": 2 * ROWS * V * 2,
        "barriers": BARRIERS,
    }


def select(
    case: Any, q: Array, pooled_k: Array, pooled_v: Array, layout: Layout, interpreted: bool = False
) -> tuple[Array, Float32[Array, "B T H"], Int32[Array, "B T K M"]]:
    """As ``triton_select.select``."""
    B, T, H, K, S = case.B, case.T, case.H, case.K, case.block_size
    N, V = _width(case.N), _width(case.V)
    C, M, tiles = columns_of(pooled_k.shape[1]), slots(case), ceil_div(T, ROWS)

    def widen(x: Array, rows: int, size: int) -> Array:
        return jnp.pad(x, ((0, 0), (0, rows - x.shape[1]), (0, 0), (0, size - x.shape[3])))

    k, v = widen(pooled_k, C, N), widen(pooled_v, C, V)
    q = pad_rows(widen(q, T, N))
    valid = layout.position >= 0
    current = jnp.where(valid, layout.position // S, -1)
    end = jnp.where(valid, layout.base + (layout.position + 1) // S, 0)
    behind = ((0, 0), (0, tiles * ROWS - T))
    places = (jnp.pad(x, behind, constant_values=n) for x, n in ((layout.base, 0), (end, 0), (current, -1)))
    size = _Size(H // K, V, C, M, case.scale * LOG2_E, interpreted)

    def entry(*refs):
        pl.run_scoped(
            lambda *scratch: _kernel(size, refs, scratch),
            plgpu.SMEM((STAGES, ROWS, N), q.dtype, transforms=SWIZZLED),
            plgpu.SMEM((C, N), q.dtype, transforms=SWIZZLED),
            plgpu.SMEM((C, V), q.dtype, transforms=SWIZZLED),
            plgpu.SMEM((2, ROWS, V), q.dtype, transforms=SWIZZLED),
            plgpu.SMEM((ROWS, C), q.dtype, transforms=SWIZZLED) if interpreted else None,
            plgpu.Barrier(num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=2),
        )

    o, lse, indices = plgpu.kernel(
        entry,
        out_type=(
            jax.ShapeDtypeStruct((B, q.shape[1], H, V), q.dtype),
            jax.ShapeDtypeStruct((B, tiles * ROWS, H), jnp.float32),
            jax.ShapeDtypeStruct((B, tiles * ROWS, K, M), jnp.int32),
        ),
        grid=(tiles, K, B),
        grid_names=("tiles", "heads", "batch"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpreted else None,
    )(q, k, v, *places)
    return o[:, :T, :, : case.V], lse[:, :T], indices[:, :T]
