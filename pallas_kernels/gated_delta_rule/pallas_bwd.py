"""The reverse scan of the gated delta rule's backward pass (Pallas, Mosaic GPU).

With the forward pass's A, P, factors, r and state S before the chunk, D the gradient of the state after it, and dy that
of y = v - read_k k S (which is dv):

    w  = P^T do + write k D
    dy = A^T w
    D <- carry D + (read_q q)^T do - (read_k k)^T dy

A program has 64 columns of the values. Its first warpgroup carries D transposed, [64,N], as ``pallas_scan`` does S, and
publishes it in two summands. From these the second one forms r.(k D) of each token, a part of dbeta and dg, with both
summands of r that the forward scan kept: where few tokens survive their decays it is nearly all of them, and 8 bits of
either factor are too few. What remains can be computed for every chunk at once (``pallas_gradients``).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.gated_delta_rule import pallas_tiles as t
from pallas_kernels.gated_delta_rule.pallas_scan import bring_all
from pallas_kernels.gated_delta_rule.pallas_tiles import BLOCK_V, CHUNK, COLUMNS, SQUARE, WGMMA


def stages_for(head_size: int) -> int:
    """Chunks of inputs in shared memory."""
    return {64: 4, 128: 3, 256: 2}[head_size]


def queries_for(head_size: int) -> int:
    """Chunks of q in shared memory. They are wanted last, so that one may come while its chunk is worked on."""
    return 1 if head_size == 256 else stages_for(head_size)


def _bring(m: Any, place: Any, chunks: int, step: Any, slot: Any) -> None:
    """A chunk's inputs, the last chunk first."""
    b, h, hk, columns = place
    n = chunks - 1 - step
    rows, full = pl.ds(n * CHUNK, CHUNK), m.full.at[slot]
    plgpu.copy_gmem_to_smem(m.k.at[b, rows, hk], m.k_s.at[slot], full)
    plgpu.copy_gmem_to_smem(m.do.at[b, rows, h, columns], m.do_s.at[slot], full)
    plgpu.copy_gmem_to_smem(m.scores.at[b, h, n], m.scores_s.at[slot], full)
    plgpu.copy_gmem_to_smem(m.factors.at[b, h, n, pl.ds(0, 4)], m.factors_s.at[slot], full)
    plgpu.copy_gmem_to_smem(m.inverse.at[b, h, n], m.inverse_s.at[slot], full)
    if m.q_s.shape[0] > 1:
        plgpu.copy_gmem_to_smem(m.q.at[b, rows, hk], m.q_s.at[slot], full)


def _bring_singles(m: Any, place: Any, chunks: int, step: Any) -> None:
    """The inputs that have one buffer for all chunks, if there is such a chunk."""
    b, h, hk, columns = place

    @pl.when(step < chunks)
    def _():
        rows = pl.ds((chunks - 1 - step) * CHUNK, CHUNK)
        if m.r is not None:
            plgpu.copy_gmem_to_smem(m.r.at[b, rows, h, columns], m.r_s, m.r_full)
            plgpu.copy_gmem_to_smem(m.rest.at[b, rows, h, columns], m.r_rest_s, m.r_full)
        if m.q_s.shape[0] == 1:
            plgpu.copy_gmem_to_smem(m.q.at[b, rows, hk], m.q_s.at[0], m.q_full)


