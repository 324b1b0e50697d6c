"""The gated delta rule's backward pass in Triton: a scan back over the chunks, then every chunk's gradients at once.

With the forward pass's A, P, r and state S before the chunk, D the gradient of the state after it, and dy that of
y = v - exp(c) k S (which is dv):

    w  = P^T do + exp(c_last - c) beta k D          (beta times the gradient of u = beta r)
    dy = A^T w
    D <- exp(c_last) D + scale (exp(c) q)^T do - (exp(c) k)^T dy

The forward scan wrote S of every chunk, this one writes D, both transposed; ``triton_gradients`` does the rest, from
p_ij = do_i.r_j P_ij / beta_j, l_ij = dy_i.r_j L_ij / beta_j and d_j = exp(c_last - c_j) r_j.(k_j D), which give
dbeta_j = sum_i (p_ij - l_ij) + d_j without a division, and dg beside it. The inner products r_j.(k_j D) are formed
here, with 16 bits of D and of r, which the forward scan kept in two summands for it: where few tokens survive their
decays these products are nearly all of dg and dbeta, and 8 bits of either factor are too few for them.
"""

# mypy: disable-error-code="assignment, var-annotated"
# (Tuples grow in loops that Triton unrolls.)
from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.gated_delta_rule import segments as split
from pallas_kernels.gated_delta_rule import triton_split
from pallas_kernels.gated_delta_rule.triton import CHUNK, dot_in_pairs, load_rows, precision, store_rows
from pallas_kernels.gated_delta_rule.triton_gradients import gradients
from pallas_kernels.gated_delta_rule.triton_tiles import choose
from pallas_kernels.tiles import ceil_div
from pallas_kernels.triton_call import jit, tl, triton_call


