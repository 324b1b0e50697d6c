"""The scan over the chunks of one head (Pallas, Mosaic GPU): what does each warpgroup do with a chunk?

With A, P and the factors of every chunk from ``pallas_within`` and the state S before the chunk:

    r    = A (v - read_k k S)                 (u = beta r)
    o    = read_q q S + P r
    S   <- carry S + (write k)^T r

A program has 64 columns of the values. Its first warpgroup carries S transposed, [64,N] in registers, so that every
intermediate result is the left operand of the next product and needs no way through shared memory; it publishes S and
r, from which the second warpgroup forms the outputs a chunk behind; the third brings the inputs by TMA.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.gated_delta_rule import pallas_tiles as t
from pallas_kernels.gated_delta_rule.pallas_tiles import BLOCK_V, CHUNK, COLUMNS, ROWS, SQUARE, WGMMA


def stages_for(head_size: int) -> int:
    """Chunks of inputs in shared memory, at least 2: an output leaves from its chunk's buffer during the next chunk."""
    return {64: 4, 128: 3, 256: 2}[head_size]


def reads_published(head_size: int) -> bool:
    """Whether the products with a state read its copy in shared memory."""
    return head_size == 256


def _slot(step: Any, count: int) -> Any:
    return jax.lax.rem(step, jnp.int32(count))


def bring_all(
    m: Any,
    bring: Callable[[Any, Any], None],
    *,
    chunks: int,
    stages: int,
    after: Callable[[Any], None] = lambda step: None,
) -> None:
    """``bring(step, slot)`` for every chunk, each when its slot is free; then waits until all have been used.

    ``after(step)`` is called when the inputs of a chunk have been used.
    """
    for step in range(min(stages, chunks)):
        bring(step, step)

    @pl.loop(stages, chunks)
    def _(step):
        slot = _slot(step, stages)
        plgpu.barrier_wait(m.used.at[slot])
        after(step - stages)
        bring(step, slot)

    for step in range(max(chunks - stages, 0), chunks):
        plgpu.barrier_wait(m.used.at[step % stages])
        after(step)


def _bring(m: Any, place: Any, n: Any, slot: Any) -> None:
    b, h, hk, columns = place
    rows, full = pl.ds(n * CHUNK, CHUNK), m.full.at[slot]
    plgpu.copy_gmem_to_smem(m.k.at[b, rows, hk], m.k_s.at[slot], full)
    plgpu.copy_gmem_to_smem(m.v.at[b, rows, h, columns], m.v_s.at[slot], full)
    plgpu.copy_gmem_to_smem(m.inverse.at[b, h, n], m.inverse_s.at[slot], full)
    plgpu.copy_gmem_to_smem(m.factors.at[b, h, n, pl.ds(0, 4)], m.by_column.at[slot], full)
    plgpu.copy_gmem_to_smem(m.factors.at[b, h, n, t.READ_Q], m.by_row.at[slot], full)
    plgpu.copy_gmem_to_smem(m.q.at[b, rows, hk], m.q_s.at[slot], full)
    plgpu.copy_gmem_to_smem(m.scores.at[b, h, n], m.scores_s.at[slot], full)


def advance(
    m: Any,
    slot: Any,
    v_s: Any,
    state: jax.Array,
    *,
    dtype: Any,
    value_weight: Any = None,
    publish_state: Callable[[jax.Array], Any] | None = None,
    publish_r: Callable[[jax.Array], None] | None = None,
) -> jax.Array:
    """The state after a chunk from that before it: three products, each of which needs the one before.

    The state and r are given away while products run. ``value_weight`` is a number by which the values count. A state
    of 256 columns takes too many registers to be an operand: the first product reads the copy that ``publish_state``
    returns.
    """
    k, inverse = m.k_s.at[slot], m.inverse_s.at[slot]
    shape, tokens = (state.shape[0], state.shape[1]), (BLOCK_V, CHUNK)
    room_state, room = getattr(m, "spare_state", None), getattr(m, "spare", None)
    low = state.astype(dtype)
    if reads_published(shape[1]):
        assert publish_state is not None
        low, publish_state = publish_state(low), None

    def during_first():
        if publish_state is not None:
            publish_state(low)
        read, write = (plgpu.load(m.by_column.at[slot, x], layout=COLUMNS) for x in (t.READ_K, t.WRITE))
        return plgpu.load(v_s.T, layout=WGMMA), read, write, m.by_column[slot, t.CARRY, 0]

    seen, (v, read, write, carry) = t.product(low, k.T, tokens, room=room_state, meanwhile=during_first)
    v = v.astype(jnp.float32)
    if value_weight is not None:
        v *= value_weight
    y = v - seen * t.along_columns(read, tokens)
    # Two summands each: the inverse's rows can add many almost cancelling y, and without decay all writes stay.
    high, rest = t.split(y, dtype)
    r = t.products([(high, inverse.T), (rest, inverse.T)], tokens, room=room)
    written = t.split(r * t.along_columns(write, tokens), dtype)
    meanwhile = None if publish_r is None else functools.partial(publish_r, r)
    return t.products([(x, k) for x in written], shape, state * carry, room=room, meanwhile=meanwhile)


