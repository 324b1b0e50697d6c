"""The gradients of one chunk, from the states at its ends (Pallas, Mosaic GPU).

With E = do r^T and F = dy r^T over pairs of tokens, and W_ij = exp(c_i - c_j) beta_j times the inverse norms and the
scale, so that raw q and k stand in all products:

    Q = W E (i >= j),  M = -W F (i > j)
    dq' = read_q do S^T + Q k
    dk' = -read_k dy S^T + write r D^T + Q^T q + (M + M^T) k

where dq' and dk' are the gradients of the normalised rows times their inverse norms: dq = dq' - q (q.dq') / |q|^2.
E_ij q_i.k_j and F_ij k_i.k_j without beta sum to dbeta by columns; with it they are the gradients of c_i - c_j, and
dg_t is their sum over the pairs i >= t > j. The inner products of r D and k come from the reverse scan, where D has
more precision.

Persistent programs take chunks in turn. One warpgroup forms E, F, Q, M and dq, another dk; both read the states some
values at a time, for which a third brings the next chunk's while these two still work on what needs none of them. Heads
of 256 are done in two halves of 128 columns; the first one's rows wait in 16 bits for the second's part of q.dq'.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.gated_delta_rule import pallas_tiles as t
from pallas_kernels.gated_delta_rule.pallas_tiles import CHUNK, COLUMNS, ROWS, SQUARE, WGMMA

# Of the vectors that the warpgroup of dk hands over.
DREAD, WRITTEN, BETA_WRITTEN, DCARRY = range(4)


@dataclasses.dataclass(frozen=True)
class Tile:
    """``columns`` of the keys at a time, ``values`` of the values in each of ``stages`` buffers."""

    columns: int
    values: int
    stages: int


def tile_for(head_size: int) -> Tile:
    return {64: Tile(64, 64, 2), 128: Tile(128, 64, 2), 256: Tile(128, 32, 3)}[head_size]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is fixed about a launch."""

    tile: Tile
    halves: int
    blocks: int
    group: int
    scale: float
    runs: bool
    normalize: bool


