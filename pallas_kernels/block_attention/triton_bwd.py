"""Block attention in triton.language: the backward pass, without atomics, so that bits repeat.

Queries: ``triton_dq``. Keys: a block's gradient needs the tokens that selected it, wherever they are. Their lists
(``plan.readers``) are cut into pieces, a program gathers the queries of one piece and writes a partial sum, and a last
kernel adds a block's pieces in order. Block means: ranges of tokens in turn, partial sums added in order.

Gradients of keys are formed transposed from the start, [keys, queries]: no result of a matrix product is transposed,
which Triton 3.4 to 3.7 gets wrong on Hopper.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from pallas_kernels.batching import fold_batch
from pallas_kernels.block_attention.api import Case
from pallas_kernels.block_attention.blocks import Layout, plain_layout, pool, unpool
from pallas_kernels.block_attention.plan import Readers, block_bound, ordinals, readers
from pallas_kernels.block_attention.triton import Residuals, plan_union
from pallas_kernels.block_attention.triton_dq import queries_backward
from pallas_kernels.block_attention.triton_gather import gathered_backward
from pallas_kernels.block_attention.triton_tiles import (
    gathers_backward,
    load_gradients,
    load_keys,
    load_piece,
    piece_size,
    shared_constants,
    slots,
    tile_rows,
)
from pallas_kernels.tiles import ceil_div
from pallas_kernels.triton_call import jit, tl, triton_call


@jit
def _add_dkv(q, do, lse, delta, keys, values, mask, dk, dv, SCALE: tl.constexpr, PRECISION: tl.constexpr):
    """Adds some queries' part to a block's gradients; the mask is [keys, queries]."""
    logits = tl.dot(keys, tl.trans(q), input_precision=PRECISION) * SCALE
    p = tl.exp2(tl.where(mask, logits - lse[None, :], float("-inf")))
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
    dp = tl.dot(values, tl.trans(do), input_precision=PRECISION)
    ds = p * (dp - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@jit
def _store_partial(dk, dv, row, gk, gv, N: tl.constexpr, V: tl.constexpr, N_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr):
    n, w = tl.arange(0, N_BLOCK), tl.arange(0, V_BLOCK)
    tl.store(dk + row[:, None] * N + n[None, :], gk, mask=(n < N)[None, :])
    tl.store(dv + row[:, None] * V + w[None, :], gv, mask=(w < V)[None, :])


@jit
def _pieces_kernel(
    q, k, v, do, lse, delta, reader, first, begin, end, T, E, dk, dv, GRADIENT_SCALE: tl.constexpr, M: tl.constexpr,
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
        do += batch * T * (H * V)
        lse += batch * T * H
        delta += batch * T * H
        key, keys, values = load_piece(k, v, first, piece, batch, head, T, K, N, V, S, N_BLOCK, V_BLOCK)
        gk = tl.zeros([S, N_BLOCK], tl.float32)
        gv = tl.zeros([S, V_BLOCK], tl.float32)
        row = tl.arange(0, TOKENS * HEADS)
        query_head = head * G + row % HEADS
        for i in range(at, stop, TOKENS):
            place = i + row // HEADS
            exists = (place < stop) & (row % HEADS < G)
            token = tl.load(reader + place, mask=exists, other=0) // M
            queries, cotangent, log_sum, row_delta = load_gradients(
                q, do, lse, delta, token, query_head, exists, H, N, V, N_BLOCK, V_BLOCK
            )
            mask = exists[None, :] & (key[:, None] <= token[None, :])
            gk, gv = _add_dkv(queries, cotangent, log_sum, row_delta, keys, values, mask, gk, gv, SCALE, PRECISION)
        _store_partial(dk, dv, piece * S + tl.arange(0, S), gk * GRADIENT_SCALE, gv, N, V, N_BLOCK, V_BLOCK)


@jit
def _sum_kernel(
    partial_k, partial_v, pieces, first, ordinal, T, P, total_k, total_v, K: tl.constexpr, S: tl.constexpr,
    N: tl.constexpr, V: tl.constexpr, N_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds the pieces of a block in order; writes the tokens of the block alone."""
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    edge = pieces + (batch * K + head) * (tl.num_programs(0) + 1) + block
    at, stop = tl.load(edge), tl.load(edge + 1)
    if at < stop:
        row, n, w = tl.arange(0, S), tl.arange(0, N_BLOCK), tl.arange(0, V_BLOCK)
        token = tl.load(first + (batch * K + head) * P + at) + row
        inside = (token < T) & (tl.load(ordinal + batch * T + token, mask=token < T, other=-1) == block)
        dk = tl.zeros([S, N_BLOCK], tl.float32)
        dv = tl.zeros([S, V_BLOCK], tl.float32)
        for piece in range(at, stop):
            source = (((batch * K + head) * P + piece) * S + row)[:, None]
            dk += tl.load(partial_k + source * N + n[None, :], mask=(n < N)[None, :], other=0.0)
            dv += tl.load(partial_v + source * V + w[None, :], mask=(w < V)[None, :], other=0.0)
        target = ((batch * T + token) * K + head)[:, None]
        tl.store(total_k + target * N + n[None, :], dk, mask=inside[:, None] & (n < N)[None, :])
        tl.store(total_v + target * V + w[None, :], dv, mask=inside[:, None] & (w < V)[None, :])


