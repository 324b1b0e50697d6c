"""Window attention in triton.language: one query per sequence over the slots of a cache, split over the keys.

A program takes a stretch of the slots of one KV head, with all the query heads that read it, and leaves its sum,
maximum and denominator; a second kernel joins the stretches. So a single sequence fills the GPU too. Rows of slots that
hold nothing are not read.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import UnsupportedCase
from pallas_kernels.triton_call import jit, tl, triton_call
from pallas_kernels.window_attention.api import StepCase
from pallas_kernels.window_attention.triton_tiles import LOG2_E, block, load_rows


@jit
def _part_kernel(
    q, k_0, v_0, valid_0, k_1, v_1, valid_1, sums, maxima, denominators, S_0: tl.constexpr, S_1: tl.constexpr,
    STRETCH: tl.constexpr, H: tl.constexpr, K: tl.constexpr, N: tl.constexpr, V: tl.constexpr, SCALE: tl.constexpr,
    KEYS: tl.constexpr, G_BLOCK: tl.constexpr, N_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    row = tl.program_id(1)
    b = (row // K).to(tl.int64)
    h = row % K
    PARTS_0: tl.constexpr = (S_0 + STRETCH - 1) // STRETCH
    slots = tl.where(part < PARTS_0, S_0, S_1)
    first = tl.where(part < PARTS_0, part, part - PARTS_0) * STRETCH
    if part < PARTS_0:
        k, v, valid = k_0, v_0, valid_0
    else:
        k, v, valid = k_1, v_1, valid_1
    G: tl.constexpr = H // K
    g = tl.arange(0, G_BLOCK)
    q_tile = load_rows(q + (b * H + h * G) * N, g, N, g < G, N, N_BLOCK, True)
    k_head = k + b * slots * K * N + h * N
    v_head = v + b * slots * K * V + h * V
    acc = tl.zeros((G_BLOCK, V_BLOCK), tl.float32)
    m = tl.full((G_BLOCK,), -1e30, tl.float32)
    l = tl.zeros((G_BLOCK,), tl.float32)
    for start in range(first, tl.minimum(first + STRETCH, slots), KEYS):
        s = start + tl.arange(0, KEYS)
        held = tl.load(valid + (b * slots + s) * K + h, mask=s < slots, other=0) != 0
        keys = load_rows(k_head, s, K * N, held, N, N_BLOCK, True)
        values = load_rows(v_head, s, K * V, held, V, V_BLOCK, True)
        logits = tl.dot(q_tile, tl.trans(keys), input_precision=PRECISION)
        logits = tl.where(held[None, :], logits, float("-inf"))
        m_new = tl.maximum(m, tl.max(logits, 1) * SCALE)
        p = tl.exp2(logits * SCALE - m_new[:, None])
        fade = tl.exp2(m - m_new)
        l = l * fade + tl.sum(p, 1)
        acc = tl.dot(p.to(values.dtype), values, acc * fade[:, None], input_precision=PRECISION)
        m = m_new
    n = tl.arange(0, V_BLOCK)
    place = (row * tl.num_programs(0) + part) * G + g
    tl.store(maxima + place, m, mask=g < G)
    tl.store(denominators + place, l, mask=g < G)
    tl.store(sums + place[:, None] * V + n[None, :], acc, mask=(g < G)[:, None] & (n < V)[None, :])


@jit
def _join_kernel(
    sums, maxima, denominators, o, PARTS: tl.constexpr, G: tl.constexpr, V: tl.constexpr, PARTS_BLOCK: tl.constexpr,
    V_BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    part = tl.arange(0, PARTS_BLOCK)
    place = ((row // G) * PARTS + part) * G + row % G
    m = tl.load(maxima + place, mask=part < PARTS, other=-1e30)
    weight = tl.exp2(m - tl.max(m, 0))
    l = tl.sum(weight * tl.load(denominators + place, mask=part < PARTS, other=0.0), 0)
    n = tl.arange(0, V_BLOCK)
    mask = (part < PARTS)[:, None] & (n < V)[None, :]
    total = tl.sum(weight[:, None] * tl.load(sums + place[:, None] * V + n[None, :], mask=mask, other=0.0), 0)
    result = tl.where(l > 0, total / tl.where(l > 0, l, 1.0), 0.0)
    tl.store(o + row * V + n, result.to(o.dtype.element_ty), mask=n < V)


def step(
    case: StepCase,
    q: jax.Array,
    keys: tuple[jax.Array, ...],
    values: tuple[jax.Array, ...],
    valid: tuple[jax.Array, ...],
) -> jax.Array:
    """o [B,H,V]: see ``api.window_attention_step``."""
    slots = (*case.slots, 0)[:2]
    tile = 64 if max(case.N, case.V) <= 128 else 32
    stretch = stretch_of(case, tile)
    parts = sum(-(-count // stretch) for count in slots)
    G = case.H // case.K
    groups = [x for group in zip(keys, values, valid, strict=True) for x in group]
    shape = (case.B, case.K, parts, G)
    sums, maxima, denominators = triton_call(
        _part_kernel,
        q,
        *(groups * 2)[:6],  # one group stands in for a second, which S_1 = 0 leaves unread: its pointers' types fit
        out_shape=(
            jax.ShapeDtypeStruct((*shape, case.V), jnp.float32),
            jax.ShapeDtypeStruct(shape, jnp.float32),
            jax.ShapeDtypeStruct(shape, jnp.float32),
        ),
        grid=(parts, case.B * case.K),
        num_warps=4,
        num_stages=3 if max(case.N, case.V) <= 128 else 2,
        S_0=slots[0],
        S_1=slots[1],
        STRETCH=stretch,
        H=case.H,
        K=case.K,
        N=case.N,
        V=case.V,
        SCALE=case.scale * LOG2_E,
        KEYS=tile,
        G_BLOCK=block(G),
        N_BLOCK=block(case.N),
        V_BLOCK=block(case.V),
        PRECISION="ieee" if case.dtype == "float32" else "tf32",
    )
    return triton_call(
        _join_kernel,
        sums,
        maxima,
        denominators,
        out_shape=jax.ShapeDtypeStruct((case.B, case.H, case.V), values[0].dtype),
        grid=(case.B * case.H,),
        num_warps=4,
        PARTS=parts,
        G=G,
        V=case.V,
        PARTS_BLOCK=1 << (parts - 1).bit_length(),
        V_BLOCK=block(case.V),
    )


def stretch_of(case: StepCase, tile: int) -> int:
    """Slots per program: whole tiles, in at most 64 parts, such that some two thousand programs share the work."""
    total = sum(case.slots)
    parts = max(1, min(64, 2048 // (case.B * case.K)))
    tiles = -(-total // (parts * tile))
    return tile * tiles


def check_step(case: StepCase) -> None:
    """Raises UnsupportedCase where these kernels do not run the step."""
    if len(case.slots) > 2:
        raise UnsupportedCase(
            f"window_attention_step: {len(case.slots)} groups of slots; implementation='triton' takes at most 2; "
            "use 'xla'"
        )
    if case.H // case.K > 128:
        raise UnsupportedCase(
            f"window_attention_step: {case.H // case.K} query heads per KV head; implementation='triton' takes at most "
            "128; use 'xla'"
        )