def _carry_gradient(m: Any, *, chunks: int, stages: int, place: Any, dtype: Any) -> None:
    """The warpgroup that carries the gradient of the state."""
    b, h, columns = place[0], place[1], place[3]
    size, queries = m.k_s.shape[-1], m.q_s.shape[0]
    shape, tokens = (BLOCK_V, size), (BLOCK_V, CHUNK)
    room = getattr(m, "spare", None)

    def retreat(step, dstate):
        n, slot = chunks - 1 - step, jax.lax.rem(step, jnp.int32(stages))
        plgpu.barrier_wait(m.full.at[slot])
        k, do, inverse = m.k_s.at[slot], m.do_s.at[slot], m.inverse_s.at[slot]
        q = m.q_s.at[t.zero_of(step) if queries == 1 else slot]

        if m.r is not None:
            pl.when(step > 0)(lambda: plgpu.barrier_wait(m.gradient_read))
        # In two summands here too: dbeta is a difference of sums with this product and with that of ``_weigh_writes``.
        # In parts of the keys, each published while it is multiplied: all at once are too many for the registers.
        seen = t.zeros(tokens)
        for first in range(0, size, CHUNK):
            part = slice(first, first + CHUNK)
            summands = t.split(dstate[:, part], dtype)

            def publish(part=part, summands=summands):
                m.dstates_s.at[:, part][...], m.rest_s.at[:, part][...] = summands

            pairs = [(x, k.at[:, part].T) for x in summands]
            seen = t.products(pairs, tokens, seen, room=room, meanwhile=None if m.r is None else publish)
        if m.r is not None:
            plgpu.commit_smem()
            plgpu.barrier_arrive(m.gradient_ready)
        write = plgpu.load(m.factors_s.at[slot, t.WRITE], layout=COLUMNS)
        w = t.product(do.T, m.scores_s.at[slot], tokens, seen * t.along_columns(write, tokens))
        # Two summands each: the inverse's columns can add many almost cancelling w, and without decay all stays.
        high, rest = t.split(w, dtype)
        dy = t.products([(high, inverse), (rest, inverse)], tokens, room=room)
        read_k, read_q = (plgpu.load(m.factors_s.at[slot, x], layout=COLUMNS) for x in (t.READ_K, t.READ_Q))
        erased = t.split(dy * t.along_columns(-read_k, tokens), dtype)
        read = (plgpu.load(do.T, layout=WGMMA).astype(jnp.float32) * t.along_columns(read_q, tokens)).astype(dtype)

        def publish_dy():
            do.T[...] = dy.astype(dtype)  # no longer needed
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(do, m.dv.at[b, pl.ds(n * CHUNK, CHUNK), h, columns])

        if queries == 1:
            plgpu.barrier_wait(m.q_full)
        pairs = [(read, q), *((x, k) for x in erased)]
        meanwhile = None if m.dv is None else publish_dy
        dstate = t.products(pairs, shape, dstate * m.factors_s[slot, t.CARRY, 0], room=room, meanwhile=meanwhile)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(m.used.at[slot])
        return dstate

    dstate = t.zeros(shape)
    if m.dfinal is not None:
        dstate = plgpu.load(m.dfinal.at[b, h, columns], layout=WGMMA, optimized=False)
    m.dinitial[b, h, columns] = jax.lax.fori_loop(0, chunks, retreat, dstate)
    if m.r is not None:
        plgpu.barrier_wait(m.gradient_read)
    plgpu.wait_smem_to_gmem(0)


def _weigh_writes(m: Any, *, chunks: int, stages: int, place: Any) -> None:
    """The warpgroup that forms r.(k D) from what is published of D, and writes both."""
    b, h, columns = place[0], place[1], place[3]

    @pl.loop(0, chunks)
    def _(step):
        n, slot = chunks - 1 - step, jax.lax.rem(step, jnp.int32(stages))
        plgpu.barrier_wait(m.full.at[slot])
        plgpu.barrier_wait(m.gradient_ready)
        plgpu.copy_smem_to_gmem(m.dstates_s, m.dstates.at[b, h, n, columns])
        k = m.k_s.at[slot]
        seen = t.products([(k, m.dstates_s.T), (k, m.rest_s.T)], (CHUNK, BLOCK_V))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(m.gradient_read)
        plgpu.barrier_wait(m.r_full)
        high, rest = (plgpu.load(x, layout=WGMMA).astype(jnp.float32) for x in (m.r_s, m.r_rest_s))
        seen *= high + rest
        plgpu.commit_smem()  # what was read here is written next by a copy
        plgpu.barrier_arrive(m.used.at[slot])
        m.written[b, h, n, jax.lax.axis_index("block")] = seen.sum(axis=1)

    plgpu.wait_smem_to_gmem(0)


