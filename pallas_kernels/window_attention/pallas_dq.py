"""The gradient of the queries on Hopper (Pallas, Mosaic GPU): the stream of the forward pass once more.

p_tj = exp(scale q_t . k_j - lse_t),   ds_tj = p_tj (do_t . v_j - delta_t),   dq_t = scale sum_j ds_tj k_j
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.window_attention.api import Case
from pallas_kernels.window_attention.pallas_plan import ROWS, KeyList, QueryPlan
from pallas_kernels.window_attention.pallas_stream import (
    BARRIERS,
    BY_ROW,
    LOG2_E,
    SWIZZLED,
    Items,
    Masks,
    Steps,
    Tiles,
    add_product,
    copy_keys,
    flatten,
    persistent,
    program_count,
    skip_steps,
    take_registers,
)

TILES = {64: Tiles(3, 64, 6), 128: Tiles(2, 64, 3), 256: Tiles(1, 64, 2)}


def shared_memory(case: Case, tiles: Tiles) -> dict[str, int]:
    """Bytes of shared memory that the kernel's buffers take."""
    width = 2 * (case.N + case.V)
    return {
        "queries and do": tiles.warpgroups * ROWS * width,
        "keys and values": tiles.stages * tiles.keys * width,
        "barriers": BARRIERS,
    }


def two_products(shape: tuple[int, int], a, b, c, d):
    """(a b, c d), of operands in shared memory."""

    def products(first, second):
        plgpu.wgmma(first, a, b)
        plgpu.wgmma(second, c, d)
        return first[...], second[...]

    return pl.run_scoped(products, plgpu.ACC(shape, jnp.float32), plgpu.ACC(shape, jnp.float32))


