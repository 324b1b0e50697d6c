"""The gradients of one chunk, from the states at its ends (Pallas, Mosaic GPU).

With E = do r^T and F = dy r^T over pairs of tokens, and W_ij = exp(c_i - c_j) beta_j times the inverse norms and the
scale, so that raw q and k stand in all products:

    Q = W E (i >= j),  M = -W F (i > j)
    dq' = read_q do S^T + Q k
    dk' = -read_k dy S^T + write r D^T + Q^T q + (M + M^T) k

where dq' and dk' are the gradients of the normalised rows times their inverse norms: dq = dq' - q (q.dq') / |q|^2.
E_ij q_i.k_j and F_ij k_i.k_j without beta sum to dbeta by columns; with it they are the gradients of c_i - c_j, and
dg_t is their sum over the pairs i >= t > j.

Persistent programs take chunks in turn. One warpgroup forms E, F, Q, M and dq, another dk; both read the states 64
values at a time, for which a third brings the next chunk's while these two still work on what needs none of them.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.gated_delta_rule import pallas_tiles as t
from pallas_kernels.gated_delta_rule.pallas_tiles import BLOCK_V, CHUNK, COLUMNS, ROWS, SQUARE, WGMMA

STAGES = 2
PROGRAMS = 132  # one per multiprocessor of a Hopper GPU
# Of the vectors that the warpgroup of dk hands over.
DREAD, WRITTEN, BETA_WRITTEN, DCARRY = range(4)


def _undo_norm(x: jax.Array, dx: jax.Array, norm: jax.Array) -> jax.Array:
    """The gradient of raw rows x from that of the normalised rows times ``norm``, 1 / |x| per row."""
    along = (x * dx).sum(axis=1) * norm * norm
    return dx - x * t.along_rows(along, (x.shape[0], x.shape[1]))


def _write(x: jax.Array, buffer: Any, into: Any) -> None:
    """By way of a buffer, for which there is no room where the rows are float32."""
    if buffer is None:
        plgpu.commit_smem()  # what was read from the inputs' buffers is written next by a copy
        into[...] = x
    else:
        buffer[...] = x.astype(buffer.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(buffer, into)


def _blocks(m: Any, turn: Any, blocks: int, starts: tuple[Any, ...], multiply: Any) -> tuple[Any, ...]:
    """Sums over the blocks of values of this program's chunk ``turn``, accumulated by ``multiply(slot, sums)``."""

    def step(block, sums):
        slot = jax.lax.rem(turn * blocks + block, jnp.int32(STAGES))
        plgpu.barrier_wait(m.full.at[slot])
        sums = multiply(slot, sums)
        plgpu.commit_smem()  # what was read here is written next by a copy
        plgpu.barrier_arrive(m.used.at[slot])
        return sums

    return jax.lax.fori_loop(0, blocks, step, starts)


def _of_queries(m: Any, turn: Any, place: Any, *, blocks: int, scale: float, runs: bool, normalize: bool) -> None:
    """E, F, Q, M, then dq, dg and dbeta."""
    b, n, h = place
    dtype = m.q_s.dtype
    shape = m.q_s.shape
    i, j = t.index(0), t.index(1)

    def multiply(slot, sums):
        do, r, dv, state = m.do_s.at[slot], m.r_s.at[slot], m.dv_s.at[slot], m.states_s.at[slot]
        return t.accumulate(sums, [(do, r.T), (dv, r.T), (do, state)])

    queries, keys, read = _blocks(m, turn, blocks, (t.zeros(SQUARE), t.zeros(SQUARE), t.zeros(shape)), multiply)
    plgpu.barrier_wait(m.inputs_full)

    coarse, fine = (plgpu.load(m.by_row.at[x], layout=ROWS) for x in (t.COARSE, t.FINE))
    coarse_j, fine_j, beta_j = (plgpu.load(m.by_column.at[x], layout=COLUMNS) for x in (t.COARSE, t.FINE, t.BETA))
    apart = (t.along_rows(coarse) - t.along_columns(coarse_j)) + (t.along_rows(fine) - t.along_columns(fine_j))
    sees = i >= j
    if runs:
        run = plgpu.load(m.by_row.at[t.RUN], layout=ROWS)
        sees &= t.along_rows(run) == t.along_columns(plgpu.load(m.by_column.at[t.RUN], layout=COLUMNS))
    norm_k_j = plgpu.load(m.factors_column.at[t.NORM_K], layout=COLUMNS)
    decay = jnp.exp(jnp.where(sees, apart, -jnp.inf)) * t.along_columns(norm_k_j)
    norm_q, norm_k = (plgpu.load(m.factors_row.at[x], layout=ROWS) for x in (t.NORM_Q, t.NORM_K))
    beta_j = t.along_columns(beta_j)
    queries *= decay * t.along_rows(norm_q * scale)
    keys *= jnp.where(i > j, decay, 0.0) * t.along_rows(-norm_k)
    pl.when(turn > 0)(lambda: plgpu.barrier_wait(m.pairs_read))
    m.queries_s[...] = (queries * beta_j).astype(dtype)
    m.keys_s[...] = (keys * beta_j).astype(dtype)
    plgpu.commit_smem()
    plgpu.barrier_arrive(m.pairs_ready)

    pairs = queries * t.product(m.q_s, m.k_s.T, SQUARE) + keys * t.product(m.k_s, m.k_s.T, SQUARE)
    dbeta = pairs.sum(axis=0)
    pairs = jnp.where(i > j, pairs * beta_j, 0.0)
    from_column = pairs.sum(axis=0)

    read *= t.along_rows(plgpu.load(m.factors_row.at[t.READ_Q], layout=ROWS), shape)
    q = plgpu.load(m.q_s, layout=WGMMA).astype(jnp.float32)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the results before these have left the buffers
    m.column[...] = pairs.sum(axis=1) + (q * read).sum(axis=1)
    dq = t.product(m.queries_s, m.k_s, shape, read)
    if normalize:
        dq = _undo_norm(q, dq, norm_q)
    _write(dq, getattr(m, "dq_s", None), m.dq.at[b, pl.ds(n * CHUNK, CHUNK), h])

    plgpu.barrier_wait(m.handed)
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


