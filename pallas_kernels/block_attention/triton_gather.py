"""The selected branch of block attention in triton.language, block by block: a block gathers the tokens that want it.

Tokens side by side select different blocks, so a tile of tokens reads many blocks for a few of its tokens each, and its
matrix products are mostly masked. Here a program owns a block and takes the tokens of its list (``plan.readers``)
together, whichever they are: full products, and keys are read once. The price is one partial result for each token,
head and selected block, in the dtype of q, which a second pass adds up.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.block_attention.api import Case
from pallas_kernels.block_attention.plan import Readers
from pallas_kernels.block_attention.triton_tiles import (
    load_gradients,
    load_heads,
    load_piece,
    shared_constants,
    slots,
    store_heads,
    tile_rows,
)
from pallas_kernels.tiles import ceil_div, power_of_2
from pallas_kernels.triton_call import jit, tl, triton_call


@jit
def part_rows(reader, place, stop, head, K: tl.constexpr, G: tl.constexpr, M: tl.constexpr, HEADS: tl.constexpr):
    """(token, query head, row of the partial results, exists) for entries ``place`` of a list."""
    row = tl.arange(0, place.shape[0])
    exists = (place < stop) & (row % HEADS < G)
    entry = tl.load(reader + place, mask=exists, other=0)
    token = entry // M
    part = ((token * K + head) * M + entry % M).to(tl.int64) * G + row % HEADS
    return token, head * G + row % HEADS, part, exists


@jit
def store_part(base, value, part, exists, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    n = tl.arange(0, BLOCK)
    pointer = base + part[:, None] * SIZE + n[None, :]
    tl.store(pointer, value.to(base.dtype.element_ty), mask=exists[:, None] & (n < SIZE)[None, :])


@jit
def load_part(base, part, exists, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    n = tl.arange(0, BLOCK)
    pointer = base + part[:, None] * SIZE + n[None, :]
    return tl.load(pointer, mask=exists[:, None] & (n < SIZE)[None, :], other=0.0).to(tl.float32)


@jit
def _parts_kernel(
    q, k, v, reader, first, begin, end, T, E, o, lse, M: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, G: tl.constexpr, N: tl.constexpr, V: tl.constexpr, S: tl.constexpr,
    SCALE: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, N_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    piece = (batch * K + head) * tl.num_programs(0) + tl.program_id(0)
    at, stop = tl.load(begin + piece), tl.load(end + piece)
    if at < stop:
        reader += (batch * K + head) * E
        q += batch * T * (H * N)
        o += batch * T * (H * M) * V
        lse += batch * T * (H * M)
        key, keys, values = load_piece(k, v, first, piece, batch, head, T, K, N, V, S, N_BLOCK, V_BLOCK)
        row = tl.arange(0, TOKENS * HEADS)
        for i in range(at, stop, TOKENS):
            token, query_head, part, exists = part_rows(reader, i + row // HEADS, stop, head, K, G, M, HEADS)
            queries = load_heads(q, token, query_head, exists, H, N, N_BLOCK)
            logits = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * SCALE
            logits = tl.where(key[None, :] <= token[:, None], logits, float("-inf"))
            m = tl.maximum(tl.max(logits, 1), -1e30)
            p = tl.exp2(logits - m[:, None])
            total = tl.sum(p, 1)
            whole = tl.where(total > 0, total, 1.0)
            result = tl.dot(p.to(values.dtype), values, input_precision=PRECISION) * (1.0 / whole)[:, None]
            store_part(o, result, part, exists, V, V_BLOCK)
            tl.store(lse + part, m + tl.log2(whole), mask=exists)


@jit
def _merge_kernel(
    parts, part_lse, indices, T, o, lse, M: tl.constexpr, SLOTS: tl.constexpr, H: tl.constexpr, K: tl.constexpr,
    G: tl.constexpr, V: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, V_BLOCK: tl.constexpr,
):  # fmt: skip
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    o += batch * T * (H * V)
    lse += batch * T * H
    indices += batch * T * (K * M)
    parts += batch * T * (H * M) * V
    part_lse += batch * T * (H * M)
    token, query_head, exists = tile_rows(tl.program_id(0) * TOKENS, T, head, TOKENS, HEADS, G)
    slot = tl.arange(0, SLOTS)
    at = token * K + head
    listed = tl.load(indices + at[:, None] * M + slot[None, :], mask=exists[:, None] & (slot < M)[None, :], other=-1)
    first = at.to(tl.int64) * (M * G) + tl.arange(0, TOKENS * HEADS) % HEADS
    logs = tl.load(part_lse + first[:, None] + slot[None, :] * G, mask=listed >= 0, other=float("-inf"))
    top = tl.maximum(tl.max(logs, 1), -1e30)
    total = tl.sum(tl.exp2(logs - top[:, None]), 1)
    seen = total > 0
    result = tl.where(seen, top + tl.log2(tl.where(seen, total, 1.0)), 0.0)
    tl.store(lse + token * H + query_head, result, mask=exists)
    acc = tl.zeros([TOKENS * HEADS, V_BLOCK], tl.float32)
    for m in tl.range(0, M, loop_unroll_factor=4):
        held = exists & (tl.load(indices + at * M + m, mask=exists, other=-1) >= 0)
        weight = tl.exp2(tl.load(part_lse + first + m * G, mask=held, other=float("-inf")) - result)
        acc += weight[:, None] * load_part(parts, first + m * G, held, V, V_BLOCK)
    store_heads(o, acc, token, query_head, exists, H, V, V_BLOCK)


@jit
def _pieces_dq_kernel(
    q, k, v, do, lse, delta, reader, first, begin, end, T, E, dk, dv, dq, M: tl.constexpr,
    GRADIENT_SCALE: tl.constexpr, H: tl.constexpr, K: tl.constexpr, G: tl.constexpr,
    N: tl.constexpr, V: tl.constexpr, S: tl.constexpr, SCALE: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
    N_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of a block's keys and values from one piece of its list, and each reader's part of dq, unscaled.

    Gradients of keys are accumulated transposed, [N, keys]: so no result of a matrix product enters another transposed,
    which Triton 3.4 to 3.7 gets wrong on Hopper.
    """
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    piece = (batch * K + head) * tl.num_programs(0) + tl.program_id(0)
    at, stop = tl.load(begin + piece), tl.load(end + piece)
    if at < stop:
        reader += (batch * K + head) * E
        q += batch * T * (H * N)
        do += batch * T * (H * V)
        lse += batch * T * H
        delta += batch * T * H
        dq += batch * T * (H * M) * N
        key, keys, values = load_piece(k, v, first, piece, batch, head, T, K, N, V, S, N_BLOCK, V_BLOCK)
        gk = tl.zeros([N_BLOCK, S], tl.float32)
        gv = tl.zeros([V_BLOCK, S], tl.float32)
        row = tl.arange(0, TOKENS * HEADS)
        for i in range(at, stop, TOKENS):
            token, query_head, part, exists = part_rows(reader, i + row // HEADS, stop, head, K, G, M, HEADS)
            queries, cotangent, log_sum, row_delta = load_gradients(
                q, do, lse, delta, token, query_head, exists, H, N, V, N_BLOCK, V_BLOCK
            )
            logits = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * SCALE
            mask = exists[:, None] & (key[None, :] <= token[:, None])
            p = tl.exp2(tl.where(mask, logits - log_sum[:, None], float("-inf")))
            gv = tl.dot(tl.trans(cotangent), p.to(cotangent.dtype), gv, input_precision=PRECISION)
            dp = tl.dot(cotangent, tl.trans(values), input_precision=PRECISION)
            ds = (p * (dp - row_delta[:, None])).to(queries.dtype)
            gk = tl.dot(tl.trans(queries), ds, gk, input_precision=PRECISION)
            store_part(dq, tl.dot(ds, keys, input_precision=PRECISION), part, exists, N, N_BLOCK)
        line, n, w = piece * S + tl.arange(0, S), tl.arange(0, N_BLOCK), tl.arange(0, V_BLOCK)
        tl.store(dk + line[None, :] * N + n[:, None], gk * GRADIENT_SCALE, mask=(n < N)[:, None])
        tl.store(dv + line[None, :] * V + w[:, None], gv, mask=(w < V)[:, None])


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Rows of a tile (tokens times the padded group), warps and stages."""

    rows: int = 64
    warps: int = 4
    stages: int = 3


FORWARD = Tiles()
MERGE = Tiles(rows=16)
BACKWARD = Tiles(rows=128, stages=2)
BACKWARD_WIDE = Tiles(stages=2)  # for head sizes above 64, where more rows are more than the registers hold


def _launch(kernel: Any, case: Case, tiles: Tiles, lists: Readers, arrays: Any, outputs: Any, **options: Any) -> Any:
    """One program for each piece of a list."""
    return triton_call(
        kernel,
        *(*arrays, lists.entry, lists.first, lists.begin, lists.end, case.T, lists.entry.shape[-1]),
        out_shape=outputs,
        grid=(lists.begin.shape[-1], case.K, case.B),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        M=slots(case),
        **options,
        **shared_constants(case, tiles.rows),
    )


def gathered(
    case: Case, q: Array, k: Array, v: Array, indices: Int32[Array, "B T K M"], lists: Readers
) -> tuple[Array, Float32[Array, "B T H"]]:
    """The selected branch and its logsumexp."""
    M, constants = slots(case), shared_constants(case, MERGE.rows)
    shape = (case.B, case.T, case.K, M, case.H // case.K)
    outputs = (jax.ShapeDtypeStruct((*shape, case.V), q.dtype), jax.ShapeDtypeStruct(shape, jnp.float32))
    parts, part_lse = _launch(_parts_kernel, case, FORWARD, lists, (q, k, v), outputs)
    return triton_call(
        _merge_kernel,
        *(parts, part_lse, indices, case.T),
        out_shape=(
            jax.ShapeDtypeStruct((case.B, case.T, case.H, case.V), q.dtype),
            jax.ShapeDtypeStruct((case.B, case.T, case.H), jnp.float32),
        ),
        grid=(ceil_div(case.T, constants["TOKENS"]), case.K, case.B),
        num_warps=MERGE.warps,
        M=M,
        SLOTS=power_of_2(M, 2),
        **{name: constants[name] for name in ("H", "K", "G", "V", "TOKENS", "HEADS", "V_BLOCK")},
    )


def gathered_backward(
    case: Case, q: Array, k: Array, v: Array, lists: Readers, lse: Array, delta: Array, do: Array
) -> tuple[Float32[Array, "B K P S N"], Float32[Array, "B K P S V"], Float[Array, "B T K M G N"]]:
    """Partial sums of dk and dv for each piece of a list, and of dq for each selected block."""
    pieces = (case.B, case.K, lists.begin.shape[-1], case.block_size)
    outputs = (
        *(jax.ShapeDtypeStruct((*pieces, size), jnp.float32) for size in (case.N, case.V)),
        jax.ShapeDtypeStruct((case.B, case.T, case.K, slots(case), case.H // case.K, case.N), q.dtype),
    )
    arrays = (q, k, v, do, lse, delta)
    tiles = BACKWARD if max(case.N, case.V) <= 64 else BACKWARD_WIDE
    return _launch(_pieces_dq_kernel, case, tiles, lists, arrays, outputs, GRADIENT_SCALE=case.scale)
