"""Block attention on Hopper for more blocks than a program can hold: the compressed branch and the selection in parts.

The compressed branch is window attention over a list of keys: a block mean is seen by an interval of queries, from the
token that completes its block to the end of the document. Then a kernel sums the weights of a KV head's queries for 64
tokens and 128 blocks at a time, and one of Triton's picks the best from memory; slices of tokens bound what lies there.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32

from pallas_kernels.block_attention.api import Case
from pallas_kernels.block_attention.blocks import Layout
from pallas_kernels.block_attention.pallas_select import ROWS, Places, across, columns_from, fill, operands, product
from pallas_kernels.block_attention.triton_select import pick
from pallas_kernels.tiles import ceil_div
from pallas_kernels.window_attention.cases import LOG2_E
from pallas_kernels.window_attention.cases import Case as WindowCase
from pallas_kernels.window_attention.pallas_forward import TILES, call_forward
from pallas_kernels.window_attention.pallas_plan import EDGE, KeyList, QueryPlan
from pallas_kernels.window_attention.pallas_stream import BY_ROW, SWIZZLED

COLUMNS = 128  # block means of a program
STAGES = 3  # heads of queries in flight
SLICE_BYTES = 2**28  # of importances in memory at a time
FLOATS: Any = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))  # type: ignore[abstract]


def seen_from(case: Case, layout: Layout, C: int) -> tuple[Int32[Array, "B C"], Int32[Array, "B C"]]:
    """The queries that see each block of the table: from the first index on, below the second."""
    S, position = case.block_size, layout.position
    if not (case.segment_ids or case.cached):
        completes = np.tile((np.arange(C, dtype=np.int32) + 1) * S - 1, (case.B, 1))
        return jnp.asarray(completes), jnp.asarray(np.where(completes < case.T, case.T, 0), jnp.int32)
    index = jnp.arange(case.T, dtype=jnp.int32)
    following = jnp.pad(position[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    last = (position >= 0) & (following != position + 1)
    document_end = jax.lax.cummin(jnp.where(last, index + 1, case.T), axis=1, reverse=True)
    document_end = jnp.where(position >= 0, document_end, 0)  # a block under way ends in no token of the call
    if not case.cached:
        first = layout.first_token + (S - 1)
    else:  # one document; its blocks may have been complete before
        left = jnp.argmax(position >= 0, axis=1).astype(jnp.int32)[:, None]
        before = jnp.take_along_axis(position, left, axis=1)
        ends = (jnp.arange(C, dtype=jnp.int32) + 1) * S - 1
        first = jnp.where(before >= 0, jnp.maximum(left, left + ends - before), case.T)
    end = jnp.take_along_axis(document_end, jnp.minimum(first, case.T - 1), axis=1)
    return first, jnp.where(first < case.T, end, 0)


def _plan(case: Case, places: Places, keys: int, warpgroups: int) -> Int32[Array, "B K tiles fields"]:
    """Which part of the list each tile of queries meets (the fields of ``pallas_plan.QueryPlan``)."""
    xp: Any = np if isinstance(places.end, np.ndarray) else jnp
    tiles = ceil_div(case.T, warpgroups * ROWS)
    none = xp.zeros((case.B, tiles), np.int32)

    def units(x: Any, outside: int) -> Array:  # [B, tiles, warpgroups, ROWS]
        x = x[:, : case.T]
        x = xp.pad(x, ((0, 0), (0, tiles * warpgroups * ROWS - case.T)), constant_values=outside)
        return x.reshape(case.B, tiles, warpgroups, ROWS)

    far = 2**30
    sees = units(places.end, 0) > units(places.begin, 0)
    lowest = xp.min(xp.where(sees, units(places.begin, 0), far), axis=(2, 3)) // 8 * 8
    highest = xp.max(units(places.end, 0), axis=(2, 3))
    first = xp.where(highest > lowest, lowest, 0)
    steps = xp.where(highest > lowest, -(-(highest - first) // keys), 0)
    all_begin = xp.max(units(places.begin, 0), axis=3) <= first[:, :, None]
    whole = xp.where(all_begin, xp.min(units(places.end, far), axis=3), 0)
    fields = xp.stack([none, steps, first, none, none, none], axis=-1)
    rows = xp.concatenate([fields, xp.zeros_like(whole), whole], axis=-1)
    rows = xp.broadcast_to(rows[:, None], (case.B, case.K, *rows.shape[1:]))
    return jnp.asarray(rows, jnp.int32)


def attend(
    case: Case, q: Array, k: Array, v: Array, layout: Layout, places: Places, interpreted: bool
) -> tuple[Array, Float32[Array, "B H T"]]:
    """The compressed branch and its logsumexp in base 2; C of k and v is a multiple of 128, q has whole 8 tokens."""
    B, C = k.shape[:2]
    window_case = WindowCase(
        *(B, case.T, case.T, case.H, case.K, q.shape[3], v.shape[3], 0, case.dtype),
        window=None, scale=case.scale, scores=False, expiry=True, segment_ids=False, return_lse=True,
    )  # fmt: skip
    tiles = TILES[q.shape[3]]
    low, high = (
        jnp.pad(jnp.broadcast_to(x[:, None], (B, case.K, x.shape[1])), ((0, 0), (0, 0), (0, C + EDGE - x.shape[1])))
        for x in seen_from(case, layout, C)
    )
    keys = KeyList(k.swapaxes(1, 2), v.swapaxes(1, 2), low, high)
    plan = QueryPlan(_plan(case, places, tiles.keys, tiles.warpgroups), None)
    o, lse = call_forward(window_case, tiles, q, k, v, keys, plan, interpreted)
    return o, jnp.where(lse > -jnp.inf, lse * LOG2_E, 0.0)


@dataclasses.dataclass(frozen=True)
class _Size:
    """Heads to a KV head, the logits' scale in base 2."""

    G: int
    scale: float


