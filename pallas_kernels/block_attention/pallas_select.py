"""Block attention on Hopper (Pallas, Mosaic GPU): the compressed branch, and which blocks each token selects.

A program owns 64 tokens of a KV head and takes its query heads in turn. All block means lie in shared memory and all
logits of a head in registers, so one product and one exponential give the softmax and the importances, whose sum over
the heads is an addition in place; and in the same registers the best are found. For more blocks: ``pallas_long``.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32

from pallas_kernels.block_attention.api import Case
from pallas_kernels.block_attention.blocks import Layout
from pallas_kernels.block_attention.triton_tiles import slots
from pallas_kernels.tiles import ceil_div
from pallas_kernels.window_attention.cases import LOG2_E
from pallas_kernels.window_attention.pallas_plan import pad_rows
from pallas_kernels.window_attention.pallas_stream import BARRIERS, BY_ROW, SWIZZLED, fold

ROWS = 64  # tokens of a program
COLUMNS = (64, 128)  # block means that a program can hold
STAGES = 2  # heads of queries in flight
NOTHING = 2**30


@dataclasses.dataclass(frozen=True)
class _Size:
    """What a kernel is compiled for: heads to a KV head, columns, blocks to select, the logits' scale in base 2, and
    whether documents begin behind the first column."""

    G: int
    V: int
    C: int
    M: int
    scale: float
    packed: bool
    interpreted: bool


def across(row, shape):
    return jax.lax.broadcast_in_dim(row, shape, [0])


def columns_from(shape, first):
    return plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA) + first


def fill(value, shape, layout=plgpu.Layout.WGMMA):
    return plgpu.layout_cast(jnp.full(shape, value, jnp.asarray(value).dtype), layout)


def product(shape, a, b):
    def multiply(acc):
        plgpu.wgmma(acc, a, b)
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def _count(flags):
    return fold(jnp.add, flags.astype(jnp.int32)).sum(axis=1)


def _chosen(bits, column, wanted):
    """Which columns of each row have its ``wanted`` largest bits; of equal ones, the smaller column.

    bits are not negative; -1 is no candidate. As ``triton_select.chosen`` does it, by counting, without a sort.
    """
    spread = functools.partial(across, shape=bits.shape)
    zero = fill(jnp.int32(0), (ROWS,), BY_ROW)

    def raise_bound(i, bound):
        trial = bound | (jnp.int32(2**30) >> i)
        return jnp.where(_count(bits >= spread(trial)) >= wanted, trial, bound)

    bound = spread(jax.lax.fori_loop(0, 31, raise_bound, zero))
    left = wanted - _count(bits > bound)
    end_bits = bits.shape[1].bit_length()

    def raise_end(i, end):
        trial = end | (jnp.int32(2 ** (end_bits - 1)) >> i)
        return jnp.where(_count((bits == bound) & (column < spread(trial))) <= left, trial, end)

    end = spread(jax.lax.fori_loop(0, end_bits, raise_end, zero))
    return (bits > bound) | ((bits == bound) & (column < end))


def _select(size: _Size, importance, begin, current, store) -> None:
    """Gives ``store`` the m-th selected block of each row, ascending, -1 behind the last one."""
    shape = importance.shape
    column = columns_from(shape, 0)
    number, own = column - across(begin, shape), across(current, shape)
    forced = (number == 0) | (number >= own - 1)
    value = jnp.where(forced, float(size.G), jnp.minimum(importance, float(size.G)))
    bits = jnp.where((number >= 0) & (number <= own), jax.lax.bitcast_convert_type(value, jnp.int32), -1)
    # The token's own block may be incomplete, and so have no column; it is forced, with the largest number of those.
    outside = (begin + current >= size.C) & ((current < size.M) | (size.M >= 3)) & (current >= 0)
    take = _chosen(bits, column, size.M - outside.astype(jnp.int32))

    def write(m, carry):
        left, own_left = carry
        first = fold(jnp.minimum, left).min(axis=1)
        found = first < NOTHING
        store(m, jnp.where(found, first, jnp.where(own_left > 0, current, -1)))
        return jnp.where(left == across(first, shape), NOTHING, left), jnp.where(found, own_left, 0)

    jax.lax.fori_loop(0, size.M, write, (jnp.where(take, number, NOTHING), outside.astype(jnp.int32)))


def _softmax(size: _Size, logits, begin, end):
    """(weights, logsumexp in base 2): of the columns that a row sees; 0 where it sees none."""
    column = columns_from(logits.shape, 0)
    seen = column < across(end, logits.shape)
    if size.packed:
        seen &= column >= across(begin, logits.shape)
    logits = jnp.where(seen, logits, -jnp.inf)
    # The maximum is finite, so a row that sees nothing gives exp2(-inf) = 0 and not NaN.
    m = jnp.maximum(fold(jnp.maximum, logits).max(axis=1) * size.scale, -1e30)
    p = jnp.exp2(logits * size.scale - across(m, logits.shape))
    l = fold(jnp.add, p).sum(axis=1)
    divisor = jnp.where(l > 0, l, 1.0)
    return p * across(1.0 / divisor, p.shape), jnp.where(l > 0, m + jnp.log(divisor) * LOG2_E, 0.0)


def _kernel(size: _Size, refs: Any, scratch: Any) -> None:
    q_ref, k_ref, v_ref, begin_ref, end_ref, current_ref, o_ref, lse_ref, indices_ref = refs
    q_smem, k_smem, v_smem, o_smem, p_smem, q_full, means_full = scratch
    tile, h, b = (jax.lax.axis_index(name) for name in ("tiles", "heads", "batch"))
    rows = pl.ds(pl.multiple_of(tile * ROWS, ROWS), ROWS)

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
    plgpu.barrier_wait(means_full)

    def attend(g, importance):
        slot = jax.lax.rem(g, jnp.int32(STAGES))
        plgpu.barrier_wait(q_full.at[slot])
        logits = product((ROWS, size.C), q_smem.at[slot], k_smem.transpose((1, 0)))
        pl.when(g + STAGES < size.G)(lambda: fetch(g + STAGES))
        # Behind a barrier, or the mask would be worked out before the loop and take its registers.
        p, lse = _softmax(size, logits, *jax.lax.optimization_barrier((begin, end)))
        lse_ref[b, rows, h * size.G + g] = lse
        low = p.astype(q_smem.dtype)
        if size.interpreted:  # the interpreter multiplies from shared memory alone
            p_smem[...] = low
            plgpu.commit_smem()
            low = p_smem
        o = product((ROWS, size.V), low, v_smem)
        buffer = o_smem.at[jax.lax.rem(g, jnp.int32(2))]
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # the output before the last one has left this buffer
        buffer[...] = o.astype(o_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(buffer, o_ref.at[b, rows, h * size.G + g])
        return importance + p

    importance = jax.lax.fori_loop(0, size.G, attend, fill(jnp.float32(0), (ROWS, size.C)))

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


class Places(NamedTuple):
    """What each token sees of the table of blocks: entries from begin on, below end, and its own block's number.

    Padded to whole tiles with tokens that see nothing. ``bounds``: the lowest begin and the highest end in a tile.
    """

    begin: Int32[Array, "B T"]
    end: Int32[Array, "B T"]
    current: Int32[Array, "B T"]
    bounds: Int32[Array, "B tiles 2"]


def places_of(case: Case, layout: Layout, C: int, tokens: int) -> Places:
    # What depends on no data is worked out before the program runs, not by small kernels within it.
    known = not (case.segment_ids or case.cached)
    xp: Any = np if known else jnp
    base: Any = np.zeros((case.B, case.T), np.int32) if known else layout.base
    position: Any = base + np.arange(case.T, dtype=np.int32) if known else layout.position
    behind = ((0, 0), (0, tokens - case.T))
    begin = xp.pad(base, behind)
    end = xp.pad(xp.where(position >= 0, base + (position + 1) // case.block_size, 0), behind)
    current = xp.pad(xp.where(position >= 0, position // case.block_size, -1), behind, constant_values=-1)
    in_tiles = (case.B, tokens // ROWS, ROWS)
    lowest = xp.min(xp.where(end > begin, begin, C).reshape(in_tiles), axis=2)
    return Places(begin, end, current, xp.stack([lowest, xp.max(end.reshape(in_tiles), axis=2)], axis=-1))


def operands(
    case: Case, q: Array, pooled_k: Array, pooled_v: Array, layout: Layout, C: int, tokens: int
) -> tuple[Array, Array, Array, Places]:
    """(q, k, v, places) as the kernels take them: C block means, head sizes that are multiples of 64, whole tiles."""

    def widen(x: Array, rows: int) -> Array:
        size = _width(x.shape[3])
        return jnp.pad(x, ((0, 0), (0, rows - x.shape[1]), (0, 0), (0, size - x.shape[3])))

    places = places_of(case, layout, C, tokens)
    return pad_rows(widen(q, case.T)), widen(pooled_k, C), widen(pooled_v, C), places


def select(
    case: Case, q: Array, pooled_k: Array, pooled_v: Array, layout: Layout, interpreted: bool = False
) -> tuple[Array, Float32[Array, "B T H"], Int32[Array, "B T K M"]]:
    """As ``triton_select.select``."""
    B, T, H, K = case.B, case.T, case.H, case.K
    C, M, tiles = columns_of(pooled_k.shape[1]), slots(case), ceil_div(T, ROWS)
    q, k, v, places = operands(case, q, pooled_k, pooled_v, layout, C, tiles * ROWS)
    N, V = q.shape[3], v.shape[3]
    size = _Size(H // K, V, C, M, case.scale * LOG2_E, case.segment_ids, interpreted)

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
    )(q, k, v, *places[:3])
    return o[:, :T, :, : case.V], lse[:, :T], indices[:, :T]
