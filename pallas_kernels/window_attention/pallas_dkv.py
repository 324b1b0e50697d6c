"""The gradients of keys and values on Hopper (Pallas, Mosaic GPU): which queries does a tile of keys meet, and how?

    dv_j = sum_t p_tj do_t,    dk_j = scale sum_t p_tj (do_t . v_j - delta_t) q_t

Everything is transposed: keys are the rows of a product, queries its columns. A compute warpgroup owns 64 keys of one
KV head; the queries (of every head of the group) stream past it. One kernel serves the keys of the call and those of
the list: either has, for every key, the interval [low, high) of the query indices that see it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.tiles import ceil_div
from pallas_kernels.window_attention.api import Case
from pallas_kernels.window_attention.cases import FAR, LOG2_E
from pallas_kernels.window_attention.pallas_dq import two_products
from pallas_kernels.window_attention.pallas_plan import ROWS
from pallas_kernels.window_attention.pallas_stream import (
    BARRIERS,
    BY_COLUMN,
    BY_ROW,
    SWIZZLED,
    Worker,
    add_product,
    persistent,
    program_count,
    share_work,
    skip_steps,
    turn,
    turns,
)


@dataclasses.dataclass(frozen=True)
class KeyTiles:
    """Compute warpgroups (of 64 keys), queries per tile, tiles of queries in flight; dk and dv in one pass or two."""

    warpgroups: int
    queries: int
    stages: int
    together: bool = True


TILES = {64: KeyTiles(2, 128, 3), 128: KeyTiles(2, 64, 2), 256: KeyTiles(1, 64, 2, False)}


class Keys(NamedTuple):
    """Keys as they lie in ``k`` and ``v``, [B,U,K,...] or (listed) [B,K,S,...], and the queries that see each."""

    k: Float[Array, "B U K N"]
    v: Float[Array, "B U K V"]
    low: Int32[Array, "B K U"]  # K or 1; padded to whole tiles
    high: Int32[Array, "B K U"]


class QueryRows(NamedTuple):
    """What streams past the keys; lse2 (in powers of two) and delta go on past T: 1e30 and 0."""

    q: Float[Array, "B T H N"]
    do: Float[Array, "B T H V"]
    lse2: Float32[Array, "B H T"]
    delta: Float32[Array, "B H T"]


def shared_memory(case: Case, tiles: KeyTiles) -> dict[str, int]:
    """Bytes of shared memory that the kernel's buffers take."""
    width = 2 * (case.N + case.V)
    return {
        "keys and values": tiles.warpgroups * ROWS * width,
        "queries and do": tiles.stages * tiles.queries * (width + 8),
        "barriers": BARRIERS,
    }


