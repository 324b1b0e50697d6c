"""Block attention in triton.language: the gradient of the queries, over block means and selected blocks.

One kernel walks as the forward pass does, for dq of both branches, and leaves delta = sum_n do o of each to the others.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from pallas_kernels.block_attention.api import Case
from pallas_kernels.block_attention.blocks import Layout
from pallas_kernels.block_attention.plan import Union
from pallas_kernels.block_attention.triton import Residuals
from pallas_kernels.block_attention.triton_gather import load_part
from pallas_kernels.block_attention.triton_tiles import (
    load_heads,
    load_keys,
    shared_constants,
    store_heads,
    tile_rows,
    visible_means,
)
from pallas_kernels.tiles import ceil_div
from pallas_kernels.triton_call import jit, tl, triton_call


@jit
def _add_dq(q, do, lse, delta, keys, values, mask, dq, SCALE: tl.constexpr, PRECISION: tl.constexpr):
    logits = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * SCALE
    p = tl.exp2(tl.where(mask, logits - lse[:, None], float("-inf")))
    dp = tl.dot(do, tl.trans(values), input_precision=PRECISION)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(keys.dtype), keys, dq, input_precision=PRECISION)


@jit
def _load_delta(o, do, delta, token, head, exists, H: tl.constexpr, V: tl.constexpr, V_BLOCK: tl.constexpr):
    """(do, delta) of a tile's rows; writes delta."""
    cotangent = load_heads(do, token, head, exists, H, V, V_BLOCK)
    output = load_heads(o, token, head, exists, H, V, V_BLOCK)
    value = tl.sum(cotangent.to(tl.float32) * output.to(tl.float32), 1)
    tl.store(delta + token * H + head, value, mask=exists)
    return cotangent, value


@jit
def _dq_kernel(
    q, k, v, pooled_k, pooled_v, o_c, o_s, do_c, do_s, lse_c, lse_s, start, position, base, first, bits, count, indices,
    parts, T, C, L, dq, delta_c, delta_s, GRADIENT_SCALE: tl.constexpr, BLOCKS: tl.constexpr, H: tl.constexpr,
    K: tl.constexpr, G: tl.constexpr, N: tl.constexpr, V: tl.constexpr, S: tl.constexpr, SCALE: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, N_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
    GATHERED: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    queries_at, outputs_at, rows_at = batch * T * (H * N), batch * T * (H * V), batch * T * H
    pooled_k += (batch * C * K + head) * N
    pooled_v += (batch * C * K + head) * V
    k += (batch * T * K + head) * N
    v += (batch * T * K + head) * V

    token, query_head, exists = tile_rows(tile * TOKENS, T, head, TOKENS, HEADS, G)
    position += batch * T
    row_base, row_end, lowest, highest = visible_means(position, base + batch * T, token, T, C, S, BLOCKS)
    queries = load_heads(q + queries_at, token, query_head, exists, H, N, N_BLOCK)
    gradient = tl.zeros([TOKENS * HEADS, N_BLOCK], tl.float32)

    cotangent, delta = _load_delta(
        o_c + outputs_at, do_c + outputs_at, delta_c + rows_at, token, query_head, exists, H, V, V_BLOCK
    )
    log_sum = tl.load(lse_c + rows_at + token * H + query_head, mask=exists, other=0.0)
    for at in range(lowest, highest, BLOCKS):
        block = at + tl.arange(0, BLOCKS)
        keys, values = load_keys(pooled_k, block, C, K, N, N_BLOCK), load_keys(pooled_v, block, C, K, V, V_BLOCK)
        mask = (block[None, :] >= row_base[:, None]) & (block[None, :] < row_end[:, None])
        gradient = _add_dq(queries, cotangent, log_sum, delta, keys, values, mask, gradient, SCALE, PRECISION)

    if GATHERED:
        at = (batch * T + token) * K + head
        part = at * (M * G) + tl.arange(0, TOKENS * HEADS) % HEADS
        for m in tl.range(0, M, loop_unroll_factor=4):
            held = exists & (tl.load(indices + at * M + m, mask=exists, other=-1) >= 0)
            gradient += load_part(parts, part + m * G, held, N, N_BLOCK)
    else:
        cotangent, delta = _load_delta(
            o_s + outputs_at, do_s + outputs_at, delta_s + rows_at, token, query_head, exists, H, V, V_BLOCK
        )
        log_sum = tl.load(lse_s + rows_at + token * H + query_head, mask=exists, other=0.0)
        entry = (batch * K + head) * tl.num_programs(0) + tile
        index = tl.load(start + batch * T + token, mask=token < T, other=0)
        index += tl.load(position + token, mask=token < T, other=-1)
        bit = token - tile * TOKENS
        for i in range(tl.load(count + entry)):
            key = tl.load(first + entry * L + i) + tl.arange(0, S)
            member = (tl.load(bits + entry * L + i) >> bit) & 1
            keys, values = load_keys(k, key, T, K, N, N_BLOCK), load_keys(v, key, T, K, V, V_BLOCK)
            mask = (member != 0)[:, None] & (key[None, :] <= index[:, None])
            gradient = _add_dq(queries, cotangent, log_sum, delta, keys, values, mask, gradient, SCALE, PRECISION)

    store_heads(dq + queries_at, gradient * GRADIENT_SCALE, token, query_head, exists, H, N, N_BLOCK)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Block means read at a time, warps and stages."""

    blocks: int = 64
    warps: int = 4
    stages: int = 2


TILES = Tiles()


def queries_backward(
    case: Case,
    q: Array,
    k: Array,
    v: Array,
    pooled: tuple[Array, Array],
    place: Layout,
    outputs: tuple[Array, Array],
    residuals: Residuals,
    cotangents: tuple[Array, Array],
    together: Union | None,
    parts: Array | None,
) -> tuple[Array, Float32[Array, "B T H"], Float32[Array, "B T H"]]:
    """dq of both branches, and the delta of the compressed and of the selected branch.

    The selected branch by its blocks, ``together``, or by the ``parts`` of ``gathered_backward``: then its delta is not
    written.
    """
    constants = shared_constants(case, together=together is not None)
    blocks = together or (None, None, None)
    rows = jax.ShapeDtypeStruct((case.B, case.T, case.H), jnp.float32)
    return triton_call(
        _dq_kernel,
        *(q, k, v, *pooled, *outputs, *cotangents, residuals.lse_compressed, residuals.lse_selected),
        *(place.start, place.position, place.base, *blocks, residuals.indices, parts),
        *(case.T, pooled[0].shape[1], 0 if together is None else together.first.shape[-1]),
        out_shape=(jax.ShapeDtypeStruct(q.shape, q.dtype), rows, rows),
        grid=(ceil_div(case.T, constants["TOKENS"]), case.K, case.B),
        num_warps=TILES.warps,
        num_stages=TILES.stages,
        GRADIENT_SCALE=case.scale,
        BLOCKS=TILES.blocks,
        GATHERED=parts is not None,
        M=residuals.indices.shape[-1],
        **constants,
    )
