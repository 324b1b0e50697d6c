"""Window attention in triton.language: one query per sequence over the slots of a cache, split over the keys.

A program takes a stretch of the slots of one KV head, with all the query heads that read it, and leaves its sum,
maximum and denominator; a second kernel joins the stretches. So a single sequence fills the GPU too. Rows of slots that
hold nothing are not read.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.arguments import Arguments
from pallas_kernels.tiles import ceil_div, power_of_2
from pallas_kernels.triton_call import LONGEST_AXIS, jit, tl, triton_call
from pallas_kernels.window_attention.api import StepCase, UpdateCase
from pallas_kernels.window_attention.cases import LOG2_E
from pallas_kernels.window_attention.triton_tiles import block, load_rows


@jit
def attend_slots(
    q, k_head, v_head, flags, first, end, skip, STRETCH: tl.constexpr, K: tl.constexpr, N: tl.constexpr,
    V: tl.constexpr, SCALE: tl.constexpr, KEYS: tl.constexpr, G_BLOCK: tl.constexpr, N_BLOCK: tl.constexpr,
    V_BLOCK: tl.constexpr, FLAGS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(acc [G_BLOCK,V_BLOCK], maximum, denominator) of the slots first .. first + STRETCH, below end, but for skip."""
    # One query head: every row of the tile is an online softmax of its own, joined after the loop, so that no step
    # needs a sum over rows. Several: products on the tensor cores, 16 rows at least.
    ROWS: tl.constexpr = KEYS if G_BLOCK == 1 else G_BLOCK
    acc = tl.zeros((ROWS, V_BLOCK), tl.float32)
    m = tl.full((ROWS,), -1e30, tl.float32)
    l = tl.zeros((ROWS,), tl.float32)
    for start in tl.range(first, tl.minimum(first + STRETCH, end), KEYS, num_stages=STAGES):
        s = start + tl.arange(0, KEYS)
        held = (s < end) & (s != skip)
        if FLAGS:
            held = held & (tl.load(flags + s * K, mask=held, other=0) != 0)
        keys = load_rows(k_head, s, K * N, held, N, N_BLOCK, True)
        values = load_rows(v_head, s, K * V, held, V, V_BLOCK, True)
        if G_BLOCK == 1:
            logits = tl.sum(keys.to(tl.float32) * q.to(tl.float32), 1) * SCALE
            logits = tl.where(held, logits, float("-inf"))
            m_new = tl.maximum(m, logits)
            p = tl.exp2(logits - m_new)
            fade = tl.exp2(m - m_new)
            l = l * fade + p
            acc = acc * fade[:, None] + p[:, None] * values.to(tl.float32)
        else:
            logits = tl.dot(q, tl.trans(keys.to(q.dtype)), input_precision=PRECISION)
            logits = tl.where(held[None, :], logits, float("-inf"))
            m_new = tl.maximum(m, tl.max(logits, 1) * SCALE)
            p = tl.exp2(logits * SCALE - m_new[:, None])
            fade = tl.exp2(m - m_new)
            l = l * fade + tl.sum(p, 1)
            acc = tl.dot(p.to(q.dtype), values.to(q.dtype), acc * fade[:, None], input_precision=PRECISION)
        m = m_new
    if G_BLOCK == 1:
        m_row = tl.max(m, 0)
        weight = tl.exp2(m - m_row)
        acc = tl.sum(acc * weight[:, None], 0)[None, :]
        l = tl.sum(l * weight, 0) + tl.zeros((1,), tl.float32)
        m = m_row + tl.zeros((1,), tl.float32)
    return acc, m, l


@jit
def attend_one(q, k, v, exists, acc, m, l, SCALE: tl.constexpr):
    """One more key k [N_BLOCK] with its value, if it exists."""
    logit = tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], 1) * SCALE
    logit = tl.where(exists, logit, float("-inf"))
    m_new = tl.maximum(m, logit)
    p = tl.exp2(logit - m_new)
    fade = tl.exp2(m - m_new)
    return acc * fade[:, None] + p[:, None] * v.to(tl.float32)[None, :], m_new, l * fade + p


@jit
def leave(sums, maxima, denominators, place, acc, m, l, G: tl.constexpr, V: tl.constexpr, G_BLOCK: tl.constexpr,
           V_BLOCK: tl.constexpr):  # fmt: skip
    """One stretch's share, for the join."""
    g = tl.arange(0, G_BLOCK)
    n = tl.arange(0, V_BLOCK)
    at = place * G + g
    tl.store(maxima + at, m, mask=g < G)
    tl.store(denominators + at, l, mask=g < G)
    tl.store(sums + at[:, None] * V + n[None, :], acc, mask=(g < G)[:, None] & (n < V)[None, :])


