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
from pallas_kernels.window_attention.cases import LOG2_E
from pallas_kernels.window_attention.pallas_plan import ROWS, KeyList, QueryPlan
from pallas_kernels.window_attention.pallas_stream import (
    BARRIERS,
    BY_ROW,
    SWIZZLED,
    Items,
    Masks,
    Steps,
    Tiles,
    Worker,
    add_product,
    copy_keys,
    flatten,
    persistent,
    program_count,
    share_work,
    stream_keys,
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


class _Gradient(Worker):
    """The gradient of 64 queries over the steps of their tile, tile after tile."""

    def __init__(self, case: Case, tiles: Tiles, items: Items, refs: Any, scratch: Any, warpgroup: Any):
        super().__init__(case, tiles, items, warpgroup)
        self.q_ref, _, _, self.do_ref, self.lse2_ref, self.delta_ref, self.key_list, self.plan, self.dq_ref = refs
        (q_smems, do_smems, self.k_smem, self.v_smem, ds_smems), (q_full, *full), used = scratch
        self.full, self.used = tuple(full), used
        self.q_smem, self.do_smem, self.q_full = (x.at[warpgroup] for x in (q_smems, do_smems, q_full))
        self.ds_smem = None if ds_smems is None else ds_smems.at[warpgroup]

    def fetch(self, n) -> None:
        @pl.when(n < self.items.rounds)
        def _():
            b, head, _, tile = self.items.place(n)
            at = (b, pl.ds(self.first_row(tile), ROWS), head)
            plgpu.copy_gmem_to_smem(self.q_ref.at[at], self.q_smem, self.q_full)
            plgpu.copy_gmem_to_smem(self.do_ref.at[at], self.do_smem, self.q_full)

    def work(self, n, done):
        place = self.items.place(n)
        b, head, _, tile = place
        steps = Steps(self.items.row(n, self.warpgroup), self.tiles.keys)
        masks = Masks(self.case, steps, place, self.first_row(tile), self.plan.begin, self.key_list)
        here = (b, head, pl.ds(masks.t, ROWS))
        rows = tuple(plgpu.load(x.at[here], layout=BY_ROW, optimized=False) for x in (self.lse2_ref, self.delta_ref))
        plgpu.barrier_wait(self.q_full)
        dq = plgpu.layout_cast(jnp.zeros((ROWS, self.case.N), jnp.float32), plgpu.Layout.WGMMA)
        step = functools.partial(self.step, done, rows)
        dq = stream_keys(self.tiles.stages, steps, masks, self.full, self.used, done, step, dq)
        self.q_smem[...] = (dq * self.case.scale).astype(self.q_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(self.q_smem, self.dq_ref.at[b, pl.ds(masks.t, ROWS), head])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        self.fetch(n + 1)
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
    share_work(
        warpgroup,
        tiles.warpgroups,
        lambda: copy_keys(items, tiles, k_ref, v_ref, key_list, (k_smem, v_smem), full, used),
        lambda: _Gradient(case, tiles, items, refs, scratch, warpgroup).run(),
    )


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