def plan_keys(case: Case, tiles: KeyTiles, low: Array, high: Array) -> tuple[Array, Array]:
    """The plan [B,K,tiles,fields] of tiles of keys, and how many tiles of a head meet a query at most, [1].

    Fields: the first query (not index) and the number of tiles of queries; then per warpgroup its first and end among
    those, and the indices [low, high) that all its keys are seen by. Slots without a key are always masked.
    """
    skip = case.U - case.T
    low, high = (x.reshape(*x.shape[:2], -1, tiles.warpgroups, ROWS) for x in (low, high))
    seen = high > low
    least = jnp.where(seen, low, FAR).min(-1)
    most = jnp.where(seen, high, 0).max(-1)
    first = jnp.maximum(least.min(-1) - skip, 0) // 8 * 8
    n = jnp.maximum(-(-(jnp.minimum(most.max(-1), case.U) - skip - first) // tiles.queries), 0)
    n = jnp.where(most.max(-1) > least.min(-1), n, 0)
    first = jnp.where(n > 0, first, 0)
    own_end = -(-(jnp.minimum(most, case.U) - skip - first[..., None]) // tiles.queries)
    own_end = jnp.where(most > least, jnp.clip(own_end, 0, n[..., None]), 0)
    own_first = jnp.clip((least - skip - first[..., None]) // tiles.queries, 0, own_end)
    whole_low = jnp.where(jnp.all(seen, -1), low.max(-1), FAR)
    own = jnp.stack([own_first, own_end, whole_low, high.min(-1)], -1)
    rows = jnp.concatenate([first[..., None], n[..., None], own.reshape(*n.shape, -1)], -1)
    tile = jnp.arange(1, n.shape[2] + 1, dtype=jnp.int32)
    return rows, jnp.max(jnp.where(n > 0, tile, 0))[None]


class _KeyItems:
    """The tiles of keys that a program takes in turn; the first keys, which most queries may see, first."""

    def __init__(self, case: Case, plan_ref: Any, used_ref: Any, written: int, programs: int, listed: bool):
        self.case, self.plan, self.written, self.programs, self.listed = case, plan_ref, written, programs, listed
        self.heads, self.program = case.B * case.K, jax.lax.axis_index("programs")
        # Later tiles meet no query; of those, only the first ``written`` must still be written.
        tiles = jnp.maximum(used_ref[0], written)
        self.rounds = turns(tiles * self.heads, self.program, programs)

    def place(self, n):
        """(b, KV head, tile) of item n."""
        item = turn(n, self.program, self.programs)
        row = jax.lax.rem(item, jnp.int32(self.heads))
        b, h = jax.lax.div(row, jnp.int32(self.case.K)), jax.lax.rem(row, jnp.int32(self.case.K))
        return b, h, jax.lax.div(item, jnp.int32(self.heads))

    def row(self, n, *fields):
        b, h, tile = self.place(n)
        h = h if self.plan.shape[1] > 1 else 0
        return tuple(self.plan[b, h, tile, field] for field in (0, 1, *fields))

    def rows_of(self, ref, b, h, first):
        return ref.at[b, h, pl.ds(first, ROWS)] if self.listed else ref.at[b, pl.ds(first, ROWS), h]


def _copy_queries(case: Case, tiles: KeyTiles, items: _KeyItems, queries: Any, buffers: Any, full: Any, used: Any):
    """The copying warpgroup: brings every step's queries, of all heads of the group, as soon as buffers are free."""
    q_smem, do_smem, lse_smem, delta_smem = buffers
    (q_full, do_full), (q_used, do_used) = full, used
    G = case.H // case.K
    slot_of = lambda step: jax.lax.rem(step, jnp.int32(tiles.stages))  # noqa: E731

    def await_free(step):
        @pl.when(step >= tiles.stages)
        def _():
            plgpu.barrier_wait(q_used.at[slot_of(step)])
            plgpu.barrier_wait(do_used.at[slot_of(step)])

    def copy_item(n, done):
        b, h, _ = items.place(n)
        first, tiles_n = items.row(n)

        def copy(step, _):
            slot = slot_of(done + step)
            head = h * G + jax.lax.div(step, tiles_n)
            some = pl.ds(pl.multiple_of(first + jax.lax.rem(step, tiles_n) * tiles.queries, 8), tiles.queries)
            await_free(done + step)
            plgpu.copy_gmem_to_smem(queries.q.at[b, some, head], q_smem.at[slot], q_full.at[slot])
            plgpu.copy_gmem_to_smem(queries.lse2.at[b, head, some], lse_smem.at[slot], q_full.at[slot])
            plgpu.copy_gmem_to_smem(queries.do.at[b, some, head], do_smem.at[slot], do_full.at[slot])
            plgpu.copy_gmem_to_smem(queries.delta.at[b, head, some], delta_smem.at[slot], do_full.at[slot])

        jax.lax.fori_loop(0, tiles_n * G, copy, None)
        return done + tiles_n * G

    done = jax.lax.fori_loop(0, items.rounds, copy_item, jnp.int32(0))
    for n in range(tiles.stages):
        await_free(done + n)


class _Gradients(Worker):
    """The gradients of 64 keys and values, tile after tile."""

    def __init__(
        self, case: Case, tiles: KeyTiles, items: _KeyItems, wanted: Any, refs: Any, scratch: Any, warpgroup: Any
    ):
        super().__init__(case, tiles, items, warpgroup)
        self.wanted = wanted
        self.keys, _, _, _, *self.out_refs = refs
        (k_smems, v_smems, *self.buffers, score_smems, p_smems), (kv_full, *full), used = scratch
        self.full, self.used = tuple(full), used
        self.k_smem, self.v_smem, self.kv_full = (x.at[warpgroup] for x in (k_smems, v_smems, kv_full))
        self.score_smem, self.p_smem = (None if x is None else x.at[warpgroup] for x in (score_smems, p_smems))

    def fetch(self, n) -> None:
        @pl.when(n < self.items.rounds)
        def _():
            b, h, tile = self.items.place(n)
            for ref, smem in ((self.keys.k, self.k_smem), (self.keys.v, self.v_smem)):
                rows = self.items.rows_of(ref, b, h, self.first_row(tile))
                plgpu.copy_gmem_to_smem(rows, smem, self.kv_full)

    def work(self, n, done):
        case, own = self.case, 2 + 4 * self.warpgroup
        b, h, tile = self.items.place(n)
        first, tiles_n, own_first, own_end, *whole = self.items.row(n, own, own + 1, own + 2, own + 3)
        at = (b, h if self.keys.low.shape[1] > 1 else 0, pl.ds(self.first_row(tile), ROWS))
        seen = tuple(plgpu.load(x.at[at], layout=BY_ROW, optimized=False) for x in (self.keys.low, self.keys.high))
        i_first = case.U - case.T + first
        plgpu.barrier_wait(self.kv_full)

        def zeros(size):
            return plgpu.layout_cast(jnp.zeros((ROWS, size), jnp.float32), plgpu.Layout.WGMMA)

        def one_head(g, carry):
            before = done + g * tiles_n
            skip_steps(self.tiles.stages, self.full, self.used, before, before + own_first)
            step = functools.partial(self.step, before, i_first, seen, whole)
            carry = jax.lax.fori_loop(own_first, own_end, step, carry)
            skip_steps(self.tiles.stages, self.full, self.used, before + own_end, before + tiles_n)
            return carry

        G = case.H // case.K
        carry = tuple(zeros(x) if want else None for want, x in zip(self.wanted, (case.N, case.V), strict=True))
        carry = jax.lax.fori_loop(0, G, one_head, carry) if G > 1 else one_head(0, carry)
        self.store(b, h, tile, (tiles_n > 0) | (tile < self.items.written), carry)
        self.fetch(n + 1)
        return done + tiles_n * G

    def step(self, before, i_first, seen, whole, step, carry):
        """What one tile of queries adds."""
        dk, dv = carry
        (q_full, do_full), (q_used, do_used) = self.full, self.used
        slot = jax.lax.rem(before + step, jnp.int32(self.tiles.stages))
        q, do, lse_smem, delta_smem = (x.at[slot] for x in self.buffers)
        i = i_first + step * self.tiles.queries
        shape = (ROWS, self.tiles.queries)
        down = functools.partial(jax.lax.broadcast_in_dim, shape=shape, broadcast_dimensions=[1])
        across = functools.partial(jax.lax.broadcast_in_dim, shape=shape, broadcast_dimensions=[0])

        def mask(logits):
            index = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA) + i
            return jnp.where((index >= across(seen[0])) & (index < across(seen[1])), logits, -jnp.inf)

        plgpu.barrier_wait(q_full.at[slot])
        plgpu.barrier_wait(do_full.at[slot])
        logits, dp = two_products(shape, self.k_smem, q.transpose((1, 0)), self.v_smem, do.transpose((1, 0)))
        all_seen = (i >= whole[0]) & (i + self.tiles.queries <= whole[1])
        logits = jax.lax.cond(all_seen, lambda x: x, mask, logits)
        lse2, delta = (plgpu.load(x, layout=BY_COLUMN) for x in (lse_smem, delta_smem))
        p = jnp.exp2(logits * (self.case.scale * LOG2_E) - down(lse2))
        ds = (p * (dp - down(delta))).astype(self.k_smem.dtype)
        p = p.astype(self.k_smem.dtype)
        dk, dv, ds, p = jax.lax.optimization_barrier((dk, dv, ds, p))
        if all(self.wanted) and self.p_smem is None:

            def products(accumulators):
                plgpu.wgmma(accumulators[0], ds, q)
                plgpu.wgmma(accumulators[1], p, do)

            dk, dv = pl.run_state(products)((plgpu.ACC.init(dk), plgpu.ACC.init(dv)))
        else:
            dk = dk if dk is None else add_product(dk, ds, q, self.p_smem)
            dv = dv if dv is None else add_product(dv, p, do, self.p_smem)
        plgpu.barrier_arrive(q_used.at[slot])
        plgpu.barrier_arrive(do_used.at[slot])
        return dk, dv

    def store(self, b, h, tile, asked_for, carry) -> None:
        dk, dv = carry
        if self.score_smem is not None:
            values = plgpu.load(self.v_smem, layout=plgpu.Layout.WGMMA).astype(jnp.float32)
            self.score_smem[...] = (dv * values).sum(axis=1)
            plgpu.commit_smem()
            rows = self.out_refs[-1].at[b, h, pl.ds(self.first_row(tile), ROWS)]
            plgpu.copy_smem_to_gmem(self.score_smem, rows)
        results = [x for x in (None if dk is None else dk * self.case.scale, dv) if x is not None]
        for ref, result, smem in zip(self.out_refs, results, (self.k_smem, self.v_smem), strict=False):
            rows = self.items.rows_of(ref, b, h, self.first_row(tile))
            if ref.dtype == jnp.float32:

                @pl.when(asked_for)
                def _(rows=rows, result=result):
                    rows[...] = result

            else:
                smem[...] = result.astype(smem.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(smem, rows)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _kernel(case: Case, tiles: KeyTiles, wanted: Any, listed: bool, sizes: Any, refs: Any, *scratch: Any) -> None:
    warpgroup = jax.lax.axis_index("wg")
    _, queries, plan_ref, used_ref, *_ = refs
    (_, _, *buffers, _, _), (_, *full), used = scratch
    items = _KeyItems(case, plan_ref, used_ref, sizes[0], sizes[1], listed)
    share_work(
        warpgroup,
        tiles.warpgroups,
        lambda: _copy_queries(case, tiles, items, queries, buffers, full, used),
        lambda: _Gradients(case, tiles, items, wanted, refs, scratch, warpgroup).run(),
    )


def call_dkv(
    case: Case, tiles: KeyTiles, keys: Keys, queries: QueryRows, listed: bool, dtype: Any, scores: bool,
    interpreted: bool,
) -> tuple[Array, ...]:  # fmt: skip
    """(dk, dv) as the keys lie, rounded to ``dtype``; in float32 padded to whole tiles.

    With ``scores`` also dscores [B,K,U], padded to whole tiles.

    Of a list, slots that neither hold a key nor lie in the cache's part are left unwritten. T and U are multiples of 8
    here, unlike those of ``case``.
    """
    if tiles.together:
        return _call(case, tiles, keys, queries, listed, dtype, scores, interpreted, (True, True))
    dk = _call(case, tiles, keys, queries, listed, dtype, False, interpreted, (True, False))
    return *dk, *_call(case, tiles, keys, queries, listed, dtype, scores, interpreted, (False, True))


def _call(
    case: Case, tiles: KeyTiles, keys: Keys, queries: QueryRows, listed: bool, dtype: Any, scores: bool,
    interpreted: bool, wanted: tuple[bool, bool],
) -> Any:  # fmt: skip
    W, QUERIES, stages = tiles.warpgroups, tiles.queries, tiles.stages
    plan, used = plan_keys(case, tiles, keys.low, keys.high)
    key_tiles = plan.shape[2]
    written = ceil_div(case.C, W * ROWS) if listed else key_tiles
    programs = program_count(key_tiles * case.B * case.K, case.B * case.K)
    shapes = []
    for want, x in zip(wanted, (keys.k, keys.v), strict=True):
        shape = list(x.shape)
        if dtype == jnp.float32:
            shape[2 if listed else 1] = key_tiles * W * ROWS
        if want:
            shapes.append(jax.ShapeDtypeStruct(tuple(shape), dtype))
    if scores:
        shapes.append(jax.ShapeDtypeStruct((case.B, case.K, key_tiles * W * ROWS), jnp.float32))
    given = queries.q.dtype

    def entry(*refs):
        keys_refs, query_refs, others = Keys(*refs[:4]), QueryRows(*refs[4:8]), refs[8:]
        pl.run_scoped(
            functools.partial(
                _kernel, case, tiles, wanted, listed, (written, programs), (keys_refs, query_refs, *others)
            ),
            (
                plgpu.SMEM((W, ROWS, case.N), given, transforms=SWIZZLED),
                plgpu.SMEM((W, ROWS, case.V), given, transforms=SWIZZLED),
                plgpu.SMEM((stages, QUERIES, case.N), given, transforms=SWIZZLED),
                plgpu.SMEM((stages, QUERIES, case.V), given, transforms=SWIZZLED),
                plgpu.SMEM((stages, QUERIES), jnp.float32),
                plgpu.SMEM((stages, QUERIES), jnp.float32),
                plgpu.SMEM((W, ROWS), jnp.float32) if scores else None,
                plgpu.SMEM((W, ROWS, QUERIES), given, transforms=SWIZZLED) if interpreted else None,
            ),
            (
                plgpu.Barrier(num_arrivals=2, num_barriers=W),
                plgpu.Barrier(num_arrivals=2, num_barriers=stages),
                plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            ),
            (plgpu.Barrier(num_arrivals=W, num_barriers=stages),) * 2,
            collective_axes="wg",
        )

    out_type = tuple(shapes)
    return persistent(entry, out_type, programs, W, interpreted)(*keys, *queries, plan, used)
