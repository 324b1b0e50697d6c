"""The gated delta rule's backward pass in Triton: two scans over the chunks, then every chunk's gradients at once.

With the forward pass's A, P, r and state S before the chunk, D the gradient of the state after it, and dy that of
y = v - exp(c) k S (which is dv):

    w  = P^T do + exp(c_last - c) beta k D          (beta times the gradient of u = beta r)
    dy = A^T w
    D <- exp(c_last) D + scale (exp(c) q)^T do - (exp(c) k)^T dy

The scans write S and D of every chunk, transposed. In the last kernel p_ij = do_i.r_j P_ij / beta_j, l_ij = dy_i.r_j
L_ij / beta_j and w_j = exp(c_last - c_j) r_j.(k_j D) give dbeta_j = sum_i (p_ij - l_ij) + w_j without a division, and
dg beside it. No dot takes the transpose of another dot's result (Triton 3.4 to 3.7 gets that wrong on
Hopper): where both a product and its transpose are needed, both are computed from memory.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.gated_delta_rule.triton import BLOCK_V, CHUNK, end_of_chunk, load_gates, precision
from pallas_kernels.tiles import ceil_div
from pallas_kernels.triton_call import jit, tl, triton_call


@jit
def _states(
    k_ptr, r_ptr, factors_ptr, initial_ptr, T, states_ptr,
    H: tl.constexpr, K: tl.constexpr, N: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    INITIAL: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    NT = tl.cdiv(T, 64)
    rows, n = tl.arange(0, 64), tl.arange(0, N)
    columns = tl.program_id(0) * BV + tl.arange(0, BV)
    state = tl.zeros([BV, N], tl.float32)
    if INITIAL:
        state += tl.load(initial_ptr + bh * N * V + n[None, :] * V + columns[:, None])
    at_k = (b * T * K + h // (H // K)) * N + rows[:, None] * (K * N) + n[None, :]
    at_v = (b * T * H + h) * V + rows[None, :] * (H * V) + columns[:, None]
    factors = factors_ptr + bh * NT * 256 + rows
    out = states_ptr + bh * NT * V * N + columns[:, None] * N + n[None, :]
    dtype = k_ptr.dtype.element_ty
    for chunk in range(NT):
        tl.store(out, state.to(dtype))
        if EVEN:
            k = tl.load(k_ptr + at_k)
            r = tl.load(r_ptr + at_v)
        else:
            inside = (chunk * 64 + rows) < T
            k = tl.load(k_ptr + at_k, mask=inside[:, None], other=0.0)
            r = tl.load(r_ptr + at_v, mask=inside[None, :], other=0.0)
        state *= tl.load(factors_ptr + (bh * NT + chunk) * 256 + 192)
        written = (r.to(tl.float32) * tl.load(factors + 128)[None, :]).to(dtype)
        state = tl.dot(written, k, state, input_precision=PRECISION)
        at_k += 64 * K * N
        at_v += 64 * H * V
        factors += 256
        out += V * N


@jit
def _reverse_scan(
    q_ptr, k_ptr, do_ptr, inverse_ptr, scores_ptr, factors_ptr, dfinal_ptr, T,
    dstates_ptr, dv_ptr, dinitial_ptr,
    H: tl.constexpr, K: tl.constexpr, N: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    NT = tl.cdiv(T, 64)
    rows, n = tl.arange(0, 64), tl.arange(0, N)
    columns = tl.program_id(0) * BV + tl.arange(0, BV)
    at_state = bh * N * V + n[None, :] * V + columns[:, None]
    dstate = tl.load(dfinal_ptr + at_state)
    first = b * T + (NT - 1) * 64
    at_k = (first * K + h // (H // K)) * N + rows[:, None] * (K * N) + n[None, :]
    at_v = (first * H + h) * V + rows[None, :] * (H * V) + columns[:, None]
    last = bh * NT + NT - 1
    square = last * 4096 + rows[:, None] * 64 + rows[None, :]
    factors = factors_ptr + last * 256
    out = dstates_ptr + last * V * N + columns[:, None] * N + n[None, :]
    dtype = k_ptr.dtype.element_ty
    for step in range(NT):
        low = dstate.to(dtype)
        tl.store(out, low)
        if EVEN:
            k = tl.load(k_ptr + at_k)
            q = tl.load(q_ptr + at_k)
            do = tl.load(do_ptr + at_v)
        else:
            inside = ((NT - 1 - step) * 64 + rows) < T
            k = tl.load(k_ptr + at_k, mask=inside[:, None], other=0.0)
            q = tl.load(q_ptr + at_k, mask=inside[:, None], other=0.0)
            do = tl.load(do_ptr + at_v, mask=inside[None, :], other=0.0)
        inverse = tl.load(inverse_ptr + square)
        scores = tl.load(scores_ptr + square)
        w = tl.dot(low, tl.trans(k), input_precision=PRECISION) * tl.load(factors + 128 + rows)[None, :]
        w = tl.dot(do, scores, w, input_precision=PRECISION)
        dy = tl.dot(w.to(dtype), inverse, input_precision=PRECISION)
        dstate *= tl.load(factors + 192)
        read = (do.to(tl.float32) * tl.load(factors + 64 + rows)[None, :]).to(dtype)
        dstate = tl.dot(read, q, dstate, input_precision=PRECISION)
        erased = (dy * -tl.load(factors + rows)[None, :]).to(dtype)
        dstate = tl.dot(erased, k, dstate, input_precision=PRECISION)
        if EVEN:
            tl.store(dv_ptr + at_v, dy.to(dv_ptr.dtype.element_ty))
        else:
            inside = ((NT - 1 - step) * 64 + rows) < T
            tl.store(dv_ptr + at_v, dy.to(dv_ptr.dtype.element_ty), mask=inside[None, :])
        at_k -= 64 * K * N
        at_v -= 64 * H * V
        square -= 4096
        factors -= 256
        out -= V * N
    tl.store(dinitial_ptr + at_state, dstate)


@jit
def _product(left_ptr, right_ptr, at, inside, size, PRECISION: tl.constexpr):
    """left right^T of two [64, size] in memory, at the offsets ``at`` of their first 64 columns."""
    result = tl.zeros([64, 64], tl.float32)
    for part in range(size // 64):
        left = tl.load(left_ptr + at + part * 64, mask=inside, other=0.0)
        right = tl.load(right_ptr + at + part * 64, mask=inside, other=0.0)
        result = tl.dot(left, tl.trans(right), result, input_precision=PRECISION)
    return result


@jit
def _inverse_norm(x_ptr, at, inside, size, NORMALIZE: tl.constexpr):
    """1 / sqrt(sum x^2 + 1e-6) of each row of a [64, size] in memory, or ones."""
    total = tl.zeros([64], tl.float32)
    if NORMALIZE:
        for part in range(size // 64):
            x = tl.load(x_ptr + at + part * 64, mask=inside, other=0.0).to(tl.float32)
            total += tl.sum(x * x, 1)
        total = tl.rsqrt(total + 1e-6)
    else:
        total += 1.0
    return total


@jit
def _times_state(
    x_ptr, states, at_v, inside, size,
    N: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x [64, size] against a transposed state [size, BN]."""
    result = tl.zeros([64, BN], tl.float32)
    for block in range(size // 64):
        x = tl.load(x_ptr + at_v + block * 64, mask=inside, other=0.0)
        state = tl.load(states + block * 64 * N)
        result = tl.dot(x, state, result, input_precision=PRECISION)
    return result


@jit
def _undo_norm(x, dx, along, rstd):
    """The gradient of raw x from dx, that of x rstd, and along = sum(x rstd dx) of each row."""
    return (dx - x.to(tl.float32) * (rstd * along)[:, None]) * rstd[:, None]


@jit
def _gradients(
    q_ptr, k_ptr, g_ptr, beta_ptr, run_ptr, r_ptr, do_ptr, dv_ptr, states_ptr, dstates_ptr,
    T, scale, key_size, value_size,
    dq_ptr, dk_ptr, dg_ptr, dbeta_ptr,
    H: tl.constexpr, K: tl.constexpr, N: tl.constexpr, V: tl.constexpr, BN: tl.constexpr,
    NORMALIZE: tl.constexpr, RUNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    chunk, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    NT = tl.cdiv(T, 64)
    rows, n, columns = tl.arange(0, 64), tl.arange(0, BN), tl.arange(0, 64)
    i, j = rows[:, None], rows[None, :]
    inside = (chunk * 64 + i) < T
    dtype = k_ptr.dtype.element_ty
    coarse, fine, beta, run, before = load_gates(g_ptr, beta_ptr, run_ptr, T, b, h, chunk, H, RUNS)
    coarse_end, fine_end = end_of_chunk(coarse, fine)
    read, carry = tl.exp(coarse + fine), tl.exp(coarse_end + fine_end)
    write = tl.exp((coarse_end - coarse) + (fine_end - fine))
    sees = i >= j
    seen = i <= j
    if RUNS:
        last_run = tl.max(run, 0)
        read = tl.where(run == before, read, 0.0)
        write = tl.where(run == last_run, write, 0.0)
        carry = tl.where(last_run == before, carry, 0.0)
        sees = sees & (run[:, None] == run[None, :])
        seen = seen & (run[:, None] == run[None, :])
    at = ((b * T + chunk * 64 + i) * K + h // (H // K)) * N + n[None, :]
    at_v = ((b * T + chunk * 64 + i) * H + h) * V + columns[None, :]
    at_out = ((b * T + chunk * 64 + i) * H + h) * N + n[None, :]
    at_state = (bh * NT + chunk) * V * N + columns[:, None] * N + n[None, :]

    # key_size and value_size are N and V again as run-time values: loops of known length would be unrolled and all
    # their loads moved to the front, far beyond the registers.
    # Token against token: row i sees column j. One product after another keeps the registers few.
    rq = _inverse_norm(q_ptr, at, inside, key_size, NORMALIZE)
    rk = _inverse_norm(k_ptr, at, inside, key_size, NORMALIZE)
    apart = (coarse[:, None] - coarse[None, :]) + (fine[:, None] - fine[None, :])
    decay = tl.exp(tl.where(sees, apart, float("-inf"))) * rk[None, :]
    grad = _product(do_ptr, r_ptr, at_v, inside, value_size, PRECISION) * decay * scale
    to_q = (grad * beta[None, :]).to(dtype)
    pairs = _product(q_ptr, k_ptr, at, inside, key_size, PRECISION) * grad * rq[:, None]
    grad = _product(dv_ptr, r_ptr, at_v, inside, value_size, PRECISION) * tl.where(i > j, decay, 0.0)
    to_k = grad * -beta[None, :]
    pairs -= _product(k_ptr, k_ptr, at, inside, key_size, PRECISION) * grad * rk[:, None]
    dbeta = tl.sum(pairs, 0)
    # dg_t is the sum over the pairs i >= t > j. As a running sum of the gradient of c it would drown, where decays are
    # strong, in terms that cancel.
    pairs = tl.where(i > j, pairs * beta[None, :], 0.0)
    later = tl.dot(tl.where(i <= j, 1.0, 0.0), pairs, input_precision=PRECISION)
    dg = tl.sum(tl.where(i > j, later, 0.0), 1)
    # The same pairs transposed: row i is seen by column j.
    decay = tl.exp(tl.where(seen, -apart, float("-inf"))) * beta[:, None]
    grad = _product(r_ptr, dv_ptr, at_v, inside, value_size, PRECISION)
    to_k = (to_k - grad * tl.where(i < j, decay, 0.0) * rk[None, :]).to(dtype)
    grad = _product(r_ptr, do_ptr, at_v, inside, value_size, PRECISION)
    from_q = (grad * decay * (rq * scale)[None, :]).to(dtype)

    # Token against state, a part of the key head at a time.
    w = tl.zeros([64], tl.float32)
    dread = tl.zeros([64], tl.float32)
    along_q = tl.zeros([64], tl.float32)
    along_k = tl.zeros([64], tl.float32)
    dcarry = tl.zeros([BN], tl.float32)
    for part in range(key_size // BN):
        states = states_ptr + at_state + part * BN
        dstates = dstates_ptr + at_state + part * BN
        q = tl.load(q_ptr + at + part * BN, mask=inside, other=0.0)
        k = tl.load(k_ptr + at + part * BN, mask=inside, other=0.0)
        dq = _times_state(do_ptr, states, at_v, inside, value_size, N, BN, PRECISION) * (read * scale)[:, None]
        dread += tl.sum(dq * q.to(tl.float32), 1) * rq
        dq = tl.dot(to_q, k, dq, input_precision=PRECISION)
        if NORMALIZE:
            along_q += tl.sum(dq * q.to(tl.float32), 1) * rq
            if N == BN:
                dq = _undo_norm(q, dq, along_q, rq)
        tl.store(dq_ptr + at_out + part * BN, dq.to(dq_ptr.dtype.element_ty), mask=inside)

        dk = _times_state(dv_ptr, states, at_v, inside, value_size, N, BN, PRECISION) * -read[:, None]
        dread += tl.sum(dk * k.to(tl.float32), 1) * rk
        dk = tl.dot(from_q, q, dk, input_precision=PRECISION)
        dk = tl.dot(to_k, k, dk, input_precision=PRECISION)
        dwrite = _times_state(r_ptr, dstates, at_v, inside, value_size, N, BN, PRECISION) * write[:, None]
        w += tl.sum(dwrite * k.to(tl.float32), 1) * rk
        dk += dwrite * beta[:, None]
        if NORMALIZE:
            along_k += tl.sum(dk * k.to(tl.float32), 1) * rk
            if N == BN:
                dk = _undo_norm(k, dk, along_k, rk)
        tl.store(dk_ptr + at_out + part * BN, dk.to(dk_ptr.dtype.element_ty), mask=inside)
        for block in range(value_size // 64):
            state = tl.load(states + block * 64 * N).to(tl.float32)
            dcarry += tl.sum(state * tl.load(dstates + block * 64 * N).to(tl.float32), 0)

    dbeta += w
    dg += tl.sum(tl.where(i <= j, dread[None, :], 0.0), 1) + tl.sum(tl.where(i > j, (beta * w)[None, :], 0.0), 1)
    dg += tl.sum(dcarry, 0) * carry
    at_t = (b * T + chunk * 64 + rows) * H + h
    tl.store(dg_ptr + at_t, dg, mask=chunk * 64 + rows < T)
    tl.store(dbeta_ptr + at_t, dbeta, mask=chunk * 64 + rows < T)

    if NORMALIZE and N != BN:
        tl.debug_barrier()  # the gradients stored above are read again by other threads
        for part in range(key_size // BN):
            q = tl.load(q_ptr + at + part * BN, mask=inside, other=0.0)
            k = tl.load(k_ptr + at + part * BN, mask=inside, other=0.0)
            dq = tl.load(dq_ptr + at_out + part * BN, mask=inside, other=0.0).to(tl.float32)
            dk = tl.load(dk_ptr + at_out + part * BN, mask=inside, other=0.0).to(tl.float32)
            dq = _undo_norm(q, dq, along_q, rq)
            dk = _undo_norm(k, dk, along_k, rk)
            tl.store(dq_ptr + at_out + part * BN, dq.to(dq_ptr.dtype.element_ty), mask=inside)
            tl.store(dk_ptr + at_out + part * BN, dk.to(dk_ptr.dtype.element_ty), mask=inside)


def _chunk_states(k, r, factors, initial_state) -> jax.Array:
    """The state before each chunk, transposed: [B,H,chunks,V,N] in the dtype of k."""
    B, T, K, N = k.shape
    H, V = r.shape[2:]
    return triton_call(
        _states, k, r, factors, initial_state, T,
        out_shape=jax.ShapeDtypeStruct((B, H, ceil_div(T, CHUNK), V, N), k.dtype),
        grid=(V // BLOCK_V, B * H), num_warps=4, num_stages=3,
        H=H, K=K, N=N, V=V, BV=BLOCK_V, INITIAL=initial_state is not None, EVEN=T % CHUNK == 0,
        PRECISION=precision(k.dtype),
    )  # fmt: skip


def _scan_back(q, k, do, inverse, scores, factors, dfinal_state) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(gradient of the state after each chunk, transposed [B,H,chunks,V,N]; dv; dinitial_state)."""
    B, T, K, N = k.shape
    H, V = do.shape[2:]
    return triton_call(
        _reverse_scan, q, k, do, inverse, scores, factors, dfinal_state, T,
        out_shape=(
            jax.ShapeDtypeStruct((B, H, ceil_div(T, CHUNK), V, N), k.dtype),
            jax.ShapeDtypeStruct(do.shape, do.dtype),
            jax.ShapeDtypeStruct((B, H, N, V), jnp.float32),
        ),
        grid=(V // BLOCK_V, B * H), num_warps=4, num_stages=2,
        H=H, K=K, N=N, V=V, BV=BLOCK_V, EVEN=T % CHUNK == 0, PRECISION=precision(k.dtype),
    )  # fmt: skip


def _gradients_within(q, k, g, beta, runs, r, do, dv, states, dstates, *, scale, normalize):
    """(dq, dk [B,T,H,N] of each value head, dg, dbeta [B,T,H] float32)."""
    B, T, K, N = k.shape
    H, V = r.shape[2:]
    per_head = jax.ShapeDtypeStruct((B, T, H, N), k.dtype if H == K else jnp.float32)
    gates = jax.ShapeDtypeStruct((B, T, H), jnp.float32)
    return triton_call(
        _gradients, q, k, g, beta, runs, r, do, dv, states, dstates, T, scale, N, V,
        out_shape=(per_head, per_head, gates, gates),
        grid=(ceil_div(T, CHUNK), B * H), num_warps=4, num_stages=1,
        H=H, K=K, N=N, V=V, BN=64, NORMALIZE=normalize, RUNS=runs is not None, PRECISION=precision(k.dtype),
    )  # fmt: skip


def backward(q, k, g, beta, runs, initial_state, residuals, do, dfinal_state, *, scale, normalize) -> tuple[Any, ...]:
    """(dq, dk, dv, dg, dbeta, dinitial_state); the protocol is in ``api``."""
    inverse, scores, factors, r = residuals
    states = _chunk_states(k, r, factors, initial_state)
    dstates, dv, dinitial = _scan_back(q, k, do, inverse, scores, factors, dfinal_state)
    dq, dk, dg, dbeta = _gradients_within(
        q, k, g, beta, runs, r, do, dv, states, dstates, scale=scale, normalize=normalize
    )
    if dq.shape != q.shape:
        grouped = (*q.shape[:3], dq.shape[2] // q.shape[2], q.shape[3])
        dq, dk = (x.reshape(grouped).sum(3).astype(q.dtype) for x in (dq, dk))
    return dq, dk, dv, dg, dbeta, None if initial_state is None else dinitial