def _of_keys(m: Any, turn: Any, place: Any, *, blocks: int, normalize: bool) -> None:
    """dk, and the gradients of what multiplies the states."""
    b, n, h = place
    shape = m.k_s.shape

    def multiply(slot, sums):
        r, dv, state, dstate = m.r_s.at[slot], m.dv_s.at[slot], m.states_s.at[slot], m.dstates_s.at[slot]
        *products, carried = sums
        products = t.accumulate(tuple(products), [(dv, state), (r, dstate)])
        for part in range(shape[1] // CHUNK):  # in parts for the registers' sake
            columns = pl.ds(part * CHUNK, CHUNK)
            both = [plgpu.load(x.at[:, columns], layout=WGMMA).astype(jnp.float32) for x in (state, dstate)]
            carried += (both[0] * both[1]).sum(axis=1)
        return *products, carried

    nothing = plgpu.layout_cast(jnp.zeros((CHUNK,), jnp.float32), ROWS)
    read, write, carried = _blocks(m, turn, blocks, (t.zeros(shape), t.zeros(shape), nothing), multiply)
    plgpu.barrier_wait(m.inputs_full)

    factors = [plgpu.load(m.factors_row.at[x], layout=ROWS) for x in range(t.FACTORS - 1)]
    k = plgpu.load(m.k_s, layout=WGMMA).astype(jnp.float32)
    dread = (k * read).sum(axis=1) * -factors[t.READ_K]
    written = (k * write).sum(axis=1)
    pl.when(turn > 0)(lambda: plgpu.barrier_wait(m.hand_read))
    m.hand.at[DREAD][...] = dread
    m.hand.at[WRITTEN][...] = written * factors[t.WRITE_UNWEIGHTED]
    m.hand.at[BETA_WRITTEN][...] = written * factors[t.WRITE]
    m.hand.at[DCARRY][...] = carried * factors[t.CARRY]
    plgpu.commit_smem()
    plgpu.barrier_arrive(m.handed)
    dk = write * t.along_rows(factors[t.WRITE], shape) - read * t.along_rows(factors[t.READ_K], shape)
    plgpu.barrier_wait(m.pairs_ready)
    dk = t.products([(m.queries_s.T, m.q_s), (m.keys_s, m.k_s), (m.keys_s.T, m.k_s)], shape, dk)
    if normalize:
        dk = _undo_norm(k, dk, factors[t.NORM_K])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    _write(dk, getattr(m, "dk_s", None), m.dk.at[b, pl.ds(n * CHUNK, CHUNK), h])
    plgpu.barrier_arrive(m.pairs_read)
    plgpu.barrier_arrive(m.inputs_used)


def _bring(m: Any, turn: Any, place: Any, *, blocks: int, group: int) -> None:
    """A chunk's blocks of values, then the rest of its inputs, each when its buffer is free."""
    b, n, h = place
    hk, rows = jax.lax.div(h, jnp.int32(group)), pl.ds(n * CHUNK, CHUNK)
    for block in range(blocks):
        step = turn * blocks + block
        slot, columns = jax.lax.rem(step, jnp.int32(STAGES)), pl.ds(block * BLOCK_V, BLOCK_V)
        pl.when(step >= STAGES)(functools.partial(plgpu.barrier_wait, m.used.at[slot]))
        full = m.full.at[slot]
        plgpu.copy_gmem_to_smem(m.do.at[b, rows, h, columns], m.do_s.at[slot], full)
        plgpu.copy_gmem_to_smem(m.r.at[b, rows, h, columns], m.r_s.at[slot], full)
        plgpu.copy_gmem_to_smem(m.dv.at[b, rows, h, columns], m.dv_s.at[slot], full)
        plgpu.copy_gmem_to_smem(m.states.at[b, h, n, columns], m.states_s.at[slot], full)
        plgpu.copy_gmem_to_smem(m.dstates.at[b, h, n, columns], m.dstates_s.at[slot], full)
    pl.when(turn > 0)(lambda: plgpu.barrier_wait(m.inputs_used))
    plgpu.copy_gmem_to_smem(m.gates.at[b, h, n], m.by_row, m.inputs_full)
    plgpu.copy_gmem_to_smem(m.gates.at[b, h, n], m.by_column, m.inputs_full)
    plgpu.copy_gmem_to_smem(m.factors.at[b, h, n], m.factors_row, m.inputs_full)
    plgpu.copy_gmem_to_smem(m.factors.at[b, h, n], m.factors_column, m.inputs_full)
    plgpu.copy_gmem_to_smem(m.q.at[b, rows, hk], m.q_s, m.inputs_full)
    plgpu.copy_gmem_to_smem(m.k.at[b, rows, hk], m.k_s, m.inputs_full)


def _body(
    m: Any, *, chunks: int, heads: int, items: int, blocks: int, group: int, scale: float, runs: bool, normalize: bool
) -> None:
    program, warpgroup = jax.lax.axis_index("program"), jax.lax.axis_index("warpgroup")
    programs = min(items, PROGRAMS)
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
        every_chunk(functools.partial(_of_queries, blocks=blocks, scale=scale, runs=runs, normalize=normalize))
        plgpu.barrier_wait(m.pairs_read)
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == 1)
    def _():
        plgpu.set_max_registers(232, action="increase")
        every_chunk(functools.partial(_of_keys, blocks=blocks, normalize=normalize))
        plgpu.barrier_wait(m.hand_read)
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == 2)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        every_chunk(functools.partial(_bring, blocks=blocks, group=group))
        for last in range(STAGES):
            step = turns * blocks - 1 - last
            slot = jax.lax.rem(step + STAGES, jnp.int32(STAGES))
            pl.when(step >= 0)(functools.partial(plgpu.barrier_wait, m.used.at[slot]))
        plgpu.barrier_wait(m.inputs_used)

    plgpu.barrier_arrive(m.end)
    plgpu.barrier_wait(m.end)