@jit
def _part_kernel(
    q, k_0, v_0, held_0, k_1, v_1, held_1, sums, maxima, denominators, S_0: tl.constexpr, S_1: tl.constexpr,
    FLAGS_0: tl.constexpr, FLAGS_1: tl.constexpr, STRETCH: tl.constexpr, H: tl.constexpr, K: tl.constexpr,
    N: tl.constexpr, V: tl.constexpr, SCALE: tl.constexpr, KEYS: tl.constexpr, G_BLOCK: tl.constexpr,
    N_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # ``held``: int8 flags [B,S,K], or int32 numbers of filled slots [B,K].
    part = tl.program_id(0)
    row = tl.program_id(1)
    b = (row // K).to(tl.int64)
    h = row % K
    PARTS_0: tl.constexpr = (S_0 + STRETCH - 1) // STRETCH
    G: tl.constexpr = H // K
    g = tl.arange(0, G_BLOCK)
    q_tile = load_rows(q + (b * H + h * G) * N, g, N, g < G, N, N_BLOCK, True)
    if part < PARTS_0:
        end = S_0
        if not FLAGS_0:
            end = tl.minimum(tl.load(held_0 + row), S_0)
        acc, m, l = attend_slots(
            q_tile, k_0 + (b * S_0 * K + h) * N, v_0 + (b * S_0 * K + h) * V, held_0 + b * S_0 * K + h,
            part * STRETCH, end, -1, STRETCH, K, N, V, SCALE, KEYS, G_BLOCK, N_BLOCK, V_BLOCK, FLAGS_0, STAGES,
            PRECISION,
        )  # fmt: skip
    else:
        end = S_1
        if not FLAGS_1:
            end = tl.minimum(tl.load(held_1 + row), S_1)
        acc, m, l = attend_slots(
            q_tile, k_1 + (b * S_1 * K + h) * N, v_1 + (b * S_1 * K + h) * V, held_1 + b * S_1 * K + h,
            (part - PARTS_0) * STRETCH, end, -1, STRETCH, K, N, V, SCALE, KEYS, G_BLOCK, N_BLOCK, V_BLOCK, FLAGS_1,
            STAGES, PRECISION,
        )  # fmt: skip
    leave(sums, maxima, denominators, row * tl.num_programs(0) + part, acc, m, l, G, V, G_BLOCK, V_BLOCK)


@jit
def join(sums, maxima, denominators, o, row, PARTS: tl.constexpr, G: tl.constexpr, V: tl.constexpr,
          PARTS_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr):  # fmt: skip
    """The output of the query heads of one KV head."""
    part = tl.arange(0, PARTS_BLOCK)
    n = tl.arange(0, V_BLOCK)
    mask = (part < PARTS)[:, None] & (n < V)[None, :]
    for g in range(G):
        place = (row * PARTS + part) * G + g
        m = tl.load(maxima + place, mask=part < PARTS, other=-1e30)
        weight = tl.exp2(m - tl.max(m, 0))
        l = tl.sum(weight * tl.load(denominators + place, mask=part < PARTS, other=0.0), 0)
        total = tl.sum(weight[:, None] * tl.load(sums + place[:, None] * V + n[None, :], mask=mask, other=0.0), 0)
        result = tl.where(l > 0, total / tl.where(l > 0, l, 1.0), 0.0)
        tl.store(o + (row * G + g) * V + n, result.to(o.dtype.element_ty), mask=n < V)


@jit
def _join_kernel(
    sums, maxima, denominators, o, PARTS: tl.constexpr, G: tl.constexpr, V: tl.constexpr, PARTS_BLOCK: tl.constexpr,
    V_BLOCK: tl.constexpr,
):  # fmt: skip
    join(sums, maxima, denominators, o, tl.program_id(0), PARTS, G, V, PARTS_BLOCK, V_BLOCK)


@dataclasses.dataclass(frozen=True)
class StepTiles:
    """Keys per tile, programs per launch to aim at, and launch options."""

    keys: int
    programs: int
    warps: int
    stages: int


# By whether one query head reads a KV head or several, measured on an H200.
STEP_TILES = {"one": StepTiles(32, 4096, 4, 3), "several": StepTiles(64, 2048, 4, 3)}


def step(
    case: StepCase,
    q: jax.Array,
    keys: tuple[jax.Array, ...],
    values: tuple[jax.Array, ...],
    valid: tuple[jax.Array, ...],
) -> jax.Array:
    """o [B,H,V]: see ``api.window_attention_step``. A launch takes two groups of slots; the last one joins all."""
    groups = list(zip(keys, values, valid, case.slots, case.lengths, strict=True))
    tiles, stretch = tiles_of(case)
    shares = []
    for pair in (groups[n : n + 2] for n in range(0, len(groups), 2)):
        parts = sum(ceil_div(slots, stretch) for *_, slots, _ in pair)
        # One group stands in for an absent second, which S_1 = 0 leaves unread: its pointers' types fit.
        arrays = [x for k, v, held, *_ in (pair * 2)[:2] for x in (k, v, _held(held))]
        shares.append(
            triton_call(
                _part_kernel,
                q,
                *arrays,
                out_shape=share_shapes(case, parts),
                grid=(parts, case.B * case.K),
                num_warps=tiles.warps,
                num_stages=tiles.stages,
                S_0=pair[0][3],
                S_1=pair[1][3] if len(pair) > 1 else 0,
                FLAGS_0=not pair[0][4],
                FLAGS_1=not pair[-1][4],
                **sizes_of(case, tiles, stretch),
            )
        )
    joined = shares[0] if len(shares) == 1 else [jnp.concatenate(x, axis=2) for x in zip(*shares, strict=True)]
    parts = joined[0].shape[2]
    return triton_call(
        _join_kernel,
        *joined,
        out_shape=jax.ShapeDtypeStruct((case.B, case.H, case.V), values[0].dtype),
        grid=(case.B * case.K,),
        num_warps=4,
        PARTS=parts,
        G=case.H // case.K,
        V=case.V,
        PARTS_BLOCK=power_of_2(parts),
        V_BLOCK=block(case.V),
    )


def tiles_of(case: StepCase | UpdateCase) -> tuple[StepTiles, int]:
    """The tiles of a step, and the slots per program: whole tiles, at most 64 parts."""
    tiles = STEP_TILES["one" if case.H == case.K else "several"]
    if max(case.N, case.V) > 128:
        tiles = dataclasses.replace(tiles, keys=32, stages=min(tiles.stages, 2))
    if case.dtype == "float32":
        tiles = dataclasses.replace(tiles, keys=min(tiles.keys, 32), stages=1)
    parts = max(1, min(64, tiles.programs // (case.B * case.K)))
    return tiles, tiles.keys * ceil_div(sum(case.slots), parts * tiles.keys)


def check_step(case: Any) -> None:
    """Raises UnsupportedCase where these kernels do not run the step."""
    require, group = Arguments("window_attention_step: triton").require, case.H // case.K
    require(group <= 128, f"{group} query heads per KV head; at most 128: use 'xla'")
    rows = case.B * case.K
    require(
        rows <= LONGEST_AXIS, f"B K = {rows}; a grid has at most {LONGEST_AXIS} of them: split the batch or use 'xla'"
    )
    numbers = max(case.slots) * case.K * max(case.N, case.V)
    require(numbers < 2**31, f"the slots of a row hold {numbers} numbers, which are counted in 32 bits: use 'xla'")


def _held(held: jax.Array) -> jax.Array:
    return held.astype(jnp.int8) if held.dtype == jnp.bool_ else held


def share_shapes(case: StepCase | UpdateCase, parts: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    shape = (case.B, case.K, parts, case.H // case.K)
    return tuple(jax.ShapeDtypeStruct(s, jnp.float32) for s in ((*shape, case.V), shape, shape))


def sizes_of(case: StepCase | UpdateCase, tiles: StepTiles, stretch: int) -> dict[str, Any]:
    G = case.H // case.K
    return {
        "STRETCH": stretch,
        "H": case.H,
        "K": case.K,
        "N": case.N,
        "V": case.V,
        "SCALE": case.scale * LOG2_E,
        "KEYS": tiles.keys,
        "G_BLOCK": 1 if G == 1 else block(G),
        "N_BLOCK": block(case.N),
        "V_BLOCK": block(case.V),
        "STAGES": tiles.stages,
        "PRECISION": "ieee" if case.dtype == "float32" else "tf32",
    }
