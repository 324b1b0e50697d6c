"""The forward kernel of window attention for Hopper (Pallas, Mosaic GPU): what does each warpgroup do, tile by tile?

Persistent programs take tiles of queries of one head in turn. Each compute warpgroup has 64 of the queries and holds
their softmax in registers; one more warpgroup brings tiles of keys and values by TMA and runs ahead, into the next
tile's keys too. The warpgroups run free of each other, so that one multiplies while the others take exponentials.

The steps of a tile are tiles of the cache's columns, of the retained keys, and of the window. Only steps with an edge
in them are masked.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.window_attention.api import Case
from pallas_kernels.window_attention.cases import FAR, LOG2_E
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
    fold,
    persistent,
    program_count,
    share_work,
    stream_keys,
)

TILES = {64: Tiles(4, 64, 6), 128: Tiles(3, 64, 3), 256: Tiles(2, 64, 2)}


class _Attention(Worker):
    """The softmax of 64 queries over the steps of their tile, tile after tile."""

    def __init__(self, case: Case, tiles: Tiles, items: Items, refs: Any, scratch: Any, warpgroup: Any):
        super().__init__(case, tiles, items, warpgroup)
        self.q_ref, _, _, self.key_list, self.plan, self.o_ref, self.lse_ref = refs
        (q_smems, o_smems, self.k_smem, self.v_smem, lse_smems, p_smems), (q_full, *full), used = scratch
        self.full, self.used = tuple(full), used
        self.q_smem, self.lse_smem, self.q_full = (x.at[warpgroup] for x in (q_smems, lse_smems, q_full))
        self.own_output = o_smems is not None
        self.o_smem = o_smems.at[warpgroup] if self.own_output else self.q_smem
        self.p_smem = None if p_smems is None else p_smems.at[warpgroup]
        self.scale = case.scale * LOG2_E

    def fetch(self, n) -> None:
        @pl.when(n < self.items.rounds)
        def _():
            b, head, _, tile = self.items.place(n)
            rows = pl.ds(self.first_row(tile), ROWS)
            plgpu.copy_gmem_to_smem(self.q_ref.at[b, rows, head], self.q_smem, self.q_full)

    def work(self, n, done):
        place = self.items.place(n)
        steps = Steps(self.items.row(n, self.warpgroup), self.tiles.keys)
        masks = Masks(self.case, steps, place, self.first_row(place[3]), self.plan.begin, self.key_list)
        plgpu.barrier_wait(self.q_full)
        carry = (
            plgpu.layout_cast(jnp.zeros((ROWS, self.case.V), jnp.float32), plgpu.Layout.WGMMA),
            plgpu.layout_cast(jnp.full((ROWS,), -1e30, jnp.float32), BY_ROW),
            plgpu.layout_cast(jnp.zeros((ROWS, 8), jnp.float32), plgpu.Layout.WGMMA),
        )
        step = functools.partial(self.step, done)
        carry = stream_keys(self.tiles.stages, steps, masks, self.full, self.used, done, step, carry)
        if self.own_output:  # every logit of this tile is there: its queries make room for the next ones
            self.fetch(n + 1)
        self.store(masks, place, carry)
        if not self.own_output:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            self.fetch(n + 1)
        return done + steps.end

    def step(self, done, mask, step, carry):
        """One tile of keys joins the online softmax."""
        acc, m, l = carry
        (k_full, v_full), (k_used, v_used) = self.full, self.used
        slot = jax.lax.rem(done + step, jnp.int32(self.tiles.stages))

        def products(acc_ref):
            plgpu.wgmma(acc_ref, self.q_smem, self.k_smem.at[slot].transpose((1, 0)))
            return acc_ref[...]

        plgpu.barrier_wait(k_full.at[slot])
        logits = pl.run_scoped(products, plgpu.ACC((ROWS, self.tiles.keys), jnp.float32))
        plgpu.barrier_arrive(k_used.at[slot])
        logits = mask(step, logits)
        # m starts at a finite number, so a row that has seen nothing gives exp2(-inf) = 0 and not NaN.
        m_new = jnp.maximum(m, fold(jnp.maximum, logits).max(axis=1) * self.scale)
        fade = jnp.exp2(m - m_new)
        p = jnp.exp2(logits * self.scale - jax.lax.broadcast_in_dim(m_new, logits.shape, [0]))
        acc *= jax.lax.broadcast_in_dim(fade, acc.shape, [0])
        # The denominator in 8 parts, which lie in one thread each: they are joined once, after the last tile.
        l = l * jax.lax.broadcast_in_dim(fade, l.shape, [0]) + fold(jnp.add, p)
        p = p.astype(self.k_smem.dtype)
        # All that the product reads is there before it starts, or the compiler would serialise it.
        acc, m_new, l, p = jax.lax.optimization_barrier((acc, m_new, l, p))
        plgpu.barrier_wait(v_full.at[slot])
        acc = add_product(acc, p, self.v_smem.at[slot], self.p_smem)
        plgpu.barrier_arrive(v_used.at[slot])
        return acc, m_new, l

    def store(self, masks: Masks, place, carry) -> None:
        acc, m, l = carry
        l = l.sum(axis=1)
        if masks.begins is not None:
            l = jnp.where(masks.begins < FAR, l, 0.0)
        seen = l > 0
        divisor = jnp.where(seen, l, 1.0)
        factor = jnp.where(seen, 1.0 / divisor, 0.0)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the results before these have left the buffers
        self.o_smem[...] = (acc * jax.lax.broadcast_in_dim(factor, acc.shape, [0])).astype(self.o_smem.dtype)
        self.lse_smem[...] = jnp.where(seen, m * (1 / LOG2_E) + jnp.log(divisor), -jnp.inf)
        plgpu.commit_smem()
        b, head, _, _ = place
        plgpu.copy_smem_to_gmem(self.o_smem, self.o_ref.at[b, pl.ds(masks.t, ROWS), head])
        plgpu.copy_smem_to_gmem(self.lse_smem, self.lse_ref.at[b, head, pl.ds(masks.t, ROWS)])


def _kernel(case: Case, tiles: Tiles, q_tiles: int, programs: int, refs: Any, *scratch: Any) -> None:
    warpgroup = jax.lax.axis_index("wg")
    (_, k_ref, v_ref, key_list, plan, _, _), ((_, _, k_smem, v_smem, _, _), (_, *full), used) = refs, scratch
    items = Items(case, plan.rows, q_tiles, programs)
    share_work(
        warpgroup,
        tiles.warpgroups,
        lambda: copy_keys(items, tiles, k_ref, v_ref, key_list, (k_smem, v_smem), full, used),
        lambda: _Attention(case, tiles, items, refs, scratch, warpgroup).run(),
    )


def shared_memory(case: Case, tiles: Tiles) -> dict[str, int]:
    """Bytes of shared memory that the kernel's buffers take."""
    rows = tiles.warpgroups * ROWS
    return {
        "queries and outputs": rows * 2 * (case.N + (case.V if own_output(case) else 0)),
        "keys and values": tiles.stages * tiles.keys * 2 * (case.N + case.V),
        "lse and barriers": rows * 4 + BARRIERS,
    }


