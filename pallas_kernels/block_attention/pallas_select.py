"""Block attention on Hopper (Pallas, Mosaic GPU): the compressed branch, and which blocks each token selects.

A program owns 64 tokens of a KV head and takes its query heads in turn, with all block means in shared memory. The
importances lie in registers: their sum over the heads is an addition in place, and there the best are found. Where all
logits of a head fit beside them, one product and one exponential give the softmax and the importances.
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

from pallas_kernels.block_attention.blocks import Layout
from pallas_kernels.block_attention.triton_tiles import slots
from pallas_kernels.tiles import ceil_div
from pallas_kernels.window_attention.pallas_plan import pad_rows
from pallas_kernels.window_attention.pallas_stream import BARRIERS, BY_ROW, LOG2_E, SWIZZLED, add_product

ROWS = 64  # tokens of a program
COLUMNS = (64, 128, 256)  # block means that a program can hold
ONCE = 128  # columns of which all logits of a head fit into the registers
CHUNK = 64  # columns at a time where there are more
STAGES = 3  # heads of queries in flight
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

    @property
    def chunk(self) -> int:
        return self.C if self.C <= ONCE else CHUNK

    @property
    def firsts(self) -> range:
        """The first column of each chunk."""
        return range(0, self.C, self.chunk)


def across(row, shape):
    return jax.lax.broadcast_in_dim(row, shape, [0])


def columns_from(shape, first: int):
    return plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA) + first


def fill(value, shape, layout=plgpu.Layout.WGMMA):
    return plgpu.layout_cast(jnp.full(shape, value, jnp.asarray(value).dtype), layout)


def product(shape, a, b):
    def multiply(acc):
        plgpu.wgmma(acc, a, b)
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def _count(flags):
    return sum(x.astype(jnp.int32).sum(axis=1) for x in flags)


def _chosen(bits, columns, end_bits, wanted):
    """Which columns of each row have its ``wanted`` largest bits; of equal ones, the smaller column.

    All in chunks. bits are not negative; -1 is no candidate. ``end_bits`` hold the number of columns. As
    ``triton_select.chosen`` does it, by counting, without a sort.
    """
    zero = fill(jnp.int32(0), (ROWS,), BY_ROW)
    spread = functools.partial(across, shape=bits[0].shape)

    def raise_bound(i, bound):
        trial = bound | (jnp.int32(2**30) >> i)
        wide = spread(trial)
        return jnp.where(_count(x >= wide for x in bits) >= wanted, trial, bound)

    bound = spread(jax.lax.fori_loop(0, 31, raise_bound, zero))
    left = wanted - _count(x > bound for x in bits)

    def raise_end(i, end):
        trial = end | (jnp.int32(2 ** (end_bits - 1)) >> i)
        wide = spread(trial)
        count = _count((x == bound) & (column < wide) for x, column in zip(bits, columns, strict=True))
        return jnp.where(count <= left, trial, end)

    end = spread(jax.lax.fori_loop(0, end_bits, raise_end, zero))
    return [(x > bound) | ((x == bound) & (column < end)) for x, column in zip(bits, columns, strict=True)]


def _select(size: _Size, importance, begin, current, store) -> None:
    """Gives ``store`` the m-th selected block of each row, ascending, -1 behind the last one."""
    shape = (ROWS, size.chunk)
    columns = [columns_from(shape, first) for first in size.firsts]
    own = across(current, shape)

    def order(value, number):
        forced = (number == 0) | (number >= own - 1)
        value = jnp.where(forced, float(size.G), jnp.minimum(value, float(size.G)))
        return jnp.where((number >= 0) & (number <= own), jax.lax.bitcast_convert_type(value, jnp.int32), -1)

    numbers = [column - across(begin, shape) for column in columns]
    bits = [order(*pair) for pair in zip(importance, numbers, strict=True)]
    # The token's own block may be incomplete, and so have no column; it is forced, with the largest number of those.
    outside = (begin + current >= size.C) & ((current < size.M) | (size.M >= 3)) & (current >= 0)
    take = _chosen(bits, columns, size.C.bit_length(), size.M - outside.astype(jnp.int32))

    def write(m, carry):
        left, own_left = carry
        first = functools.reduce(jnp.minimum, [x.min(axis=1) for x in left])
        found = first < NOTHING
        store(m, jnp.where(found, first, jnp.where(own_left > 0, current, -1)))
        left = tuple(jnp.where(x == across(first, shape), NOTHING, x) for x in left)
        return left, jnp.where(found, own_left, 0)

    left = tuple(jnp.where(x, number, NOTHING) for x, number in zip(take, numbers, strict=True))
    jax.lax.fori_loop(0, size.M, write, (left, outside.astype(jnp.int32)))


class _Head:
    """The compressed branch of 64 tokens for one query head, whose queries are in shared memory."""

    def __init__(self, size: _Size, q_smem, means, p_smem, places, bounds):
        self.size, self.q_smem, self.p_smem = size, q_smem, p_smem
        self.k_smem, self.v_smem = means
        # Behind a barrier, or masks would be worked out before the loop over heads and take its registers.
        self.begin, self.end = jax.lax.optimization_barrier(places)
        self.lowest, self.highest = bounds

    def logits(self, first: int):
        shape = (ROWS, self.size.chunk)
        chunk = pl.ds(first, self.size.chunk)
        x = product(shape, self.q_smem, self.k_smem.at[chunk].transpose((1, 0)))
        column = columns_from(shape, first)
        seen = column < across(self.end, shape)
        if self.size.packed:
            seen &= column >= across(self.begin, shape)
        return jnp.where(seen, x, -jnp.inf)

    def weighed(self, p, first: int, acc=None):
        """p in 16 bits times the values of a chunk, added to ``acc``."""
        low = p.astype(self.q_smem.dtype)
        values = self.v_smem.at[pl.ds(first, self.size.chunk)]
        acc = fill(jnp.float32(0), (ROWS, self.size.V)) if acc is None else acc
        return add_product(acc, low, values, self.p_smem)

    def at_once(self):
        """(output, logsumexp, weights): all logits in registers."""
        logits, scale = self.logits(0), self.size.scale
        # The maximum is finite, so a row that sees nothing gives exp2(-inf) = 0 and not NaN.
        m = jnp.maximum(logits.max(axis=1) * scale, -1e30)
        p = jnp.exp2(logits * scale - across(m, logits.shape))
        divisor, lse = _logsumexp(m, p.sum(axis=1))
        p *= across(1.0 / divisor, p.shape)
        return self.weighed(p, 0), lse, p

    def in_chunks(self):
        """(output, logsumexp): a chunk of logits at a time."""
        scale = self.size.scale

        def step(first, carry):
            acc, m, l = carry
            logits = self.logits(first)
            m_new = jnp.maximum(m, logits.max(axis=1) * scale)
            fade = jnp.exp2(m - m_new)
            p = jnp.exp2(logits * scale - across(m_new, logits.shape))
            acc = self.weighed(p, first, acc * across(fade, acc.shape))
            return acc, m_new, l * fade + p.sum(axis=1)

        row = (ROWS,)
        carry = (
            fill(jnp.float32(0), (ROWS, self.size.V)),
            fill(jnp.float32(-1e30), row, BY_ROW),
            fill(jnp.float32(0), row, BY_ROW),
        )
        for first in self.size.firsts:
            carry = self.where_seen(first, functools.partial(step, first), carry)
        acc, m, l = carry
        divisor, lse = _logsumexp(m, l)
        return acc * across(1.0 / divisor, acc.shape), lse

    def add_weights(self, lse, importance):
        """The importances of every chunk with this head's weights."""

        def add(first, total):
            return total + jnp.exp2(self.logits(first) * self.size.scale - across(lse, total.shape))

        return tuple(
            self.where_seen(first, functools.partial(add, first), total)
            for first, total in zip(self.size.firsts, importance, strict=True)
        )

    def where_seen(self, first: int, function, carry):
        """``function(carry)`` where a token of the tile sees a column of the chunk."""
        seen = (self.lowest < first + self.size.chunk) & (self.highest > first)
        return jax.lax.cond(seen, function, lambda x: x, carry)


