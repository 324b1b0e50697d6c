"""The reverse scan of the gated delta rule's backward pass (Pallas, Mosaic GPU).

With the forward pass's A, P, factors, r and state S before the chunk, D the gradient of the state after it, and dy that
of y = v - read_k k S (which is dv):

    w  = P^T do + write k D
    dy = A^T w
    D <- carry D + (read_q q)^T do - (read_k k)^T dy

A program has 64 columns of the values and carries D transposed, [64,N], as ``pallas_scan`` does S; what remains can be
computed for every chunk at once (``pallas_gradients``).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.gated_delta_rule import pallas_tiles as t
from pallas_kernels.gated_delta_rule.pallas_scan import bring_all, reads_published
from pallas_kernels.gated_delta_rule.pallas_tiles import BLOCK_V, CHUNK, COLUMNS, SQUARE, WGMMA


def stages_for(head_size: int) -> int:
    """Chunks of inputs in shared memory."""
    return {64: 4, 128: 3, 256: 2}[head_size]


def copies_for(head_size: int) -> int:
    """Chunks of outputs in shared memory."""
    return 1 if head_size == 256 else 2


def _bring(m: Any, place: Any, chunks: int, step: Any, slot: Any) -> None:
    """A chunk's inputs, the last chunk first."""
    b, h, hk, columns = place
    n = chunks - 1 - step
    rows, full = pl.ds(n * CHUNK, CHUNK), m.full.at[slot]
    plgpu.copy_gmem_to_smem(m.k.at[b, rows, hk], m.k_s.at[slot], full)
    plgpu.copy_gmem_to_smem(m.do.at[b, rows, h, columns], m.do_s.at[slot], full)
    plgpu.copy_gmem_to_smem(m.scores.at[b, h, n], m.scores_s.at[slot], full)
    plgpu.copy_gmem_to_smem(m.factors.at[b, h, n], m.factors_s.at[slot], full)
    plgpu.copy_gmem_to_smem(m.inverse.at[b, h, n], m.inverse_s.at[slot], full)
    plgpu.copy_gmem_to_smem(m.q.at[b, rows, hk], m.q_s.at[slot], full)


def _carry_gradient(m: Any, *, chunks: int, stages: int, place: Any, dtype: Any) -> None:
    """The warpgroup that carries the gradient of the state."""
    b, h, columns = place[0], place[1], place[3]
    size = m.k_s.shape[-1]
    shape, tokens, copies = (BLOCK_V, size), (BLOCK_V, CHUNK), copies_for(size)
    room_state, room = getattr(m, "spare_state", None), getattr(m, "spare", None)

    def retreat(step, dstate):
        n, slot, half = chunks - 1 - step, jax.lax.rem(step, jnp.int32(stages)), jax.lax.rem(step, jnp.int32(copies))
        low = dstate.astype(dtype)
        plgpu.barrier_wait(m.full.at[slot])
        q, k, do, inverse = m.q_s.at[slot], m.k_s.at[slot], m.do_s.at[slot], m.inverse_s.at[slot]

        def publish_gradient():
            if m.dstates is not None:
                plgpu.wait_smem_to_gmem(copies - 1, wait_read_only=True)
            m.dstates_s.at[half][...] = low

        def load_rows():
            if not reads_published(size) and m.dstates is not None:
                publish_gradient()
            rows = (plgpu.load(m.factors_s.at[slot, x], layout=COLUMNS) for x in (t.READ_K, t.READ_Q, t.WRITE))
            return plgpu.load(do.T, layout=WGMMA), *rows, m.factors_s[slot, t.CARRY, 0]

        if reads_published(size):
            publish_gradient()
            plgpu.commit_smem()
            low = m.dstates_s.at[half]
        w, (read, read_k, read_q, write, carry) = t.product(low, k.T, tokens, room=room_state, meanwhile=load_rows)
        w = t.product(do.T, m.scores_s.at[slot], tokens, w * t.along_columns(write, tokens))
        # Two summands each: the inverse's columns can add many almost cancelling w, and without decay all stays.
        high, rest = t.split(w, dtype)
        read = (read.astype(jnp.float32) * t.along_columns(read_q, tokens)).astype(dtype)
        dy = t.products([(high, inverse), (rest, inverse)], tokens, room=room)
        erased = t.split(dy * t.along_columns(-read_k, tokens), dtype)

        def publish_dy():
            m.dv_s.at[half].T[...] = dy.astype(dtype)
            plgpu.commit_smem()
            rows = pl.ds(n * CHUNK, CHUNK)
            plgpu.copy_smem_to_gmem(m.dv_s.at[half], m.dv.at[b, rows, h, columns], commit_group=False)
            plgpu.copy_smem_to_gmem(m.dstates_s.at[half], m.dstates.at[b, h, n, columns], commit_group=False)
            plgpu.commit_smem_to_gmem_group()

        meanwhile = None if m.dv is None else publish_dy
        pairs = [(read, q), *((x, k) for x in erased)]
        dstate = t.products(pairs, shape, dstate * carry, room=room, meanwhile=meanwhile)
        plgpu.barrier_arrive(m.used.at[slot])
        return dstate

    dstate = t.zeros(shape)
    if m.dfinal is not None:
        dstate = plgpu.load(m.dfinal.at[b, h, columns], layout=WGMMA, optimized=False)
    m.dinitial[b, h, columns] = jax.lax.fori_loop(0, chunks, retreat, dstate)
    plgpu.wait_smem_to_gmem(0)