def _write(m: Any, plan: _Plan, name: str, last: jax.Array, along: jax.Array, norm: jax.Array, place: Any) -> None:
    """Writes dq or dk: of raw rows x it is dx - x (x.dx) norm^2, where dx is that of normalised rows times ``norm``.

    ``last`` is dx in the last half of the columns and ``along`` x.dx over all; the first half waits in its buffer.
    Where the rows leave in float32 there is no room for a buffer, and registers are written.
    """
    b, n, h = place
    fields = vars(m)
    x_s, out, buffer = fields[f"{name}_s"], fields[f"d{name}"], fields.get(f"d{name}_s")
    along = t.along_rows(along * norm * norm, (CHUNK, plan.tile.columns))
    for half in range(plan.halves):
        dx = last if half == plan.halves - 1 else plgpu.load(buffer, layout=WGMMA).astype(jnp.float32)
        if plan.normalize:
            dx -= plgpu.load(x_s[half], layout=WGMMA).astype(jnp.float32) * along
        columns = pl.ds(half * plan.tile.columns, plan.tile.columns)
        into = out.at[b, pl.ds(n * CHUNK, CHUNK), h, columns]
        if out.dtype == jnp.float32:
            plgpu.commit_smem()  # what was read from the inputs' buffers is written next by a copy
            into[...] = dx
        else:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            buffer[...] = dx.astype(buffer.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(buffer, into)


def _blocks(m: Any, plan: _Plan, first: Any, starts: tuple[Any, ...], multiply: Any) -> tuple[Any, ...]:
    """Sums over the blocks of values of one half of this program's chunk, accumulated by ``multiply(slot, sums)``.

    ``first`` is the number of blocks that the program has had before.
    """

    def step(block, sums):
        slot = jax.lax.rem(first + block, jnp.int32(plan.tile.stages))
        plgpu.barrier_wait(m.full.at[slot])
        sums = multiply(slot, sums)
        plgpu.commit_smem()  # what was read here is written next by a copy
        plgpu.barrier_arrive(m.used.at[slot])
        return sums

    return jax.lax.fori_loop(0, plan.blocks, step, starts)


def _pairs(m: Any, plan: _Plan, turn: Any, queries: jax.Array, keys: jax.Array) -> tuple[jax.Array, ...]:
    """Publishes Q and M, from E and F; returns dbeta's part, and the pairs' sums by row and by column for dg."""
    dtype = m.queries_s.dtype
    i, j = t.indices(turn)
    coarse, fine = (plgpu.load(m.by_row.at[x], layout=ROWS) for x in (t.COARSE, t.FINE))
    coarse_j, fine_j, beta_j = (plgpu.load(m.by_column.at[x], layout=COLUMNS) for x in (t.COARSE, t.FINE, t.BETA))
    apart = (t.along_rows(coarse) - t.along_columns(coarse_j)) + (t.along_rows(fine) - t.along_columns(fine_j))
    sees = i >= j
    if plan.runs:
        run = plgpu.load(m.by_row.at[t.RUN], layout=ROWS)
        sees &= t.along_rows(run) == t.along_columns(plgpu.load(m.by_column.at[t.RUN], layout=COLUMNS))
    norm_k_j = plgpu.load(m.factors_column.at[t.NORM_K], layout=COLUMNS)
    decay = jnp.exp(jnp.where(sees, apart, -jnp.inf)) * t.along_columns(norm_k_j)
    norm_q, norm_k = (plgpu.load(m.factors_row.at[x], layout=ROWS) for x in (t.NORM_Q, t.NORM_K))
    beta_j = t.along_columns(beta_j)
    queries *= decay * t.along_rows(norm_q * plan.scale)
    keys *= jnp.where(i > j, decay, 0.0) * t.along_rows(-norm_k)
    pl.when(turn > 0)(lambda: plgpu.barrier_wait(m.pairs_read))
    m.queries_s[...] = (queries * beta_j).astype(dtype)
    m.keys_s[...] = (keys * beta_j).astype(dtype)
    plgpu.commit_smem()
    plgpu.barrier_arrive(m.pairs_ready)

    halves = range(plan.halves)
    pairs = queries * t.products([(m.q_s[half], m.k_s[half].T) for half in halves], SQUARE)
    pairs += keys * t.products([(m.k_s[half], m.k_s[half].T) for half in halves], SQUARE)
    dbeta = pairs.sum(axis=0)
    pairs = jnp.where(i > j, pairs * beta_j, 0.0)
    return dbeta, pairs.sum(axis=1), pairs.sum(axis=0)


def _of_queries(m: Any, turn: Any, place: Any, *, plan: _Plan) -> None:
    """E, F, Q, M, then dq, dg and dbeta."""
    b, n, h = place
    shape = (CHUNK, plan.tile.columns)

    def multiply(slot, sums):
        do, r, dv, state = m.do_s.at[slot], m.r_s.at[slot], m.dv_s.at[slot], m.states_s.at[slot]
        return t.accumulate(sums, [[(do, state)], [(do, r.T)], [(dv, r.T)]][: len(sums)])

    along = t.row_zeros()
    for half in range(plan.halves):
        squares = () if half else (t.zeros(SQUARE), t.zeros(SQUARE))
        first = (turn * plan.halves + half) * plan.blocks
        read, *between = _blocks(m, plan, first, (t.zeros(shape), *squares), multiply)
        if half == 0:
            plgpu.barrier_wait(m.inputs_full)
            dbeta, from_row, from_column = _pairs(m, plan, turn, *between)
        read *= t.along_rows(plgpu.load(m.factors_row.at[t.READ_Q], layout=ROWS), shape)
        q = plgpu.load(m.q_s[half], layout=WGMMA).astype(jnp.float32)
        from_row += (q * read).sum(axis=1)
        dq = t.product(m.queries_s, m.k_s[half], shape, read)
        along += (q * dq).sum(axis=1)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the results before these have left the buffers
        if half < plan.halves - 1:
            m.dq_s[...] = dq.astype(m.dq_s.dtype)
    m.column[...] = from_row
    _write(m, plan, "q", dq, along, plgpu.load(m.factors_row.at[t.NORM_Q], layout=ROWS), place)

    plgpu.barrier_wait(m.handed)
    i, j = t.indices(turn)
    later = plgpu.load(m.column, layout=COLUMNS) - from_column + plgpu.load(m.hand.at[DREAD], layout=COLUMNS)
    before = plgpu.load(m.hand.at[BETA_WRITTEN], layout=COLUMNS)
    always = plgpu.load(m.hand.at[DCARRY], layout=COLUMNS)
    dg = jnp.where(j >= i, t.along_columns(later), t.along_columns(before)) + t.along_columns(always)
    m.dg_s[...] = dg.sum(axis=1)
    m.dbeta_s[...] = dbeta + plgpu.load(m.hand.at[WRITTEN], layout=COLUMNS)
    plgpu.commit_smem()
    plgpu.barrier_arrive(m.hand_read)
    plgpu.barrier_arrive(m.inputs_used)
    plgpu.copy_smem_to_gmem(m.dg_s, m.dg.at[b, h, n])
    plgpu.copy_smem_to_gmem(m.dbeta_s, m.dbeta.at[b, h, n])


def _of_keys(m: Any, turn: Any, place: Any, *, plan: _Plan) -> None:
    """dk, and the gradients of what multiplies the states."""
    shape = (CHUNK, plan.tile.columns)

    def multiply(slot, sums):
        r, dv, state, dstate = m.r_s.at[slot], m.dv_s.at[slot], m.states_s.at[slot], m.dstates_s.at[slot]
        parts = [pl.ds(part * CHUNK, CHUNK) for part in range(plan.tile.columns // CHUNK)]
        # The sum of state times dstate is what stands on the diagonal of the last product.
        inner = [(state.at[:, part].T, dstate.at[:, part]) for part in parts]
        return t.accumulate(sums, [[(dv, state)], [(r, dstate)], inner])

    dread = along = t.row_zeros()
    inner = t.zeros(SQUARE)
    for half in range(plan.halves):
        first = (turn * plan.halves + half) * plan.blocks
        read, write, inner = _blocks(m, plan, first, (t.zeros(shape), t.zeros(shape), inner), multiply)
        if half == 0:
            plgpu.barrier_wait(m.inputs_full)
            factors = [plgpu.load(m.factors_row.at[x], layout=ROWS) for x in range(t.FACTORS - 1)]
        k = plgpu.load(m.k_s[half], layout=WGMMA).astype(jnp.float32)
        dread += (k * read).sum(axis=1)
        if half == plan.halves - 1:
            written = functools.reduce(
                jnp.add, [plgpu.load(m.written_s.at[x], layout=ROWS) for x in range(m.written_s.shape[0])]
            )
            pl.when(turn > 0)(lambda: plgpu.barrier_wait(m.hand_read))
            m.hand.at[DREAD][...] = dread * -factors[t.READ_K]
            m.hand.at[WRITTEN][...] = written * factors[t.WRITE_UNWEIGHTED]
            m.hand.at[BETA_WRITTEN][...] = written * factors[t.WRITE]
            i, j = t.indices(turn)
            m.hand.at[DCARRY][...] = jnp.where(i == j, inner, 0.0).sum(axis=1) * factors[t.CARRY]
            plgpu.commit_smem()
            plgpu.barrier_arrive(m.handed)
        dk = write * t.along_rows(factors[t.WRITE], shape) - read * t.along_rows(factors[t.READ_K], shape)
        if half == 0:
            plgpu.barrier_wait(m.pairs_ready)
        q_s, k_s = m.q_s[half], m.k_s[half]
        dk = t.products([(m.queries_s.T, q_s), (m.keys_s, k_s), (m.keys_s.T, k_s)], shape, dk)
        along += (k * dk).sum(axis=1)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        if half < plan.halves - 1:
            m.dk_s[...] = dk.astype(m.dk_s.dtype)
    _write(m, plan, "k", dk, along, factors[t.NORM_K], place)
    plgpu.barrier_arrive(m.pairs_read)
    plgpu.barrier_arrive(m.inputs_used)


def _bring(m: Any, turn: Any, place: Any, *, plan: _Plan) -> None:
    """A chunk's blocks of values, and after the first half's the rest of its inputs, each when its buffer is free."""
    for half in range(plan.halves):
        _bring_blocks(m, plan, (turn * plan.halves + half) * plan.blocks, half, place)
        if half == 0:
            _bring_rows(m, plan, turn, place)


def _bring_blocks(m: Any, plan: _Plan, first: Any, half: int, place: Any) -> None:
    b, n, h = place
    rows, keys = pl.ds(n * CHUNK, CHUNK), pl.ds(half * plan.tile.columns, plan.tile.columns)
    for block in range(plan.blocks):
        step = first + block
        slot = jax.lax.rem(step, jnp.int32(plan.tile.stages))
        columns = pl.ds(block * plan.tile.values, plan.tile.values)
        pl.when(step >= plan.tile.stages)(functools.partial(plgpu.barrier_wait, m.used.at[slot]))
        full = m.full.at[slot]
        plgpu.copy_gmem_to_smem(m.do.at[b, rows, h, columns], m.do_s.at[slot], full)
        plgpu.copy_gmem_to_smem(m.r.at[b, rows, h, columns], m.r_s.at[slot], full)
        plgpu.copy_gmem_to_smem(m.dv.at[b, rows, h, columns], m.dv_s.at[slot], full)
        plgpu.copy_gmem_to_smem(m.states.at[b, h, n, columns, keys], m.states_s.at[slot], full)
        plgpu.copy_gmem_to_smem(m.dstates.at[b, h, n, columns, keys], m.dstates_s.at[slot], full)


def _bring_rows(m: Any, plan: _Plan, turn: Any, place: Any) -> None:
    b, n, h = place
    hk, rows = jax.lax.div(h, jnp.int32(plan.group)), pl.ds(n * CHUNK, CHUNK)
    pl.when(turn > 0)(lambda: plgpu.barrier_wait(m.inputs_used))
    plgpu.copy_gmem_to_smem(m.gates.at[b, h, n], m.by_row, m.inputs_full)
    plgpu.copy_gmem_to_smem(m.gates.at[b, h, n], m.by_column, m.inputs_full)
    plgpu.copy_gmem_to_smem(m.factors.at[b, h, n], m.factors_row, m.inputs_full)
    plgpu.copy_gmem_to_smem(m.factors.at[b, h, n], m.factors_column, m.inputs_full)
    plgpu.copy_gmem_to_smem(m.written.at[b, h, n], m.written_s, m.inputs_full)
    for half in range(plan.halves):
        columns = pl.ds(half * plan.tile.columns, plan.tile.columns)
        plgpu.copy_gmem_to_smem(m.q.at[b, rows, hk, columns], m.q_s[half], m.inputs_full)
        plgpu.copy_gmem_to_smem(m.k.at[b, rows, hk, columns], m.k_s[half], m.inputs_full)


def _body(m: Any, *, chunks: int, heads: int, items: int, plan: _Plan) -> None:
    program, warpgroup = jax.lax.axis_index("program"), jax.lax.axis_index("warpgroup")
    programs = min(items, t.PROGRAMS)
    turns = jax.lax.div(items - program + programs - 1, jnp.int32(programs))

    def every_chunk(work: Any) -> None:
        @pl.loop(0, turns)
        def _(turn):
            row, n = (f(program + turn * programs, jnp.int32(chunks)) for f in (jax.lax.div, jax.lax.rem))
            b, h = (f(row, jnp.int32(heads)) for f in (jax.lax.div, jax.lax.rem))
            work(m, turn, (b, n, h))

    @pl.when(warpgroup == 0)
    def _():
        plgpu.set_max_registers(232, action="increase")
        every_chunk(functools.partial(_of_queries, plan=plan))
        plgpu.barrier_wait(m.pairs_read)
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == 1)
    def _():
        plgpu.set_max_registers(232, action="increase")
        every_chunk(functools.partial(_of_keys, plan=plan))
        plgpu.barrier_wait(m.hand_read)
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == 2)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        every_chunk(functools.partial(_bring, plan=plan))
        stages = plan.tile.stages
        for last in range(stages):
            step = turns * plan.halves * plan.blocks - 1 - last
            slot = jax.lax.rem(step + stages, jnp.int32(stages))
            pl.when(step >= 0)(functools.partial(plgpu.barrier_wait, m.used.at[slot]))
        plgpu.barrier_wait(m.inputs_used)

    plgpu.barrier_arrive(m.end)
    plgpu.barrier_wait(m.end)


def scratch(size: int, value_size: int, dtype: Any, out_dtype: Any) -> dict[str, Any]:
    tile = tile_for(size)
    halves = size // tile.columns
    vector = plgpu.SMEM((CHUNK,), jnp.float32)
    gates, factors = plgpu.SMEM((t.GATES, CHUNK), jnp.float32), plgpu.SMEM((t.FACTORS, CHUNK), jnp.float32)
    values = t.buffer((tile.stages, CHUNK, tile.values), dtype)
    states = t.buffer((tile.stages, tile.values, tile.columns), dtype, width=tile.values)
    half, pairs = t.buffer((CHUNK, tile.columns), dtype), t.buffer(SQUARE, dtype)
    out = {"dq_s": half, "dk_s": half} if halves > 1 or jnp.dtype(out_dtype).itemsize == 2 else {}
    return {
        "q_s": (half,) * halves, "k_s": (half,) * halves, "do_s": values, "dv_s": values, "r_s": values,
        "states_s": states, "dstates_s": states, "queries_s": pairs, "keys_s": pairs, **out,
        "by_row": gates, "by_column": gates, "factors_row": factors, "factors_column": factors,
        "written_s": plgpu.SMEM((value_size // t.BLOCK_V, CHUNK), jnp.float32),
        "hand": plgpu.SMEM((4, CHUNK), jnp.float32), "column": vector, "dg_s": vector, "dbeta_s": vector,
        "full": plgpu.Barrier(num_arrivals=5, num_barriers=tile.stages),
        "used": plgpu.Barrier(num_arrivals=2, num_barriers=tile.stages),
        "inputs_full": plgpu.Barrier(num_arrivals=5 + 2 * halves),
        "inputs_used": plgpu.Barrier(num_arrivals=2), "pairs_read": plgpu.Barrier(), "hand_read": plgpu.Barrier(),
        "pairs_ready": plgpu.Barrier(), "handed": plgpu.Barrier(), "end": plgpu.Barrier(num_arrivals=3),
    }  # fmt: skip


def gradients_within(
    q: jax.Array,
    k: jax.Array,
    gates: jax.Array,
    factors: jax.Array,
    r: jax.Array,
    do: jax.Array,
    dv: jax.Array,
    states: jax.Array,
    dstates: jax.Array,
    written: jax.Array,
    *,
    scale: float,
    runs: bool,
    normalize: bool = True,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(dq, dk [B,T,H,N] of each value head, dg, dbeta [B,T,H] float32); T whole chunks."""
    B, T, K, N = k.shape
    H, V = r.shape[2:]
    chunks, tile = T // CHUNK, tile_for(N)
    items = B * H * chunks
    plan = _Plan(tile, N // tile.columns, V // tile.values, H // K, scale, runs, normalize)
    per_head = jax.ShapeDtypeStruct((B, T, H, N), k.dtype if H == K else jnp.float32)
    per_token = jax.ShapeDtypeStruct((B, H, chunks, CHUNK), jnp.float32)
    results = t.launch(
        "gated_delta_rule_gradients",
        lambda m: _body(m, chunks=chunks, heads=H, items=items, plan=plan),
        inputs={
            "q": q, "k": k, "gates": gates, "factors": factors, "r": r, "do": do, "dv": dv,
            "states": states, "dstates": dstates, "written": written,
        },
        outputs={"dq": per_head, "dk": per_head, "dg": per_token, "dbeta": per_token},
        scratch=scratch(N, V, k.dtype, per_head.dtype),
        grid={"program": min(items, t.PROGRAMS)},
        warpgroups=3,
    )  # fmt: skip
    dg, dbeta = (jnp.moveaxis(results[x].reshape(B, H, T), 1, 2) for x in ("dg", "dbeta"))
    return results["dq"], results["dk"], dg, dbeta