@jit
def _means_kernel(
    q, pooled_k, pooled_v, do, lse, delta, position, base, first, T, tokens_each, C, dk, dv, BLOCKS: tl.constexpr,
    GRADIENT_SCALE: tl.constexpr, H: tl.constexpr, K: tl.constexpr, G: tl.constexpr, N: tl.constexpr, V: tl.constexpr,
    S: tl.constexpr, SCALE: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, N_BLOCK: tl.constexpr,
    V_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCKS block means from one range of tokens."""
    part, head, batch = tl.program_id(1), tl.program_id(2) % K, (tl.program_id(2) // K).to(tl.int64)
    entry = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    keys = load_keys(pooled_k + (batch * C * K + head) * N, entry, C, K, N, N_BLOCK)
    values = load_keys(pooled_v + (batch * C * K + head) * V, entry, C, K, V, V_BLOCK)
    gk = tl.zeros([BLOCKS, N_BLOCK], tl.float32)
    gv = tl.zeros([BLOCKS, V_BLOCK], tl.float32)
    q += batch * T * (H * N)
    do += batch * T * (H * V)
    lse += batch * T * H
    delta += batch * T * H
    # No token before the end of the first of these blocks sees any of them.
    earliest = tl.load(first + batch * C + tl.program_id(0) * BLOCKS) + S - 1
    at = tl.maximum(part * tokens_each, earliest // TOKENS * TOKENS)
    for i in range(at, tl.minimum(part * tokens_each + tokens_each, T), TOKENS):
        token, query_head, exists = tile_rows(i, T, head, TOKENS, HEADS, G)
        row_base = tl.load(base + batch * T + token, mask=exists, other=0)
        row_end = row_base + (tl.load(position + batch * T + token, mask=exists, other=-1) + 1) // S
        queries, cotangent, log_sum, row_delta = load_gradients(
            q, do, lse, delta, token, query_head, exists, H, N, V, N_BLOCK, V_BLOCK
        )
        mask = exists[None, :] & (entry[:, None] >= row_base[None, :]) & (entry[:, None] < row_end[None, :])
        gk, gv = _add_dkv(queries, cotangent, log_sum, row_delta, keys, values, mask, gk, gv, SCALE, PRECISION)
    row = ((batch * K + head) * tl.num_programs(1) + part) * (tl.num_programs(0) * BLOCKS) + entry
    _store_partial(dk, dv, row, gk * GRADIENT_SCALE, gv, N, V, N_BLOCK, V_BLOCK)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Programs that share the gradients of means, means at a time, warps, stages."""

    programs: int = 1056
    blocks: int = 64
    warps: int = 4
    stages: int = 2


TILES = Tiles()


def backward(
    case: Case,
    q: Array,
    k: Array,
    v: Array,
    layout: Layout | None,
    outputs: tuple[Array, Array],
    residuals: Residuals,
    cotangents: tuple[Array, Array],
) -> tuple[Array, Array, Array]:
    """See ``api``."""
    return fold_batch(_backward, ("case",))(q, k, v, layout, outputs, residuals, cotangents, case=case)


def _backward(
    q: Array,
    k: Array,
    v: Array,
    layout: Layout | None,
    outputs: Any,
    residuals: Residuals,
    cotangents: Any,
    *,
    case: Case,
) -> tuple[Array, Array, Array]:
    case = dataclasses.replace(case, B=q.shape[0])
    S = case.block_size
    pooled = pool(k, layout, S), pool(v, layout, S)
    place = layout or plain_layout(case.B, case.T, S)
    lists = residuals.lists or readers(residuals.indices, place, S, case.segment_ids, piece_size(case))
    partial: Sequence[Array]
    if gathers_backward(case):
        rows = _deltas(outputs[1], cotangents[1])
        *partial, parts = gathered_backward(case, q, k, v, lists, residuals.lse_selected, rows, cotangents[1])
        dq, *delta = queries_backward(case, q, k, v, pooled, place, outputs, residuals, cotangents, None, parts)
    else:
        together = residuals.together or plan_union(case, residuals.indices, place)
        dq, *delta = queries_backward(case, q, k, v, pooled, place, outputs, residuals, cotangents, together, None)
        partial = _pieces(case, q, k, v, lists, residuals.lse_selected, delta[1], cotangents[1])
    dk, dv = _selected_keys(case, place, lists, partial)
    dmeans = _means(case, q, pooled, place, residuals.lse_compressed, delta[0], cotangents[0])
    # A token that nothing selected, or padding, is written by no program.
    read = _was_read(case, lists, place)
    dk, dv = (
        (jnp.where(read[..., None], x, 0.0) + unpool(means, layout, case.T, S)).astype(like.dtype)
        for x, means, like in ((dk, dmeans[0], k), (dv, dmeans[1], v))
    )
    return dq, dk, dv


def _deltas(o: Array, do: Array) -> Float32[Array, "B T H"]:
    return jnp.sum(o.astype(jnp.float32) * do.astype(jnp.float32), axis=-1)


def _was_read(case: Case, lists: Readers, place: Layout) -> Array:
    """[B,T,K]: whether any token selected the block that this token is in."""
    count = lists.pieces[..., 1:] - lists.pieces[..., :-1]
    ordinal = ordinals(place, case.block_size, case.segment_ids)
    read = jnp.take_along_axis(count.transpose(0, 2, 1), jnp.maximum(ordinal, 0)[..., None], axis=1) > 0
    return read & (ordinal >= 0)[..., None]


def _pieces(
    case: Case, q: Array, k: Array, v: Array, lists: Readers, lse: Array, delta: Array, do: Array
) -> Sequence[Float32[Array, "B K P S N"]]:
    """The part of dk and dv that each piece of a list gives."""
    P = lists.begin.shape[-1]
    return triton_call(
        _pieces_kernel,
        *(q, k, v, do, lse, delta, lists.entry, lists.first, lists.begin, lists.end, case.T, lists.entry.shape[-1]),
        out_shape=[
            jax.ShapeDtypeStruct((case.B, case.K, P, case.block_size, size), jnp.float32) for size in (case.N, case.V)
        ],
        grid=(P, case.K, case.B),
        num_warps=TILES.warps,
        num_stages=TILES.stages,
        GRADIENT_SCALE=case.scale,
        M=slots(case),
        **shared_constants(case),
    )


def _selected_keys(
    case: Case, place: Layout, lists: Readers, partial: Sequence[Array]
) -> tuple[Float32[Array, "B T K N"], Float32[Array, "B T K V"]]:
    """dk and dv of the selected branch; undefined where ``_was_read`` is not."""
    B, T, K, S = case.B, case.T, case.K, case.block_size
    P = lists.begin.shape[-1]
    blocks = block_bound(T, S, case.segment_ids)
    ordinal = ordinals(place, S, case.segment_ids)
    constants = {name: shared_constants(case)[name] for name in ("K", "S", "N", "V", "N_BLOCK", "V_BLOCK")}
    dk, dv = triton_call(
        _sum_kernel,
        *(*partial, lists.pieces, lists.first, ordinal, T, P),
        out_shape=[jax.ShapeDtypeStruct((B, T, K, size), jnp.float32) for size in (case.N, case.V)],
        grid=(blocks, K, B),
        **constants,
    )
    return dk, dv


def _means(
    case: Case, q: Array, pooled: tuple[Array, Array], place: Layout, lse: Array, delta: Array, do: Array
) -> tuple[Float32[Array, "B C K N"], Float32[Array, "B C K V"]]:
    """The gradients of the block means."""
    C = pooled[0].shape[1]
    constants = shared_constants(case)
    TOKENS = constants["TOKENS"]
    chunks = ceil_div(C, TILES.blocks)
    ranges = ceil_div(TILES.programs, chunks * case.B * case.K)
    tokens_each = ceil_div(ceil_div(case.T, ranges), TOKENS) * TOKENS
    parts = ceil_div(case.T, tokens_each)
    shape = (case.B, case.K, parts, chunks * TILES.blocks)
    partial = triton_call(
        _means_kernel,
        *(q, *pooled, do, lse, delta, place.position, place.base, place.first_token, case.T, tokens_each, C),
        out_shape=[jax.ShapeDtypeStruct((*shape, size), jnp.float32) for size in (case.N, case.V)],
        grid=(chunks, parts, case.B * case.K),
        num_warps=TILES.warps,
        num_stages=TILES.stages,
        BLOCKS=TILES.blocks,
        GRADIENT_SCALE=case.scale,
        **constants,
    )
    dk, dv = (jnp.sum(x, axis=2)[:, :, :C].transpose(0, 2, 1, 3) for x in partial)
    return dk, dv