def _logsumexp(m, l):
    """(divisor, logsumexp in base 2, 0 where nothing was seen)."""
    seen = l > 0
    divisor = jnp.where(seen, l, 1.0)
    return divisor, jnp.where(seen, m + jnp.log(divisor) * LOG2_E, 0.0)


def _kernel(size: _Size, refs: Any, scratch: Any) -> None:
    q_ref, k_ref, v_ref, begin_ref, end_ref, current_ref, bounds_ref, o_ref, lse_ref, indices_ref = refs
    q_smem, *means, o_smem, p_smem, q_full, means_full = scratch
    tile, h, b = (jax.lax.axis_index(name) for name in ("tiles", "heads", "batch"))
    tile = pl.num_programs(0) - 1 - tile  # the last tiles first: they see the most
    rows = pl.ds(pl.multiple_of(tile * ROWS, ROWS), ROWS)

    def fetch(g):
        slot = jax.lax.rem(g, jnp.int32(STAGES))
        plgpu.copy_gmem_to_smem(q_ref.at[b, rows, h * size.G + g], q_smem.at[slot], q_full.at[slot])

    for source, target in zip((k_ref, v_ref), means, strict=True):
        plgpu.copy_gmem_to_smem(source.at[b, :, h], target, means_full)
    for g in range(min(STAGES, size.G)):
        fetch(jnp.int32(g))
    begin, end, current = (
        plgpu.load(x.at[b, rows], layout=BY_ROW, optimized=False) for x in (begin_ref, end_ref, current_ref)
    )
    bounds = bounds_ref[b, tile, 0], bounds_ref[b, tile, 1]
    plgpu.barrier_wait(means_full)

    def attend(g, importance):
        slot = jax.lax.rem(g, jnp.int32(STAGES))
        plgpu.barrier_wait(q_full.at[slot])
        head = _Head(size, q_smem.at[slot], means, p_smem, (begin, end), bounds)
        if size.C <= ONCE:
            o, lse, weights = head.at_once()
            importance = (importance[0] + weights,)
        else:
            o, lse = head.in_chunks()
            importance = head.add_weights(lse, importance)
        pl.when(g + STAGES < size.G)(lambda: fetch(g + STAGES))
        lse_ref[b, rows, h * size.G + g] = lse
        buffer = o_smem.at[jax.lax.rem(g, jnp.int32(2))]
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # the output before the last one has left this buffer
        buffer[...] = o.astype(o_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(buffer, o_ref.at[b, rows, h * size.G + g])
        return importance

    nothing = tuple(fill(jnp.float32(0), (ROWS, size.chunk)) for _ in size.firsts)
    importance = jax.lax.fori_loop(0, size.G, attend, nothing)

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


def places_of(case: Any, layout: Layout, C: int, tokens: int) -> Places:
    # What depends on no data is worked out before the program runs, not by small kernels within it.
    known = not (case.segment_ids or case.cached)
    xp: Any = np if known else jnp
    position, base = layout.position, layout.base
    if known:
        position, base = np.tile(np.arange(case.T, dtype=np.int32), (case.B, 1)), np.zeros((case.B, case.T), np.int32)
    behind = ((0, 0), (0, tokens - case.T))
    begin = xp.pad(base, behind)
    end = xp.pad(xp.where(position >= 0, base + (position + 1) // case.block_size, 0), behind)
    current = xp.pad(xp.where(position >= 0, position // case.block_size, -1), behind, constant_values=-1)
    in_tiles = (case.B, tokens // ROWS, ROWS)
    lowest = xp.min(xp.where(end > begin, begin, C).reshape(in_tiles), axis=2)
    return Places(begin, end, current, xp.stack([lowest, xp.max(end.reshape(in_tiles), axis=2)], axis=-1))


def operands(
    case: Any, q: Array, pooled_k: Array, pooled_v: Array, layout: Layout, C: int, tokens: int
) -> tuple[Array, Array, Array, Places]:
    """(q, k, v, places) as the kernels take them: C block means, head sizes that are multiples of 64, whole tiles."""

    def widen(x: Array, rows: int) -> Array:
        size = _width(x.shape[3])
        return jnp.pad(x, ((0, 0), (0, rows - x.shape[1]), (0, 0), (0, size - x.shape[3])))

    places = places_of(case, layout, C, tokens)
    return pad_rows(widen(q, case.T)), widen(pooled_k, C), widen(pooled_v, C), places


def select(
    case: Any, q: Array, pooled_k: Array, pooled_v: Array, layout: Layout, interpreted: bool = False
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
            plgpu.SMEM((ROWS, size.chunk), q.dtype, transforms=SWIZZLED) if interpreted else None,
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