def _carry_state(m: Any, *, chunks: int, stages: int, place: Any, dtype: Any) -> None:
    """The warpgroup that carries the state."""
    b, h, columns = place[0], place[1], place[3]
    state = t.zeros((BLOCK_V, m.k_s.shape[-1]))
    if m.initial is not None:
        state = plgpu.load(m.initial.at[b, h, columns], layout=WGMMA, optimized=False)

    def chunk(n, state):
        slot = _slot(n, stages)

        def publish_state(low):
            m.states_s[...] = low
            plgpu.commit_smem()
            plgpu.barrier_arrive(m.state_ready)
            return m.states_s

        def publish_r(r):
            pl.when(n > 0)(lambda: plgpu.barrier_wait(m.r_read))
            # In two summands for o, whose scores can add many almost cancelling r; the second replaces the values.
            m.r_s.T[...], m.v_s.at[slot].T[...] = t.split(r, dtype)
            plgpu.commit_smem()
            plgpu.barrier_arrive(m.r_ready)

        pl.when(n > 0)(lambda: plgpu.barrier_wait(m.state_read))
        plgpu.barrier_wait(m.full.at[slot])
        state = advance(m, slot, m.v_s.at[slot], state, dtype=dtype, publish_state=publish_state, publish_r=publish_r)
        plgpu.barrier_arrive(m.used.at[slot])
        return state

    state = jax.lax.fori_loop(0, chunks, chunk, state)
    plgpu.barrier_wait(m.state_read)
    plgpu.barrier_wait(m.r_read)
    m.final[b, h, columns] = state


def _form_outputs(m: Any, *, chunks: int, stages: int, place: Any, dtype: Any) -> None:
    """The warpgroup that forms o from the published state and r, and writes all of them."""
    b, h, columns = place[0], place[1], place[3]
    shape = (CHUNK, BLOCK_V)

    @pl.loop(0, chunks)
    def _(n):
        slot, rows = _slot(n, stages), pl.ds(n * CHUNK, CHUNK)
        plgpu.barrier_wait(m.full.at[slot])
        read = plgpu.load(m.by_row.at[slot], layout=ROWS)
        plgpu.barrier_wait(m.state_ready)
        if m.states is not None:
            plgpu.copy_smem_to_gmem(m.states_s, m.states.at[b, h, n, columns])
        o = t.product(m.q_s.at[slot], m.states_s.T, shape) * t.along_rows(read, shape)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the state's buffer, and that of the o before
        plgpu.barrier_arrive(m.state_read)
        pl.when(n > 0)(lambda: plgpu.barrier_arrive(m.used.at[_slot(n - 1, stages)]))
        plgpu.barrier_wait(m.r_ready)
        if m.r is not None:
            plgpu.copy_smem_to_gmem(m.r_s, m.r.at[b, rows, h, columns])
        if m.rest is not None:
            plgpu.copy_smem_to_gmem(m.v_s.at[slot], m.rest.at[b, rows, h, columns])
        scores = m.scores_s.at[slot]
        o = t.products([(scores, m.r_s), (scores, m.v_s.at[slot])], shape, o)
        scores[...] = o.astype(dtype)  # no longer needed
        plgpu.commit_smem()
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(m.r_read)
        plgpu.copy_smem_to_gmem(scores, m.o.at[b, rows, h, columns])

    plgpu.wait_smem_to_gmem(0)
    plgpu.barrier_arrive(m.used.at[(chunks - 1) % stages])


