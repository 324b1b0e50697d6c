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
    program_count,
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


def _kernel(case: Case, tiles: Tiles, q_tiles: int, programs: int, refs: Any, scratch: Any) -> None:
    q_ref, k_ref, v_ref, do_ref, lse2_ref, delta_ref, key_list, plan, dq_ref = refs
    (q_smems, do_smems, k_smem, v_smem, ds_smems), (q_full, k_full, v_full), used = scratch
    warpgroup = jax.lax.axis_index("wg")
    items = Items(case, plan.rows, q_tiles, programs)

    @pl.when(warpgroup == tiles.warpgroups)
    def _copy():
        take_registers(tiles.warpgroups, True)
        copy_keys(items, tiles, k_ref, v_ref, key_list, (k_smem, v_smem), (k_full, v_full), used)

    @pl.when(warpgroup < tiles.warpgroups)
    def _compute():
        take_registers(tiles.warpgroups, False)
        k_used, v_used = used
        q_smem, do_smem = q_smems.at[warpgroup], do_smems.at[warpgroup]
        slot_of = lambda step: jax.lax.rem(step, jnp.int32(tiles.stages))  # noqa: E731

        def first_query(tile):
            return pl.multiple_of(tile * (tiles.warpgroups * ROWS) + warpgroup * ROWS, ROWS)

        def fetch_queries(n):
            b, head, _, tile = items.place(n)
            at = (b, pl.ds(first_query(tile), ROWS), head)
            plgpu.copy_gmem_to_smem(q_ref.at[at], q_smem, q_full.at[warpgroup])
            plgpu.copy_gmem_to_smem(do_ref.at[at], do_smem, q_full.at[warpgroup])

        def differentiate(n, done):
            place = items.place(n)
            b, head, _, tile = place
            steps = Steps(items.row(n, warpgroup), tiles.keys)
            masks = Masks(case, steps, place, first_query(tile), plan.begin, key_list)
            here = (b, head, pl.ds(masks.t, ROWS))
            lse2, delta = (plgpu.load(x.at[here], layout=BY_ROW, optimized=False) for x in (lse2_ref, delta_ref))

            def skip(step, _):
                slot = slot_of(done + step)
                for full, free in ((k_full, k_used), (v_full, v_used)):
                    plgpu.barrier_wait(full.at[slot])
                    plgpu.barrier_arrive(free.at[slot])

            def body(mask, step, dq):
                slot = slot_of(done + step)
                keys, values = k_smem.at[slot], v_smem.at[slot]
                plgpu.barrier_wait(k_full.at[slot])
                plgpu.barrier_wait(v_full.at[slot])
                logits, dp = two_products(
                    (ROWS, tiles.keys), q_smem, keys.transpose((1, 0)), do_smem, values.transpose((1, 0))
                )
                plgpu.barrier_arrive(v_used.at[slot])
                logits = mask(step, logits)
                across = functools.partial(jax.lax.broadcast_in_dim, shape=logits.shape, broadcast_dimensions=[0])
                p = jnp.exp2(logits * (case.scale * LOG2_E) - across(lse2))
                ds = (p * (dp - across(delta))).astype(k_smem.dtype)
                dq, ds = jax.lax.optimization_barrier((dq, ds))
                dq = add_product(dq, ds, keys, None if ds_smems is None else ds_smems.at[warpgroup])
                plgpu.barrier_arrive(k_used.at[slot])
                return dq

            plgpu.barrier_wait(q_full.at[warpgroup])
            dq = plgpu.layout_cast(jnp.zeros((ROWS, case.N), jnp.float32), plgpu.Layout.WGMMA)
            if key_list is not None:
                dq = jax.lax.fori_loop(0, steps.listed, functools.partial(body, masks.listed), dq)
            first, end = masks.window_steps()
            jax.lax.fori_loop(steps.listed, first, skip, None)
            dq = jax.lax.fori_loop(first, end, functools.partial(body, masks.window), dq)
            jax.lax.fori_loop(end, steps.end, skip, None)
            q_smem[...] = (dq * case.scale).astype(q_smem.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_smem, dq_ref.at[b, pl.ds(masks.t, ROWS), head])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            pl.when(n + 1 < items.rounds)(lambda: fetch_queries(n + 1))
            return done + steps.end

        fetch_queries(jnp.int32(0))
        jax.lax.fori_loop(0, items.rounds, differentiate, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)


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
            lambda *scratch: _kernel(case, tiles, q_tiles, programs, restore(refs), scratch),
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

    kernel = plgpu.kernel(
        entry,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(programs,),
        grid_names=("programs",),
        num_threads=W + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpreted else None,
    )
    return kernel(*arrays)