def own_output(case: Case) -> bool:
    """Whether the outputs have buffers of their own, or take those of the queries."""
    return case.N + case.V <= 256


def call_forward(
    case: Case, tiles: Tiles, q: Any, k: Any, v: Any, key_list: KeyList | None, plan: QueryPlan, interpreted: bool
) -> Any:
    """o [B,T,H,V] and lse [B,H,tiles * rows]; T and U are multiples of 8 here, unlike those of ``case``."""
    W = tiles.warpgroups
    q_tiles = plan.rows.shape[2]
    items = q_tiles * case.B * case.H
    programs = program_count(items, case.B * case.H)
    arrays, restore = flatten((q, k, v, key_list, plan))

    def entry(*refs):
        pl.run_scoped(
            functools.partial(_kernel, case, tiles, q_tiles, programs, restore(refs)),
            (
                plgpu.SMEM((W, ROWS, case.N), q.dtype, transforms=SWIZZLED),
                plgpu.SMEM((W, ROWS, case.V), q.dtype, transforms=SWIZZLED) if own_output(case) else None,
                plgpu.SMEM((tiles.stages, tiles.keys, case.N), q.dtype, transforms=SWIZZLED),
                plgpu.SMEM((tiles.stages, tiles.keys, case.V), q.dtype, transforms=SWIZZLED),
                plgpu.SMEM((W, ROWS), jnp.float32),
                plgpu.SMEM((W, ROWS, tiles.keys), q.dtype, transforms=SWIZZLED) if interpreted else None,
            ),
            (
                plgpu.Barrier(num_barriers=W),
                plgpu.Barrier(num_barriers=tiles.stages),
                plgpu.Barrier(num_barriers=tiles.stages),
            ),
            (plgpu.Barrier(num_arrivals=W, num_barriers=tiles.stages),) * 2,
            collective_axes="wg",
        )

    out_type = (
        jax.ShapeDtypeStruct((*q.shape[:3], case.V), q.dtype),
        jax.ShapeDtypeStruct((case.B, case.H, q_tiles * W * ROWS), jnp.float32),
    )
    return persistent(entry, out_type, programs, W, interpreted)(*arrays)