def _weights_kernel(size: _Size, refs: Any, scratch: Any) -> None:
    q_ref, k_ref, lse_ref, begin_ref, end_ref, bounds_ref, offset_ref, out_ref = refs
    q_smem, k_smem, lse_smem, out_smem, q_full, rest_full = scratch
    chunk, h, b = (jax.lax.axis_index(name) for name in ("chunks", "heads", "batch"))
    tile = pl.num_programs(1) - 1 - jax.lax.axis_index("tiles")
    here = pl.multiple_of(tile * ROWS, ROWS)
    first = pl.multiple_of(offset_ref[0] + here, ROWS)
    rows = pl.ds(first, ROWS)
    column = pl.multiple_of(chunk * COLUMNS, COLUMNS)
    shape = (ROWS, COLUMNS)
    tile_of_all = jax.lax.div(first, jnp.int32(ROWS))
    lowest, highest = bounds_ref[b, tile_of_all, 0], bounds_ref[b, tile_of_all, 1]

    @pl.when((column < highest) & (column + COLUMNS > lowest))
    def _():
        plgpu.copy_gmem_to_smem(k_ref.at[b, pl.ds(column, COLUMNS), h], k_smem, rest_full)
        plgpu.copy_gmem_to_smem(lse_ref.at[b, pl.ds(h * size.G, size.G), rows], lse_smem, rest_full)

        def fetch(g):
            slot = jax.lax.rem(g, jnp.int32(STAGES))
            plgpu.copy_gmem_to_smem(q_ref.at[b, rows, h * size.G + g], q_smem.at[slot], q_full.at[slot])

        for g in range(min(STAGES, size.G)):
            fetch(jnp.int32(g))
        places = tuple(plgpu.load(x.at[b, rows], layout=BY_ROW, optimized=False) for x in (begin_ref, end_ref))
        plgpu.barrier_wait(rest_full)

        def add(g, importance):
            slot = jax.lax.rem(g, jnp.int32(STAGES))
            plgpu.barrier_wait(q_full.at[slot])
            logits = product(shape, q_smem.at[slot], k_smem.transpose((1, 0)))
            pl.when(g + STAGES < size.G)(lambda: fetch(g + STAGES))
            lse = plgpu.load(lse_smem.at[g], layout=BY_ROW)
            return importance + jnp.exp2(logits * size.scale - across(lse, shape))

        importance = jax.lax.fori_loop(0, size.G, add, fill(jnp.float32(0), shape))
        begin, end = places
        columns = columns_from(shape, column)
        # What a token does not see may be anything here, infinite too.
        seen = (columns >= across(begin, shape)) & (columns < across(end, shape))
        out_smem[...] = jnp.where(seen, jnp.minimum(importance, float(size.G)), 0.0)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem, out_ref.at[b, h, pl.ds(here, ROWS), pl.ds(column, COLUMNS)])
        plgpu.wait_smem_to_gmem(0)


