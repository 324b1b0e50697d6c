"""The parts of a split over segments (``segments``) that are not the scans themselves (Pallas, Mosaic GPU).

``segment_ends`` scans every segment from zeros, and from the rows of the identity without values; ``join`` passes the
states on. A row here is one segment of a sequence: the first dimension is B times segments.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.gated_delta_rule import pallas_tiles as t
from pallas_kernels.gated_delta_rule.pallas_scan import advance, bring_all, reads_published
from pallas_kernels.gated_delta_rule.pallas_tiles import BLOCK_V, CHUNK, SQUARE, WGMMA
from pallas_kernels.tiles import ceil_div

STAGES = 2
CARRIERS = 2  # warpgroups that carry 64 rows of a state each, with the same keys


def _ends_body(m: Any, *, chunks: int, group: int, value_blocks: int, dtype: Any) -> None:
    b, h, pair = (jax.lax.axis_index(name) for name in ("b", "h", "pair"))
    warpgroup = jax.lax.axis_index("warpgroup")

    @pl.when(warpgroup < CARRIERS)
    def _():
        plgpu.set_max_registers(232, action="increase")
        block = pair * CARRIERS + warpgroup
        shape = (BLOCK_V, m.k_s.shape[-1])
        mine = {name: getattr(m, name).at[warpgroup] for name in vars(m) if name.startswith(("spare", "states"))}
        own = types.SimpleNamespace(**{**vars(m), **mine})
        has_values = jnp.where(block < value_blocks, 1.0, 0.0)
        identity = t.index(0, shape) + (block - value_blocks) * BLOCK_V == t.index(1, shape)

        def publish(low):
            own.states_s[...] = low
            plgpu.commit_smem()
            return own.states_s

        publish_state = publish if reads_published(shape[1]) else None

        def chunk(n, state):
            slot = jax.lax.rem(n, jnp.int32(STAGES))
            plgpu.barrier_wait(m.full.at[slot])
            v_s = m.v_s.at[slot, warpgroup]
            state = advance(own, slot, v_s, state, dtype=dtype, value_weight=has_values, publish_state=publish_state)
            plgpu.barrier_arrive(m.used.at[slot])
            return state

        state = jax.lax.fori_loop(0, chunks, chunk, jnp.where(identity, 1.0, 0.0))
        m.ends[b, h, pl.ds(block * BLOCK_V, BLOCK_V)] = state

    @pl.when(warpgroup == CARRIERS)
    def _():
        plgpu.set_max_registers(40, action="decrease")

        def bring(n, slot):
            rows, full = pl.ds(n * CHUNK, CHUNK), m.full.at[slot]
            plgpu.copy_gmem_to_smem(m.k.at[b, rows, jax.lax.div(h, jnp.int32(group))], m.k_s.at[slot], full)
            plgpu.copy_gmem_to_smem(m.inverse.at[b, h, n], m.inverse_s.at[slot], full)
            plgpu.copy_gmem_to_smem(m.factors.at[b, h, n, pl.ds(0, 4)], m.by_column.at[slot], full)
            for carrier in range(CARRIERS):
                block = jnp.minimum(pair * CARRIERS + carrier, value_blocks - 1)
                columns = pl.ds(block * BLOCK_V, BLOCK_V)
                plgpu.copy_gmem_to_smem(m.v.at[b, rows, h, columns], m.v_s.at[slot, carrier], full)

        bring_all(m, bring, chunks=chunks, stages=STAGES)

    plgpu.barrier_arrive(m.end)
    plgpu.barrier_wait(m.end)


def segment_ends(k: jax.Array, v: jax.Array, inverse: jax.Array, factors: jax.Array) -> jax.Array:
    """[B,H,V+N,N] float32 of every row: its last state from zeros, transposed, and below it its transition."""
    B, T, K, N = k.shape
    H, V = v.shape[2:]
    pairs = ceil_div(V + N, CARRIERS * BLOCK_V)
    published = {"states_s": t.buffer((CARRIERS, BLOCK_V, N), k.dtype)} if reads_published(N) else {}
    results = t.launch(
        "gated_delta_rule_ends",
        functools.partial(_ends_body, chunks=T // CHUNK, group=H // K, value_blocks=V // BLOCK_V, dtype=v.dtype),
        inputs={"k": k, "v": v, "inverse": inverse, "factors": factors},
        outputs={"ends": jax.ShapeDtypeStruct((B, H, pairs * CARRIERS * BLOCK_V, N), jnp.float32)},
        scratch={
            "k_s": t.buffer((STAGES, CHUNK, N), k.dtype),
            "v_s": t.buffer((STAGES, CARRIERS, CHUNK, BLOCK_V), v.dtype),
            "inverse_s": t.buffer((STAGES, *SQUARE), k.dtype),
            "by_column": plgpu.SMEM((STAGES, 4, CHUNK), jnp.float32),
            "full": plgpu.Barrier(num_arrivals=3 + CARRIERS, num_barriers=STAGES),
            "used": plgpu.Barrier(num_arrivals=CARRIERS, num_barriers=STAGES),
            "end": plgpu.Barrier(num_arrivals=CARRIERS + 1),
            **published,
            **t.spare((CARRIERS, BLOCK_V, CHUNK), k.dtype),
            **t.spare((CARRIERS, BLOCK_V, N), k.dtype, "spare_state"),
        },
        grid={"b": B, "h": H, "pair": pairs},
        warpgroups=CARRIERS + 1,
    )
    return results["ends"]


def _join_body(m: Any, *, segments: int, backwards: bool) -> None:
    """One block of 64 values. The state is in shared memory in two summands; 64 rows of F^T or F come at a time."""
    b, h, block = (jax.lax.axis_index(name) for name in ("b", "h", "block"))
    rows = pl.ds(block * BLOCK_V, BLOCK_V)
    size = m.starts.shape[-1]
    parts, shape = size // CHUNK, (BLOCK_V, size)

    def segment_of(step):
        return b * segments + (segments - 1 - step if backwards else step)

    def pass_on(step, state):
        segment = segment_of(step)
        m.starts[segment, h, rows] = state
        m.high_s[...], m.low_s[...] = t.split(state, jnp.bfloat16)
        plgpu.commit_smem()
        state = plgpu.load(m.ends.at[segment, h, rows], layout=WGMMA, optimized=False)
        for part in range(parts):
            slot = jax.lax.rem(step * parts + part, jnp.int32(STAGES))
            columns = pl.ds(part * CHUNK, CHUNK)
            high, low = m.high_s.at[:, columns], m.low_s.at[:, columns]
            plgpu.barrier_wait(m.full.at[slot])
            f_high, f_low = (x.at[slot].T if backwards else x.at[slot] for x in (m.f_high_s, m.f_low_s))
            state = t.products([(low, f_high), (high, f_low), (high, f_high)], shape, state)
            plgpu.barrier_arrive(m.used.at[slot])
        return state

    warpgroup = jax.lax.axis_index("warpgroup")

    @pl.when(warpgroup == 0)
    def _():
        state = t.zeros(shape)
        if m.first is not None:
            state = plgpu.load(m.first.at[b, h, rows], layout=WGMMA, optimized=False)
        state = jax.lax.fori_loop(0, segments - 1, pass_on, state)
        m.starts[segment_of(segments - 1), h, rows] = state

    @pl.when(warpgroup == 1)
    def _():
        def bring(step, slot):
            segment = segment_of(jax.lax.div(step, jnp.int32(parts)))
            part = pl.ds(jax.lax.rem(step, jnp.int32(parts)) * CHUNK, CHUNK)
            tile = (slice(None), part) if backwards else (part, slice(None))
            for f, f_s in ((m.f_high, m.f_high_s), (m.f_low, m.f_low_s)):
                plgpu.copy_gmem_to_smem(f.at[segment, h, *tile], f_s.at[slot], m.full.at[slot])

        bring_all(m, bring, chunks=(segments - 1) * parts, stages=STAGES)

    plgpu.barrier_arrive(m.end)
    plgpu.barrier_wait(m.end)


def join(
    first: jax.Array | None, ends: jax.Array, transitions: jax.Array, segments: int, *, backwards: bool
) -> jax.Array:
    """The transposed state [B*segments,H,V,N] float32 that each segment starts from: before it, or backwards after it.

    Args:
      first: [B,H,V,N] float32, the state that the first segment (backwards: the last) starts from; None for zeros.
      ends: [B*segments,H,V or more,N] float32, of every segment from zeros.
      transitions: [B*segments,H,N,N] float32.
    """
    rows, H, N = transitions.shape[:3]
    V = ends.shape[2] if first is None else first.shape[2]
    f_high, f_low = t.split(transitions, jnp.bfloat16)
    tile = t.buffer((STAGES, N, CHUNK) if backwards else (STAGES, CHUNK, N), jnp.bfloat16)
    results = t.launch(
        "gated_delta_rule_join",
        functools.partial(_join_body, segments=segments, backwards=backwards),
        inputs={"first": first, "ends": ends, "f_high": f_high, "f_low": f_low},
        outputs={"starts": jax.ShapeDtypeStruct((rows, H, V, N), jnp.float32)},
        scratch={
            "high_s": t.buffer((BLOCK_V, N), jnp.bfloat16),
            "low_s": t.buffer((BLOCK_V, N), jnp.bfloat16),
            "f_high_s": tile,
            "f_low_s": tile,
            "full": plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            "used": plgpu.Barrier(num_barriers=STAGES),
            "end": plgpu.Barrier(num_arrivals=2),
        },
        grid={"b": rows // segments, "h": H, "block": V // BLOCK_V},
        warpgroups=2,
    )
    return results["starts"]
