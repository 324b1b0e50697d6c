"""The last part of the delta rule's backward pass in Triton: every chunk's gradients at once, from S and D.

With the names of ``triton_bwd`` and rq, rk the inverse norms of q and k, the first kernel forms the gradients that pass
between the tokens of a chunk,

    U_ij = scale exp(c_i - c_j) beta_j rq_i rk_j do_i.r_j  (i >= j)
    W_ij = -exp(c_i - c_j) beta_j rk_i rk_j dy_i.r_j       (i > j)

and the second adds them to those that pass through the states, with the raw q and k:

    x = scale exp(c) rq do S + U k,    dq = x - rq^2 (x.q) q
    y = exp(c_last - c) beta rk r D - exp(c) rk dy S + U^T q + (W + W^T) k,    dk = y - rk^2 (y.k) k
 No dot takes the transpose of another dot's result (Triton 3.4 to 3.7 gets that wrong on
Hopper): U and W pass through memory. The reverse scan wrote r.(k D), of which dbeta and dg have need in more precision
than that of the D here.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.gated_delta_rule.triton import CHUNK, end_of_chunk, load_gates, precision
from pallas_kernels.gated_delta_rule.triton_tiles import choose
from pallas_kernels.tiles import ceil_div
from pallas_kernels.triton_call import jit, tl, triton_call


@jit
def _pairs(
    q_ptr, k_ptr, g_ptr, beta_ptr, run_ptr, r_ptr, do_ptr, dv_ptr, T, scale, key_size, value_size,
    from_q_ptr, from_k_ptr, rows_ptr, dg_ptr, dbeta_ptr,
    H: tl.constexpr, K: tl.constexpr, N: tl.constexpr, V: tl.constexpr, NORMALIZE: tl.constexpr, RUNS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    chunk, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    NT = tl.cdiv(T, 64)
    rows = tl.arange(0, 64)
    i, j = rows[:, None], rows[None, :]
    inside = (chunk * 64 + i) < T
    dtype = k_ptr.dtype.element_ty
    at = ((b * T + chunk * 64 + i) * K + h // (H // K)) * N + j
    at_v = ((b * T + chunk * 64 + i) * H + h) * V + j

    # key_size and value_size are N and V again as run-time values: loops of known length would be unrolled and all
    # their loads moved to the front, far beyond the registers.
    to_o, to_y = tl.zeros([64, 64], tl.float32), tl.zeros([64, 64], tl.float32)
    for _ in range(value_size // 64):
        r = tl.load(r_ptr + at_v, mask=inside, other=0.0)
        do = tl.load(do_ptr + at_v, mask=inside, other=0.0)
        dv = tl.load(dv_ptr + at_v, mask=inside, other=0.0)
        to_o = tl.dot(do, tl.trans(r), to_o, input_precision=PRECISION)
        to_y = tl.dot(dv, tl.trans(r), to_y, input_precision=PRECISION)
        at_v += 64
    qk, kk = tl.zeros([64, 64], tl.float32), tl.zeros([64, 64], tl.float32)
    rq, rk = tl.zeros([64], tl.float32), tl.zeros([64], tl.float32)
    for _ in range(key_size // 64):
        q = tl.load(q_ptr + at, mask=inside, other=0.0)
        k = tl.load(k_ptr + at, mask=inside, other=0.0)
        qk = tl.dot(q, tl.trans(k), qk, input_precision=PRECISION)
        kk = tl.dot(k, tl.trans(k), kk, input_precision=PRECISION)
        if NORMALIZE:
            rq += tl.sum(q.to(tl.float32) * q.to(tl.float32), 1)
            rk += tl.sum(k.to(tl.float32) * k.to(tl.float32), 1)
        at += 64
    if NORMALIZE:
        rq, rk = tl.rsqrt(rq + 1e-6), tl.rsqrt(rk + 1e-6)
    else:
        rq, rk = rq + 1.0, rk + 1.0
    coarse, fine, beta, run, _ = load_gates(g_ptr, beta_ptr, run_ptr, T, b, h, chunk, H, RUNS)
    coarse_end, fine_end = end_of_chunk(coarse, fine)
    write = tl.exp((coarse_end - coarse) + (fine_end - fine))
    sees = i >= j
    if RUNS:
        sees = sees & (run[:, None] == run[None, :])
        write = tl.where(run == tl.max(run, 0), write, 0.0)
    out = rows_ptr + (bh * NT + chunk) * 256 + rows
    tl.store(out, rq * rq)
    tl.store(out + 64, rk * rk)
    tl.store(out + 128, write * rk)
    tl.store(out + 192, beta)
    apart = (coarse[:, None] - coarse[None, :]) + (fine[:, None] - fine[None, :])
    decay = tl.exp(tl.where(sees, apart, float("-inf"))) * rk[None, :]
    to_o *= decay * (rq * scale)[:, None]
    to_y *= tl.where(i > j, decay, 0.0) * rk[:, None]
    square = (bh * NT + chunk) * 4096 + i * 64 + j
    tl.store(from_q_ptr + square, (to_o * beta[None, :]).to(dtype))
    tl.store(from_k_ptr + square, (to_y * -beta[None, :]).to(dtype))
    pairs = qk * to_o - kk * to_y
    at_t = (b * T + chunk * 64 + rows) * H + h
    tl.store(dbeta_ptr + at_t, tl.sum(pairs, 0), mask=chunk * 64 + rows < T)
    # dg_t is the sum over the pairs i >= t > j. As a running sum of the gradient of c it would drown, where decays are
    # strong, in terms that cancel.
    pairs = tl.where(i > j, pairs * beta[None, :], 0.0)
    ones = tl.where(i <= j, 1.0, 0.0).to(dtype)
    high = pairs.to(dtype)
    later = tl.dot(ones, high, input_precision=PRECISION)
    later = tl.dot(ones, (pairs - high.to(tl.float32)).to(dtype), later, input_precision=PRECISION)
    tl.store(dg_ptr + at_t, tl.sum(tl.where(i > j, later, 0.0), 1), mask=chunk * 64 + rows < T)


@jit
def _gradients(
    q_ptr, k_ptr, r_ptr, do_ptr, dv_ptr, states_ptr, dstates_ptr, written_ptr, factors_ptr,
    from_q_ptr, from_k_ptr, rows_ptr, dg_pairs_ptr, dbeta_pairs_ptr, T, key_size, value_size,
    dq_ptr, dk_ptr, dg_ptr, dbeta_ptr,
    H: tl.constexpr, K: tl.constexpr, N: tl.constexpr, V: tl.constexpr, BN: tl.constexpr,
    PARTS: tl.constexpr, NORMALIZE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    chunk, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    here = bh * tl.cdiv(T, 64) + chunk
    rows, n = tl.arange(0, 64), tl.arange(0, BN)
    i, j = rows[:, None], rows[None, :]
    inside = (chunk * 64 + i) < T
    first = b * T + chunk * 64
    q_ptr += (first * K + h // (H // K)) * N
    k_ptr += (first * K + h // (H // K)) * N
    dq_ptr += (first * H + h) * N
    dk_ptr += (first * H + h) * N
    at, at_out, at_v = i * (K * N) + n[None, :], i * (H * N) + n[None, :], i * (H * V) + j
    dread = tl.zeros([64], tl.float32)
    along_q = tl.zeros([64], tl.float32)
    along_k = tl.zeros([64], tl.float32)
    dcarry = tl.zeros([BN], tl.float32)
    for part in range(key_size // BN):
        value = (first * H + h) * V
        state = here * V * N + part * BN
        x = tl.zeros([64, BN], tl.float32)
        y = tl.zeros([64, BN], tl.float32)
        dwrite = tl.zeros([64, BN], tl.float32)
        for _ in range(value_size // 64):
            S = tl.load(states_ptr + state + i * N + n[None, :])
            D = tl.load(dstates_ptr + state + i * N + n[None, :])
            do = tl.load(do_ptr + value + at_v, mask=inside, other=0.0)
            dv = tl.load(dv_ptr + value + at_v, mask=inside, other=0.0)
            r = tl.load(r_ptr + value + at_v, mask=inside, other=0.0)
            x = tl.dot(do, S, x, input_precision=PRECISION)
            y = tl.dot(dv, S, y, input_precision=PRECISION)
            dwrite = tl.dot(r, D, dwrite, input_precision=PRECISION)
            dcarry += tl.sum(S.to(tl.float32) * D.to(tl.float32), 0)
            value += 64
            state += 64 * N
        q = tl.load(q_ptr + part * BN + at, mask=inside, other=0.0)
        k = tl.load(k_ptr + part * BN + at, mask=inside, other=0.0)
        dwrite *= tl.load(rows_ptr + here * 256 + 128 + rows)[:, None]
        y *= -tl.load(factors_ptr + here * 256 + rows)[:, None]
        dread += tl.sum(y * k.to(tl.float32), 1)
        y += dwrite * tl.load(rows_ptr + here * 256 + 192 + rows)[:, None]
        x *= tl.load(factors_ptr + here * 256 + 64 + rows)[:, None]
        dread += tl.sum(x * q.to(tl.float32), 1)
        from_q = tl.load(from_q_ptr + here * 4096 + i * 64 + j)
        from_k = tl.load(from_k_ptr + here * 4096 + i * 64 + j)
        x = tl.dot(from_q, k, x, input_precision=PRECISION)
        y = tl.dot(tl.trans(from_q), q, y, input_precision=PRECISION)
        y = tl.dot(from_k, k, y, input_precision=PRECISION)
        y = tl.dot(tl.trans(from_k), k, y, input_precision=PRECISION)
        if NORMALIZE:
            along_q += tl.sum(x * q.to(tl.float32), 1)
            along_k += tl.sum(y * k.to(tl.float32), 1)
            if N == BN:
                x -= q.to(tl.float32) * (along_q * tl.load(rows_ptr + here * 256 + rows))[:, None]
                y -= k.to(tl.float32) * (along_k * tl.load(rows_ptr + here * 256 + 64 + rows))[:, None]
        tl.store(dq_ptr + part * BN + at_out, x.to(dq_ptr.dtype.element_ty), mask=inside)
        tl.store(dk_ptr + part * BN + at_out, y.to(dk_ptr.dtype.element_ty), mask=inside)

    if NORMALIZE and N != BN:
        tl.debug_barrier()  # the gradients stored above are read again by other threads
        along_q *= tl.load(rows_ptr + here * 256 + rows)
        along_k *= tl.load(rows_ptr + here * 256 + 64 + rows)
        for part in range(key_size // BN):
            q = tl.load(q_ptr + part * BN + at, mask=inside, other=0.0).to(tl.float32)
            x = tl.load(dq_ptr + part * BN + at_out, mask=inside, other=0.0).to(tl.float32) - q * along_q[:, None]
            tl.store(dq_ptr + part * BN + at_out, x.to(dq_ptr.dtype.element_ty), mask=inside)
            k = tl.load(k_ptr + part * BN + at, mask=inside, other=0.0).to(tl.float32)
            y = tl.load(dk_ptr + part * BN + at_out, mask=inside, other=0.0).to(tl.float32) - k * along_k[:, None]
            tl.store(dk_ptr + part * BN + at_out, y.to(dk_ptr.dtype.element_ty), mask=inside)

    at_t = (first + rows) * H + h
    live = chunk * 64 + rows < T
    w = tl.zeros([64], tl.float32)
    for part in tl.static_range(PARTS):
        w += tl.load(written_ptr + (here * PARTS + part) * 64 + rows)
    w *= tl.load(rows_ptr + here * 256 + 128 + rows)
    dbeta = tl.load(dbeta_pairs_ptr + at_t, mask=live) + w
    tl.store(dbeta_ptr + at_t, dbeta, mask=live)
    w *= tl.load(rows_ptr + here * 256 + 192 + rows)
    dg = tl.load(dg_pairs_ptr + at_t, mask=live) + tl.sum(dcarry, 0) * tl.load(factors_ptr + here * 256 + 192)
    dg += tl.sum(tl.where(i <= j, dread[None, :], 0.0) + tl.where(i > j, w[None, :], 0.0), 1)
    tl.store(dg_ptr + at_t, dg, mask=live)


def gradients(
    q, k, g, beta, runs, r, do, dv, states, dstates, written, factors, *, scale, normalize
) -> tuple[Any, ...]:
    """(dq, dk [B,T,H,N] of each value head, dg, dbeta [B,T,H] float32)."""
    B, T, K, N = k.shape
    H, V = r.shape[2:]
    chunks = ceil_div(T, CHUNK)
    per_head = jax.ShapeDtypeStruct((B, T, H, N), k.dtype if H == K else jnp.float32)
    gates = jax.ShapeDtypeStruct((B, T, H), jnp.float32)
    square = jax.ShapeDtypeStruct((B, H, chunks, CHUNK, CHUNK), k.dtype)
    options: dict[str, Any] = dict(H=H, K=K, N=N, V=V, NORMALIZE=normalize, PRECISION=precision(k.dtype))
    tile = choose("pairs", N)
    pairs = triton_call(
        _pairs, q, k, g, beta, runs, r, do, dv, T, scale, N, V,
        out_shape=(square, square, jax.ShapeDtypeStruct((B, H, chunks, 4, CHUNK), jnp.float32), gates, gates),
        grid=(chunks, B * H), num_warps=tile.warps, num_stages=tile.stages, RUNS=runs is not None, **options,
    )  # fmt: skip
    tile = choose("gradients", N)
    return triton_call(
        _gradients, q, k, r, do, dv, states, dstates, written, factors, *pairs, T, N, V,
        out_shape=(per_head, per_head, gates, gates),
        grid=(chunks, B * H), num_warps=tile.warps, num_stages=tile.stages, BN=tile.block,
        PARTS=written.shape[3], **options,
    )  # fmt: skip