@jit
def _reverse_scan(
    q_ptr, k_ptr, r_ptr, rest_ptr, do_ptr, inverse_ptr, scores_ptr, factors_ptr, dfinal_ptr, T, length,
    dstates_ptr, dv_ptr, written_ptr, dinitial_ptr,
    H: tl.constexpr, K: tl.constexpr, N: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr,
    SEGMENTS: tl.constexpr, ENDS: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As the forward scan: with ENDS only D before each segment but the first, from zeros after all but the last."""
    bh, segment = tl.program_id(1).to(tl.int64), tl.program_id(2)
    if ENDS:
        segment += 1
    b, h = bh // H, bh % H
    NT = tl.cdiv(T, 64)
    end = tl.minimum((segment + 1) * length, NT)
    rows, n = tl.arange(0, 64), tl.arange(0, BN)
    columns = tl.program_id(0) * BV + tl.arange(0, BV)
    at_state = bh * N * V + n[None, :] * V + columns[:, None]
    dstate = ()
    for part in tl.static_range(N // BN):
        if ENDS:
            mask = (segment == SEGMENTS - 1) & (columns[:, None] < V)
            dstate += (tl.load(dfinal_ptr + at_state + part * BN * V, mask=mask, other=0.0),)
        elif SEGMENTS > 1:
            at = ((bh * SEGMENTS + segment) * V + columns[:, None]) * N + part * BN + n[None, :]
            dstate += (tl.load(dfinal_ptr + at),)
        else:
            dstate += (tl.load(dfinal_ptr + at_state + part * BN * V),)
    start = b * T + (end - 1) * 64
    at_k = (start * K + h // (H // K)) * N + rows[:, None] * (K * N) + n[None, :]
    at_v = (start * H + h) * V + rows[None, :] * (H * V) + columns[:, None]
    last = bh * NT + end - 1
    square = last * 4096 + rows[:, None] * 64 + rows[None, :]
    factors = factors_ptr + last * 256
    out = dstates_ptr + last * V * N + columns[:, None] * N + n[None, :]
    written = written_ptr + (last * (V // BV) + tl.program_id(0)) * 64 + rows
    dtype = k_ptr.dtype.element_ty
    for step in range(end - segment * length):
        inside = ((end - 1 - step) * 64 + rows) < T
        seen = tl.zeros([BV, 64], tl.float32)
        keys = ()
        for part in tl.static_range(N // BN):
            low = dstate[part].to(dtype)
            if not ENDS:
                tl.store(out + part * BN, low)
            k = load_rows(k_ptr + at_k + part * BN, inside[:, None], EVEN)
            rest = (dstate[part] - low.to(tl.float32)).to(dtype)
            seen = tl.dot(rest, tl.trans(k), seen, input_precision=PRECISION)
            seen = tl.dot(low, tl.trans(k), seen, input_precision=PRECISION)
            keys += (k,)
        do = load_rows(do_ptr + at_v, inside[None, :], EVEN)
        inverse = tl.load(inverse_ptr + square)
        scores = tl.load(scores_ptr + square)
        if not ENDS:
            r = load_rows(r_ptr + at_v, inside[None, :], EVEN).to(tl.float32)
            r += load_rows(rest_ptr + at_v, inside[None, :], EVEN).to(tl.float32)
            tl.store(written, tl.sum(seen * r, 0))
        w = tl.dot(do, scores, seen * tl.load(factors + 128 + rows)[None, :], input_precision=PRECISION)
        dy = dot_in_pairs(w, inverse, tl.zeros([BV, 64], tl.float32), PRECISION)
        read = (do.to(tl.float32) * tl.load(factors + 64 + rows)[None, :]).to(dtype)
        erased = dy * -tl.load(factors + rows)[None, :]
        before = ()
        for part in tl.static_range(N // BN):
            q = load_rows(q_ptr + at_k + part * BN, inside[:, None], EVEN)
            d = tl.dot(read, q, dstate[part] * tl.load(factors + 192), input_precision=PRECISION)
            before += (dot_in_pairs(erased, keys[part], d, PRECISION),)
        dstate = before
        if not ENDS:
            store_rows(dv_ptr + at_v, dy, inside[None, :], EVEN)
        at_k -= 64 * K * N
        at_v -= 64 * H * V
        square -= 4096
        factors -= 256
        out -= V * N
        written -= V // BV * 64
    for part in tl.static_range(N // BN):
        if ENDS:
            link = bh * (SEGMENTS - 1) + segment - 1
            tl.store(dinitial_ptr + (link * V + columns[:, None]) * N + part * BN + n[None, :], dstate[part])
        elif segment == 0:
            tl.store(dinitial_ptr + at_state + part * BN * V, dstate[part])


def _launch_scan(q, k, r, rest, do, inverse, scores, factors, dfinal, outputs, plan, tile, *, ends: bool):
    B, T, K, N = k.shape
    H, V = do.shape[2:]
    return triton_call(
        _reverse_scan, q, k, r, rest, do, inverse, scores, factors, dfinal, T, plan.length, out_shape=outputs,
        grid=(V // tile.block, B * H, plan.segments - 1 if ends else plan.segments),
        num_warps=tile.warps, num_stages=tile.stages, H=H, K=K, N=N, V=V, BV=tile.block, BN=min(N, tile.keys),
        SEGMENTS=plan.segments,
        ENDS=ends, EVEN=T % CHUNK == 0, PRECISION=precision(k.dtype),
    )  # fmt: skip


def _scan_back(q, k, r, rest, do, inverse, scores, factors, transitions, dfinal) -> tuple[jax.Array, ...]:
    """(gradient of the state after each chunk, transposed [B,H,chunks,V,N]; dv; r.(k D); dinitial_state).

    r.(k D) is a sum over values, here in parts of some of them: [B,H,chunks,parts,64] float32.
    """
    B, T, _, N = k.shape
    H, V = do.shape[2:]
    chunks = ceil_div(T, CHUNK)
    plan = split.plan(B * H * V // 64, chunks, wanted=256)
    tile = choose("reverse_scan", N, B * H * plan.segments * V)
    arrays = (q, k, r, rest, do, inverse, scores, factors)
    if plan.segments > 1:
        small = jax.ShapeDtypeStruct((B, 1), k.dtype)
        ends = jax.ShapeDtypeStruct((B, H, plan.segments - 1, V, N), jnp.float32)
        *_, ends = _launch_scan(*arrays, dfinal, (small, small, small, ends), plan, tile, ends=True)
        dfinal = triton_split.join(dfinal, ends, transitions, backwards=True)
    outputs = (
        jax.ShapeDtypeStruct((B, H, chunks, V, N), k.dtype),
        jax.ShapeDtypeStruct(do.shape, do.dtype),
        jax.ShapeDtypeStruct((B, H, chunks, V // tile.block, CHUNK), jnp.float32),
        jax.ShapeDtypeStruct((B, H, N, V), jnp.float32),
    )
    return _launch_scan(*arrays, dfinal, outputs, plan, tile, ends=False)


def backward(q, k, g, beta, runs, initial_state, residuals, do, dfinal_state, *, scale, normalize) -> tuple[Any, ...]:
    """(dq, dk, dv, dg, dbeta, dinitial_state); the protocol is in ``api``."""
    r, rest, inverse, scores, factors, states, transitions = residuals
    dstates, dv, written, dinitial = _scan_back(q, k, r, rest, do, inverse, scores, factors, transitions, dfinal_state)
    dq, dk, dg, dbeta = gradients(
        q, k, g, beta, runs, r, do, dv, states, dstates, written, factors, scale=scale, normalize=normalize
    )
    if dq.shape != q.shape:
        grouped = (*q.shape[:3], dq.shape[2] // q.shape[2], q.shape[3])
        dq, dk = (x.reshape(grouped).sum(3).astype(q.dtype) for x in (dq, dk))
    return dq, dk, dv, dg, dbeta, None if initial_state is None else dinitial