def importances(
    case: Case,
    q: Array,
    k: Array,
    lse: Array,
    places: Places,
    offset: Int32[Array, "1"],
    tokens: int,
    interpreted: bool,
) -> Float32[Array, "B K tokens C"]:
    """The weight of each block for ``tokens`` tokens (whole tiles) from ``offset`` on; unwritten where none sees it."""
    (B, _, H, N), (C, K) = q.shape, k.shape[1:3]
    size = _Size(H // K, case.scale * LOG2_E)

    def entry(*refs):
        pl.run_scoped(
            lambda *scratch: _weights_kernel(size, refs, scratch),
            plgpu.SMEM((STAGES, ROWS, N), q.dtype, transforms=SWIZZLED),
            plgpu.SMEM((COLUMNS, N), q.dtype, transforms=SWIZZLED),
            plgpu.SMEM((size.G, ROWS), jnp.float32),
            plgpu.SMEM((ROWS, COLUMNS), jnp.float32, transforms=FLOATS),
            plgpu.Barrier(num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=2),
        )

    return plgpu.kernel(
        entry,
        out_type=jax.ShapeDtypeStruct((B, K, tokens, C), jnp.float32),
        grid=(C // COLUMNS, tokens // ROWS, K, B),
        grid_names=("chunks", "tiles", "heads", "batch"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpreted else None,
    )(q, k, lse, places.begin, places.end, places.bounds, offset)


def select(
    case: Case, q: Array, pooled_k: Array, pooled_v: Array, layout: Layout, interpreted: bool = False
) -> tuple[Array, Float32[Array, "B T H"], Int32[Array, "B T K M"]]:
    """As ``triton_select.select``."""
    B, T, K = case.B, case.T, case.K
    C = ceil_div(pooled_k.shape[1], COLUMNS) * COLUMNS
    tokens = min(ceil_div(T, ROWS), max(1, SLICE_BYTES // (4 * B * K * C * ROWS))) * ROWS
    slices = ceil_div(T, tokens)
    q, k, v, places = operands(case, q, pooled_k, pooled_v, layout, C, slices * tokens)
    o, lse = attend(case, q, k, v, layout, places, interpreted)
    lse = jnp.pad(lse, ((0, 0), (0, 0), (0, max(0, slices * tokens - lse.shape[2]))))

    def part(_: None, offset: Array) -> tuple[None, Array]:
        weights = importances(case, q, k, lse, places, offset, tokens, interpreted)
        return None, pick(case, weights, layout, offset)

    offsets = jnp.arange(slices, dtype=jnp.int32)[:, None] * tokens
    # In turn, so that the importances of one slice alone are in memory.
    indices = jax.lax.scan(part, None, offsets)[1] if slices > 1 else part(None, offsets[0])[1][None]
    indices = indices.transpose(1, 0, 2, 3, 4).reshape(B, slices * tokens, *indices.shape[3:])
    return o[:, :T, :, : case.V], lse[:, :, :T].swapaxes(1, 2), indices[:, :T]
