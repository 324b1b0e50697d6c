"""Window attention in triton.language: one decode step that also takes the new token into ring and store.

The two launches of a step, with the cache written in place. The first one only reads, and attends over the cache as it
will be: without the slots that are about to be overwritten, with the new token, and with the one that moves from the
ring into the store. The second one joins, and then writes: a launch of its own, because the programs of one launch
cannot know whether another one has read a slot yet.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.tiles import ceil_div, power_of_2
from pallas_kernels.triton_call import jit, tl, triton_call
from pallas_kernels.window_attention.api import DecodeCache, UpdateCase
from pallas_kernels.window_attention.triton_step import (
    attend_one,
    attend_slots,
    join,
    leave,
    share_shapes,
    sizes_of,
    tiles_of,
)
from pallas_kernels.window_attention.triton_tiles import block, load_rows


@jit
def _outgoing_score(ring_score_of_slot, position, R: tl.constexpr, SINKS: tl.constexpr):
    """The score with which the token that leaves the ring goes to the store: inf for sinks, -inf if no candidate."""
    score = tl.load(ring_score_of_slot)
    score = tl.where(score > 0, score, float("-inf"))
    return tl.where(position - R < SINKS, float("inf"), score)


@jit
def _update_part_kernel(
    q, new_k, new_v, length, active, layer, ring_k, ring_v, ring_score, store_k, store_v, store_position, store_score,
    sums, maxima, denominators, targets, B: tl.constexpr, R: tl.constexpr, M: tl.constexpr, SINKS: tl.constexpr,
    ACTIVE: tl.constexpr, M_BLOCK: tl.constexpr, STRETCH: tl.constexpr, H: tl.constexpr, K: tl.constexpr,
    N: tl.constexpr, V: tl.constexpr, SCALE: tl.constexpr, KEYS: tl.constexpr, G_BLOCK: tl.constexpr,
    N_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    row = tl.program_id(1)
    b = row // K
    h = row % K
    cache_row = (tl.load(layer) * B + b).to(tl.int64)
    PARTS_0: tl.constexpr = (R + STRETCH - 1) // STRETCH
    G: tl.constexpr = H // K
    g = tl.arange(0, G_BLOCK)
    n = tl.arange(0, N_BLOCK)
    n_v = tl.arange(0, V_BLOCK)
    q_tile = load_rows(q + (b * H + h * G) * N, g, N, g < G, N, N_BLOCK, True)
    position = tl.load(length + b)
    real = True
    if ACTIVE:
        real = tl.load(active + b) != 0
    slot = position % R
    ring_k_head = ring_k + (cache_row * R * K + h) * N
    ring_v_head = ring_v + (cache_row * R * K + h) * V
    if part < PARTS_0:
        acc, m, l = attend_slots(
            q_tile, ring_k_head, ring_v_head, length, part * STRETCH, tl.minimum(position, R),
            tl.where(real, slot, -1), STRETCH, K, N, V, SCALE, KEYS, G_BLOCK, N_BLOCK, V_BLOCK, False, STAGES,
            PRECISION,
        )  # fmt: skip
        if part == 0:
            k = tl.load(new_k + row * N + n, mask=n < N, other=0.0)
            v = tl.load(new_v + row * V + n_v, mask=n_v < V, other=0.0)
            acc, m, l = attend_one(q_tile, k, v, real, acc, m, l, SCALE)
    else:
        s = tl.arange(0, M_BLOCK)
        at = (cache_row * M + s) * K + h
        score = tl.load(store_score + at, mask=s < M, other=float("inf"))
        place = tl.load(store_position + at, mask=s < M, other=-1)
        filled = tl.sum((place >= 0).to(tl.int32), 0)
        lowest = tl.min(score, 0)
        # Among equal scores the latest position goes first; among empty slots (all -1) the first slot is taken.
        place = tl.where((score == lowest) & (s < M), place, -2)
        target = tl.min(tl.where(place == tl.max(place, 0), s, M_BLOCK), 0)
        enters = real & (position >= R)
        enters = enters & (_outgoing_score(ring_score + (cache_row * R + slot) * K + h, position, R, SINKS) > lowest)
        target = tl.where(enters, target, -1)
        acc, m, l = attend_slots(
            q_tile, store_k + (cache_row * M * K + h) * N, store_v + (cache_row * M * K + h) * V, length,
            (part - PARTS_0) * STRETCH, filled, target, STRETCH, K, N, V, SCALE, KEYS, G_BLOCK, N_BLOCK, V_BLOCK,
            False, STAGES, PRECISION,
        )  # fmt: skip
        if part == PARTS_0:
            tl.store(targets + row, target)
            k = tl.load(ring_k_head + slot * K * N + n, mask=n < N, other=0.0)
            v = tl.load(ring_v_head + slot * K * V + n_v, mask=n_v < V, other=0.0)
            acc, m, l = attend_one(q_tile, k, v, enters, acc, m, l, SCALE)
    leave(sums, maxima, denominators, row * tl.num_programs(0) + part, acc, m, l, G, V, G_BLOCK, V_BLOCK)


@jit
def _update_join_kernel(
    sums, maxima, denominators, targets, new_k, new_v, new_score, length, active, layer,
    _ring_k, _ring_v, _ring_score, _store_k, _store_v, _store_position, _store_score,
    o, ring_k, ring_v, ring_score, store_k, store_v, store_position, store_score,
    B: tl.constexpr, R: tl.constexpr, M: tl.constexpr, SINKS: tl.constexpr, REACH: tl.constexpr, ACTIVE: tl.constexpr,
    PARTS: tl.constexpr, G: tl.constexpr, K: tl.constexpr, N: tl.constexpr, V: tl.constexpr,
    PARTS_BLOCK: tl.constexpr, N_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr,
):  # fmt: skip
    # The cache is written in place: the pointers that begin with _ are those of the outputs.
    row = tl.program_id(0)
    join(sums, maxima, denominators, o, row, PARTS, G, V, PARTS_BLOCK, V_BLOCK)
    b = row // K
    h = row % K
    cache_row = (tl.load(layer) * B + b).to(tl.int64)
    n = tl.arange(0, N_BLOCK)
    n_v = tl.arange(0, V_BLOCK)
    position = tl.load(length + b)
    real = True
    if ACTIVE:
        real = tl.load(active + b) != 0
    slot = position % R
    in_ring = (cache_row * R + slot) * K + h
    target = tl.load(targets + row)
    # Every thread reads what it overwrites before it does so: loads and stores of one address lie in one thread.
    if target >= 0:
        in_store = (cache_row * M + target) * K + h
        k = tl.load(ring_k + in_ring * N + n, mask=n < N)
        v = tl.load(ring_v + in_ring * V + n_v, mask=n_v < V)
        tl.store(store_k + in_store * N + n, k, mask=n < N)
        tl.store(store_v + in_store * V + n_v, v, mask=n_v < V)
        tl.store(store_position + in_store, position - R)
        tl.store(store_score + in_store, _outgoing_score(ring_score + in_ring, position, R, SINKS))
    if real:
        k = tl.load(new_k + row * N + n, mask=n < N)
        v = tl.load(new_v + row * V + n_v, mask=n_v < V)
        tl.store(ring_k + in_ring * N + n, k, mask=n < N)
        tl.store(ring_v + in_ring * V + n_v, v, mask=n_v < V)
        if REACH > 0:
            tl.store(ring_score + in_ring, 0.0)
        if position >= REACH:
            scored = (cache_row * R + (position - REACH) % R) * K + h
            tl.store(ring_score + scored, tl.load(new_score + row))


def update_step(
    case: UpdateCase,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    score: jax.Array,
    cache: DecodeCache,
    length: jax.Array,
    active: jax.Array | None,
    layer: jax.Array,
) -> tuple[jax.Array, DecodeCache]:
    """(o [B,H,V], the cache, written in place): see ``api.window_attention_update_step``."""
    tiles, stretch = tiles_of(case)
    parts = sum(ceil_div(count, stretch) for count in case.slots)
    flags = None if active is None else active.astype(jnp.int8)
    layer = layer.reshape(1)
    update: dict[str, Any] = {
        "B": case.B,
        "R": case.slots[0],
        "M": case.slots[1],
        "SINKS": case.sinks,
        "ACTIVE": active is not None,
    }
    sizes: dict[str, Any] = sizes_of(case, tiles, stretch)
    *shares, targets = triton_call(
        _update_part_kernel,
        q,
        k,
        v,
        length,
        flags,
        layer,
        *cache,
        out_shape=(*share_shapes(case, parts), jax.ShapeDtypeStruct((case.B, case.K), jnp.int32)),
        grid=(parts, case.B * case.K),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        M_BLOCK=block(case.slots[1]),
        **update,
        **sizes,
    )
    arguments = (*shares, targets, k, v, score, length, flags, layer)
    o, *written = triton_call(
        _update_join_kernel,
        *arguments,
        *cache,
        out_shape=(
            jax.ShapeDtypeStruct((case.B, case.H, case.V), q.dtype),
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in cache),
        ),
        input_output_aliases={len(arguments) + n: 1 + n for n in range(len(cache))},
        grid=(case.B * case.K,),
        num_warps=4,
        REACH=case.reach,
        PARTS=parts,
        G=case.H // case.K,
        PARTS_BLOCK=power_of_2(parts),
        **update,
        **{name: sizes[name] for name in ("K", "N", "V", "N_BLOCK", "V_BLOCK")},
    )
    return o, DecodeCache(*written)