def _body(m: Any, *, chunks: int, stages: int, group: int, dtype: Any) -> None:
    b, h, block = (jax.lax.axis_index(name) for name in ("b", "h", "block"))
    place = (b, h, jax.lax.div(h, jnp.int32(group)), pl.ds(block * BLOCK_V, BLOCK_V))
    warpgroup = jax.lax.axis_index("warpgroup")

    @pl.when(warpgroup == 0)
    def _():
        plgpu.set_max_registers(232, action="increase")
        _carry_state(m, chunks=chunks, stages=stages, place=place, dtype=dtype)

    @pl.when(warpgroup == 1)
    def _():
        plgpu.set_max_registers(232, action="increase")
        _form_outputs(m, chunks=chunks, stages=stages, place=place, dtype=dtype)

    @pl.when(warpgroup == 2)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        bring_all(m, functools.partial(_bring, m, place), chunks=chunks, stages=stages)

    # A warpgroup that ends while another still multiplies has made programs fail.
    plgpu.barrier_arrive(m.end)
    plgpu.barrier_wait(m.end)


def scratch(head_size: int, dtype: Any) -> dict[str, Any]:
    N, stages = head_size, stages_for(head_size)
    return {
        "q_s": t.buffer((stages, CHUNK, N), dtype),
        "k_s": t.buffer((stages, CHUNK, N), dtype),
        "v_s": t.buffer((stages, CHUNK, BLOCK_V), dtype),
        "inverse_s": t.buffer((stages, *SQUARE), dtype),
        "scores_s": t.buffer((stages, *SQUARE), dtype),
        "by_row": plgpu.SMEM((stages, CHUNK), jnp.float32),
        "by_column": plgpu.SMEM((stages, 4, CHUNK), jnp.float32),
        "states_s": t.buffer((BLOCK_V, N), dtype),
        "r_s": t.buffer((CHUNK, BLOCK_V), dtype),
        "full": plgpu.Barrier(num_arrivals=7, num_barriers=stages),
        "used": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "state_ready": plgpu.Barrier(),
        "state_read": plgpu.Barrier(),
        "r_ready": plgpu.Barrier(),
        "r_read": plgpu.Barrier(),
        "end": plgpu.Barrier(num_arrivals=3),
        **t.spare((BLOCK_V, CHUNK), dtype),
        **t.spare((BLOCK_V, N), dtype, "spare_state"),
    }


def scan_chunks(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    inverse: jax.Array,
    scores: jax.Array,
    factors: jax.Array,
    initial: jax.Array | None,
    *,
    save_r: bool,
    save_states: bool,
) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None, jax.Array | None]:
    """(o [B,T,H,V] in the dtype of v, final state [B,H,V,N] float32, r, its rest, states); T whole chunks.

    With ``save_r`` there is r, like o; with ``save_states`` the state before each chunk, [B,H,chunks,V,N] in the dtype
    of v, and the rest of r, like it: what its dtype leaves of it, a second summand. Else they are None. All states are
    transposed, ``initial`` too (None for zeros).
    """
    B, T, K, N = k.shape
    H, V = v.shape[2:]
    chunks, stages, dtype = T // CHUNK, stages_for(N), v.dtype
    by_value = jax.ShapeDtypeStruct(v.shape, dtype)
    results = t.launch(
        "gated_delta_rule_scan",
        lambda m: _body(m, chunks=chunks, stages=stages, group=H // K, dtype=dtype),
        inputs={
            "q": q, "k": k, "v": v, "inverse": inverse, "scores": scores, "factors": factors,
            "initial": initial,
        },
        outputs={
            "o": by_value,
            "r": by_value if save_r else None,
            "rest": by_value if save_states else None,
            "final": jax.ShapeDtypeStruct((B, H, V, N), jnp.float32),
            "states": jax.ShapeDtypeStruct((B, H, chunks, V, N), dtype) if save_states else None,
        },
        scratch=scratch(N, dtype),
        grid={"b": B, "h": H, "block": V // BLOCK_V},
        warpgroups=3,
    )  # fmt: skip
    return results["o"], results["final"], results.get("r"), results.get("rest"), results.get("states")