def _body(m: Any, *, chunks: int, stages: int, group: int, dtype: Any) -> None:
    b, h, block = (jax.lax.axis_index(name) for name in ("b", "h", "block"))
    place = (b, h, jax.lax.div(h, jnp.int32(group)), pl.ds(block * BLOCK_V, BLOCK_V))
    warpgroup = jax.lax.axis_index("warpgroup")

    @pl.when(warpgroup == 0)
    def _():
        plgpu.set_max_registers(248, action="increase")
        _carry_gradient(m, chunks=chunks, stages=stages, place=place, dtype=dtype)

    @pl.when(warpgroup == 1)
    def _():
        plgpu.set_max_registers(160, action="decrease")
        if m.r is not None:
            _weigh_writes(m, chunks=chunks, stages=stages, place=place)

    @pl.when(warpgroup == 2)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        _bring_singles(m, place, chunks, 0)
        bring, singles = (functools.partial(f, m, place, chunks) for f in (_bring, _bring_singles))
        bring_all(m, bring, chunks=chunks, stages=stages, after=lambda step: singles(step + 1))

    plgpu.barrier_arrive(m.end)
    plgpu.barrier_wait(m.end)


def scratch(head_size: int, dtype: Any, ends: bool = False) -> dict[str, Any]:
    N, stages, queries = head_size, stages_for(head_size), queries_for(head_size)
    return {
        "q_s": t.buffer((queries, CHUNK, N), dtype),
        "k_s": t.buffer((stages, CHUNK, N), dtype),
        "do_s": t.buffer((stages, CHUNK, BLOCK_V), dtype),
        "inverse_s": t.buffer((stages, *SQUARE), dtype),
        "scores_s": t.buffer((stages, *SQUARE), dtype),
        "factors_s": plgpu.SMEM((stages, 4, CHUNK), jnp.float32),
        "r_s": t.buffer((CHUNK, BLOCK_V), dtype),
        "r_rest_s": t.buffer((CHUNK, BLOCK_V), dtype),
        "dstates_s": t.buffer((BLOCK_V, N), dtype),
        "rest_s": t.buffer((BLOCK_V, N), dtype),
        "full": plgpu.Barrier(num_arrivals=5 if queries == 1 else 6, num_barriers=stages),
        "used": plgpu.Barrier(num_arrivals=1 if ends else 2, num_barriers=stages),
        "q_full": plgpu.Barrier(),
        "r_full": plgpu.Barrier(num_arrivals=2),
        "gradient_ready": plgpu.Barrier(),
        "gradient_read": plgpu.Barrier(),
        "end": plgpu.Barrier(num_arrivals=3),
        **t.spare((BLOCK_V, CHUNK), dtype),
    }


def scan_back(
    q: jax.Array,
    k: jax.Array,
    r: jax.Array | None,
    rest: jax.Array | None,
    do: jax.Array,
    inverse: jax.Array,
    scores: jax.Array,
    factors: jax.Array,
    dfinal: jax.Array | None,
) -> tuple[Any, Any, Any, jax.Array]:
    """(gradient D of the state after each chunk [B,H,chunks,V,N], dv [B,T,H,V], r.(k D), of the state before all).

    Gradients of states are transposed; ``dfinal`` [B,H,V,N] is the last one's, None for zeros. r.(k D) is in parts of
    64 values each, [B,H,chunks,V/64,64] float32. Without ``r`` and its rest only the last result, [B,H,V,N], is wanted,
    and the others are None.
    """
    B, T, K, N = k.shape
    H, V = do.shape[2:]
    chunks, stages, dtype, ends = T // CHUNK, stages_for(N), k.dtype, r is None
    parts = (B, H, chunks, V // BLOCK_V, CHUNK)
    results = t.launch(
        "gated_delta_rule_scan_back",
        lambda m: _body(m, chunks=chunks, stages=stages, group=H // K, dtype=dtype),
        inputs={
            "q": q, "k": k, "r": r, "rest": rest, "do": do, "inverse": inverse, "scores": scores,
            "factors": factors, "dfinal": dfinal,
        },
        outputs={
            "dstates": None if ends else jax.ShapeDtypeStruct((B, H, chunks, V, N), dtype),
            "dv": None if ends else jax.ShapeDtypeStruct(do.shape, dtype),
            "written": None if ends else jax.ShapeDtypeStruct(parts, jnp.float32),
            "dinitial": jax.ShapeDtypeStruct((B, H, V, N), jnp.float32),
        },
        scratch=scratch(N, dtype, ends),
        grid={"b": B, "h": H, "block": V // BLOCK_V},
        warpgroups=3,
        reduction_bytes=0,
    )  # fmt: skip
    return results.get("dstates"), results.get("dv"), results.get("written"), results["dinitial"]