def scratch(size: int, dtype: Any, out_dtype: Any) -> dict[str, Any]:
    vector = plgpu.SMEM((CHUNK,), jnp.float32)
    gates, factors = plgpu.SMEM((t.GATES, CHUNK), jnp.float32), plgpu.SMEM((t.FACTORS, CHUNK), jnp.float32)
    values, states = t.buffer((STAGES, CHUNK, BLOCK_V), dtype), t.buffer((STAGES, BLOCK_V, size), dtype)
    rows, pairs = t.buffer((CHUNK, size), dtype), t.buffer(SQUARE, dtype)
    out = {"dq_s": rows, "dk_s": rows} if jnp.dtype(out_dtype).itemsize == 2 else {}
    return {
        "q_s": rows, "k_s": rows, "do_s": values, "dv_s": values, "r_s": values,
        "states_s": states, "dstates_s": states, "queries_s": pairs, "keys_s": pairs, **out,
        "by_row": gates, "by_column": gates, "factors_row": factors, "factors_column": factors,
        "hand": plgpu.SMEM((4, CHUNK), jnp.float32), "column": vector, "dg_s": vector, "dbeta_s": vector,
        "full": plgpu.Barrier(num_arrivals=5, num_barriers=STAGES),
        "used": plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        "inputs_full": plgpu.Barrier(num_arrivals=6),
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
    *,
    scale: float,
    runs: bool,
    normalize: bool = True,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(dq, dk [B,T,H,N] of each value head, dg, dbeta [B,T,H] float32); T whole chunks."""
    B, T, K, N = k.shape
    H, V = r.shape[2:]
    chunks = T // CHUNK
    items = B * H * chunks
    per_head = jax.ShapeDtypeStruct((B, T, H, N), k.dtype if H == K else jnp.float32)
    per_token = jax.ShapeDtypeStruct((B, H, chunks, CHUNK), jnp.float32)
    results = t.launch(
        "gated_delta_rule_gradients",
        lambda m: _body(
            m, chunks=chunks, heads=H, items=items, blocks=V // BLOCK_V, group=H // K, scale=scale, runs=runs,
            normalize=normalize,
        ),
        inputs={
            "q": q, "k": k, "gates": gates, "factors": factors, "r": r, "do": do, "dv": dv,
            "states": states, "dstates": dstates,
        },
        outputs={"dq": per_head, "dk": per_head, "dg": per_token, "dbeta": per_token},
        scratch=scratch(N, k.dtype, per_head.dtype),
        grid={"program": min(items, PROGRAMS)},
        warpgroups=3,
    )  # fmt: skip
    dg, dbeta = (jnp.moveaxis(results[x].reshape(B, H, T), 1, 2) for x in ("dg", "dbeta"))
    return results["dq"], results["dk"], dg, dbeta