def _body(m: Any, *, chunks: int, stages: int, group: int, dtype: Any) -> None:
    b, h, block = (jax.lax.axis_index(name) for name in ("b", "h", "block"))
    place = (b, h, jax.lax.div(h, jnp.int32(group)), pl.ds(block * BLOCK_V, BLOCK_V))
    warpgroup = jax.lax.axis_index("warpgroup")

    @pl.when(warpgroup == 0)
    def _():
        plgpu.set_max_registers(240, action="increase")
        _carry_gradient(m, chunks=chunks, stages=stages, place=place, dtype=dtype)

    @pl.when(warpgroup == 1)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        bring_all(m, functools.partial(_bring, m, place, chunks), chunks=chunks, stages=stages)

    plgpu.barrier_arrive(m.end)
    plgpu.barrier_wait(m.end)


def scratch(head_size: int, dtype: Any) -> dict[str, Any]:
    N, stages, copies = head_size, stages_for(head_size), copies_for(head_size)
    return {
        "q_s": t.buffer((stages, CHUNK, N), dtype),
        "k_s": t.buffer((stages, CHUNK, N), dtype),
        "do_s": t.buffer((stages, CHUNK, BLOCK_V), dtype),
        "inverse_s": t.buffer((stages, *SQUARE), dtype),
        "scores_s": t.buffer((stages, *SQUARE), dtype),
        "factors_s": plgpu.SMEM((stages, t.FACTORS, CHUNK), jnp.float32),
        "dstates_s": t.buffer((copies, BLOCK_V, N), dtype),
        "dv_s": t.buffer((copies, CHUNK, BLOCK_V), dtype),
        "full": plgpu.Barrier(num_arrivals=6, num_barriers=stages),
        "used": plgpu.Barrier(num_barriers=stages),
        "end": plgpu.Barrier(num_arrivals=2),
        **t.spare((BLOCK_V, CHUNK), dtype),
        **t.spare((BLOCK_V, N), dtype, "spare_state"),
    }


def scan_back(
    q: jax.Array,
    k: jax.Array,
    do: jax.Array,
    inverse: jax.Array,
    scores: jax.Array,
    factors: jax.Array,
    dfinal: jax.Array | None,
    *,
    ends: bool = False,
) -> tuple[Any, Any, jax.Array]:
    """(gradient of the state after each chunk [B,H,chunks,V,N], dv [B,T,H,V], of the state before all [B,H,V,N]).

    Gradients of states are transposed; ``dfinal`` [B,H,V,N] is the last one's, None for zeros. With ``ends`` only the
    last result is wanted, and the others are None.
    """
    B, T, K, N = k.shape
    H, V = do.shape[2:]
    chunks, stages, dtype = T // CHUNK, stages_for(N), k.dtype
    results = t.launch(
        "gated_delta_rule_scan_back",
        lambda m: _body(m, chunks=chunks, stages=stages, group=H // K, dtype=dtype),
        inputs={
            "q": q, "k": k, "do": do, "inverse": inverse, "scores": scores, "factors": factors,
            "dfinal": dfinal,
        },
        outputs={
            "dstates": None if ends else jax.ShapeDtypeStruct((B, H, chunks, V, N), dtype),
            "dv": None if ends else jax.ShapeDtypeStruct(do.shape, dtype),
            "dinitial": jax.ShapeDtypeStruct((B, H, V, N), jnp.float32),
        },
        scratch=scratch(N, dtype),
        grid={"b": B, "h": H, "block": V // BLOCK_V},
        warpgroups=2,
    )  # fmt: skip
    return results.get("dstates"), results.get("dv"), results["dinitial"]