class _Gradient:
    """What a compute warpgroup does: the gradient of 64 queries over the steps of their tile, tile after tile."""

    def __init__(self, case: Case, tiles: Tiles, items: Items, warpgroup: Any, refs: Any, scratch: Any):
        self.case, self.tiles, self.items, self.warpgroup = case, tiles, items, warpgroup
        self.q_ref, _, _, self.do_ref, self.lse2_ref, self.delta_ref, self.key_list, self.plan, self.dq_ref = refs
        (q_smems, do_smems, self.k_smem, self.v_smem, ds_smems), (q_full, *full), used = scratch
        self.full, self.used = tuple(full), used
        self.q_smem, self.do_smem, self.q_full = (x.at[warpgroup] for x in (q_smems, do_smems, q_full))
        self.ds_smem = None if ds_smems is None else ds_smems.at[warpgroup]

    def first_query(self, tile):
        return pl.multiple_of(tile * (self.tiles.warpgroups * ROWS) + self.warpgroup * ROWS, ROWS)

    def fetch_queries(self, n):
        @pl.when(n < self.items.rounds)
        def _():
            b, head, _, tile = self.items.place(n)
            at = (b, pl.ds(self.first_query(tile), ROWS), head)
            plgpu.copy_gmem_to_smem(self.q_ref.at[at], self.q_smem, self.q_full)
            plgpu.copy_gmem_to_smem(self.do_ref.at[at], self.do_smem, self.q_full)

    def run(self):
        self.fetch_queries(jnp.int32(0))
        jax.lax.fori_loop(0, self.items.rounds, self.differentiate, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    def differentiate(self, n, done):
        """Item n, before which ``done`` steps went by."""
        place = self.items.place(n)
        b, head, _, tile = place
        steps = Steps(self.items.row(n, self.warpgroup), self.tiles.keys)
        masks = Masks(self.case, steps, place, self.first_query(tile), self.plan.begin, self.key_list)
        here = (b, head, pl.ds(masks.t, ROWS))
        rows = tuple(plgpu.load(x.at[here], layout=BY_ROW, optimized=False) for x in (self.lse2_ref, self.delta_ref))
        plgpu.barrier_wait(self.q_full)
        dq = plgpu.layout_cast(jnp.zeros((ROWS, self.case.N), jnp.float32), plgpu.Layout.WGMMA)
        if self.key_list is not None:
            step = functools.partial(self.step, done, rows, masks.listed)
            dq = jax.lax.fori_loop(0, steps.listed, step, dq)
        first, end = masks.window_steps()
        skip_steps(self.tiles.stages, self.full, self.used, done + steps.listed, done + first)
        dq = jax.lax.fori_loop(first, end, functools.partial(self.step, done, rows, masks.window), dq)
        skip_steps(self.tiles.stages, self.full, self.used, done + end, done + steps.end)
        self.q_smem[...] = (dq * self.case.scale).astype(self.q_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(self.q_smem, self.dq_ref.at[b, pl.ds(masks.t, ROWS), head])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        self.fetch_queries(n + 1)
        return done + steps.end

    def step(self, done, rows, mask, step, dq):
        """What one tile of keys adds."""
        lse2, delta = rows
        (k_full, v_full), (k_used, v_used) = self.full, self.used
        slot = jax.lax.rem(done + step, jnp.int32(self.tiles.stages))
        keys, values = self.k_smem.at[slot], self.v_smem.at[slot]
        shape = (ROWS, self.tiles.keys)
        plgpu.barrier_wait(k_full.at[slot])
        plgpu.barrier_wait(v_full.at[slot])
        logits, dp = two_products(shape, self.q_smem, keys.transpose((1, 0)), self.do_smem, values.transpose((1, 0)))
        plgpu.barrier_arrive(v_used.at[slot])
        logits = mask(step, logits)
        across = functools.partial(jax.lax.broadcast_in_dim, shape=shape, broadcast_dimensions=[0])
        p = jnp.exp2(logits * (self.case.scale * LOG2_E) - across(lse2))
        ds = (p * (dp - across(delta))).astype(self.k_smem.dtype)
        dq, ds = jax.lax.optimization_barrier((dq, ds))
        dq = add_product(dq, ds, keys, self.ds_smem)
        plgpu.barrier_arrive(k_used.at[slot])
        return dq


def _kernel(case: Case, tiles: Tiles, q_tiles: int, programs: int, refs: Any, *scratch: Any) -> None:
    warpgroup = jax.lax.axis_index("wg")
    _, k_ref, v_ref, _, _, _, key_list, plan, _ = refs
    (_, _, k_smem, v_smem, _), (_, *full), used = scratch
    items = Items(case, plan.rows, q_tiles, programs)

    @pl.when(warpgroup == tiles.warpgroups)
    def _copy():
        take_registers(tiles.warpgroups, True)
        copy_keys(items, tiles, k_ref, v_ref, key_list, (k_smem, v_smem), full, used)

    @pl.when(warpgroup < tiles.warpgroups)
    def _compute():
        take_registers(tiles.warpgroups, False)
        _Gradient(case, tiles, items, warpgroup, refs, scratch).run()


def call_dq(
    case: Case, tiles: Tiles, q: Any, k: Any, v: Any, do: Any, lse2: Any, delta: Any, key_list: KeyList | None,
    plan: QueryPlan, interpreted: bool,
) -> Any:  # fmt: skip
    """dq [B,T,H,N]; T and U are multiples of 8 here, and lse2 and delta [B,H,T] reach to the end of the tiles."""
    W = tiles.warpgroups
    q_tiles = plan.rows.shape[2]
    programs = program_count(q_tiles * case.B * case.H, case.B * case.H)
    arrays, restore = flatten((q, k, v, do, lse2, delta, key_list, plan))

    def entry(*refs):
        pl.run_scoped(
            functools.partial(_kernel, case, tiles, q_tiles, programs, restore(refs)),
            (
                plgpu.SMEM((W, ROWS, case.N), q.dtype, transforms=SWIZZLED),
                plgpu.SMEM((W, ROWS, case.V), q.dtype, transforms=SWIZZLED),
                plgpu.SMEM((tiles.stages, tiles.keys, case.N), q.dtype, transforms=SWIZZLED),
                plgpu.SMEM((tiles.stages, tiles.keys, case.V), q.dtype, transforms=SWIZZLED),
                plgpu.SMEM((W, ROWS, tiles.keys), q.dtype, transforms=SWIZZLED) if interpreted else None,
            ),
            (
                plgpu.Barrier(num_arrivals=2, num_barriers=W),
                plgpu.Barrier(num_barriers=tiles.stages),
                plgpu.Barrier(num_barriers=tiles.stages),
            ),
            (plgpu.Barrier(num_arrivals=W, num_barriers=tiles.stages),) * 2,
            collective_axes="wg",
        )

    out_type = jax.ShapeDtypeStruct(q.shape, q.dtype)
    return persistent(entry, out_type, programs, W, interpreted)(*arrays)
