"""The gated delta rule's forward pass in Triton: within chunks of 64 tokens in parallel, then a scan over the chunks.

With c the running sum of the log decays g inside a chunk, S the state before it, and all rows of q, k normalised:

    A    = (I + L)^-1,  L_ij = exp(c_i - c_j) k_i.k_j beta_j    (i > j)
    P_ij = scale exp(c_i - c_j) q_i.k_j beta_j                  (i >= j)
    r    = A (v - exp(c) k S)                                   (u = beta r)
    o    = scale exp(c) q S + P r
    S   <- exp(c_last) S + (exp(c_last - c) beta k)^T r

(Yang, Kautz, Hatamizadeh: Gated Delta Networks, 2024, section 3.3.) The first kernel writes A, P and four rows of
factors per chunk; everything that concerns normalisation, padding and document boundaries is inside those, so that the
scan is dots alone. The scan holds S transposed, [V, N]: then every intermediate result is the left operand of the next
dot and stays in registers. It holds it as N // BN arrays of BN key columns each, one after another the left operand of
a dot, which are never all in registers beside S then.
"""

# mypy: disable-error-code="assignment, var-annotated"
# (Tuples grow in loops that Triton unrolls.)
from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.arguments import Arguments
from pallas_kernels.batching import fold_batch
from pallas_kernels.gated_delta_rule import segments as split
from pallas_kernels.gated_delta_rule import triton_split
from pallas_kernels.gated_delta_rule.triton_tiles import HEAD_SIZES, choose
from pallas_kernels.tiles import ceil_div
from pallas_kernels.triton_call import check_installed, interpreting, jit, tl, triton_call

CHUNK = 64


@jit
def load_gates(g_ptr, beta_ptr, run_ptr, T, b, h, chunk, H: tl.constexpr, RUNS: tl.constexpr):
    """One chunk's (running log decay as two summands, beta, run of each token, run of the state before the chunk).

    A difference of running sums loses small decays that follow large ones. So the sum comes in two parts: one of
    multiples of 1/16, exact because logarithms stop at -100 (a decay below that is zero in float32), and the rest.
    """
    t = chunk * 64 + tl.arange(0, 64)
    inside = t < T
    at = (b * T + t) * H + h
    g = tl.load(g_ptr + at, mask=inside, other=0.0)
    beta = tl.load(beta_ptr + at, mask=inside, other=0.0)
    run = tl.full([64], 0, tl.int32)
    before = 0
    if RUNS:
        run = tl.load(run_ptr + b * T + tl.minimum(t, T - 1))
        before = tl.load(run_ptr + b * T + tl.maximum(chunk * 64 - 1, 0))
        before = tl.where(chunk > 0, before, 0)
    g = tl.maximum(g, -100.0)
    coarse = tl.floor(g * 16.0 + 0.5) * 0.0625
    return tl.cumsum(coarse, 0), tl.cumsum(g - coarse, 0), beta, run, before


@jit
def end_of_chunk(coarse, fine):
    """The running sum's two parts at the last token."""
    is_last = tl.arange(0, 64) == 63
    return tl.sum(tl.where(is_last, coarse, 0.0), 0), tl.sum(tl.where(is_last, fine, 0.0), 0)


@jit
def invert_unit_lower(lower, PRECISION: tl.constexpr, HALF: tl.constexpr):
    """(I + lower)^-1 of a strictly lower [64, 64] by doubling diagonal blocks: X <- X - X L X.

    Kept as X = I - Y, so that the dots round only corrections to L. With HALF their operands are float16, which has the
    precision of tf32 at twice its speed; normalised keys and beta at most 2 bound all entries by 2.
    """
    i = tl.arange(0, 64)[:, None]
    j = tl.arange(0, 64)[None, :]
    y = tl.where((i // 2) == (j // 2), lower, 0.0)
    for level in tl.static_range(1, 6):
        size = 1 << level
        right = tl.where(((i // (2 * size)) == (j // (2 * size))) & ((i // size) != (j // size)), lower, 0.0)
        if HALF:
            low = y.to(tl.float16)
            right -= tl.dot(right.to(tl.float16), low)
            y += right - tl.dot(low, right.to(tl.float16))
        else:
            right -= tl.dot(right, y, input_precision=PRECISION)
            y += right - tl.dot(y, right, input_precision=PRECISION)
    return tl.where(i == j, 1.0, 0.0) - y


@jit
def dot_in_pairs(left, right, into, PRECISION: tl.constexpr):
    """into + left right, with ``left`` float32 as the sum of two of the dtype of ``right``: 16 bits of it, not 8."""
    high = left.to(right.dtype)
    into = tl.dot(high, right, into, input_precision=PRECISION)
    if right.dtype == tl.float32:
        return into
    else:
        return tl.dot((left - high.to(tl.float32)).to(right.dtype), right, into, input_precision=PRECISION)


@jit
def load_rows(at, inside, WHOLE: tl.constexpr):
    """What is at ``at``, with zeros where not ``inside``, unless the chunk is whole."""
    if WHOLE:
        return tl.load(at)
    else:
        return tl.load(at, mask=inside, other=0.0)


@jit
def store_rows(at, x, inside, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(at, x.to(at.dtype.element_ty))
    else:
        tl.store(at, x.to(at.dtype.element_ty), mask=inside)


@jit
def _within_chunks(
    q_ptr, k_ptr, g_ptr, beta_ptr, run_ptr, T, scale, key_size,
    inverse_ptr, scores_ptr, factors_ptr,
    H: tl.constexpr, K: tl.constexpr, N: tl.constexpr,
    NORMALIZE: tl.constexpr, RUNS: tl.constexpr, PRECISION: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    chunk, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    NT = tl.cdiv(T, 64)
    rows = tl.arange(0, 64)
    i, j = rows[:, None], rows[None, :]
    inside = (chunk * 64 + i) < T
    first = ((b * T + chunk * 64) * K + h // (H // K)) * N
    qk, kk = tl.zeros([64, 64], tl.float32), tl.zeros([64, 64], tl.float32)
    rq, rk = tl.zeros([64], tl.float32), tl.zeros([64], tl.float32)
    # key_size is N as a run-time value: a loop of known length would be unrolled, with all its loads in registers.
    for _ in range(key_size // 64):
        q = tl.load(q_ptr + first + i * (K * N) + j, mask=inside, other=0.0)
        k = tl.load(k_ptr + first + i * (K * N) + j, mask=inside, other=0.0)
        qk = tl.dot(q, tl.trans(k), qk, input_precision=PRECISION)
        kk = tl.dot(k, tl.trans(k), kk, input_precision=PRECISION)
        if NORMALIZE:
            rq += tl.sum(q.to(tl.float32) * q.to(tl.float32), 1)
            rk += tl.sum(k.to(tl.float32) * k.to(tl.float32), 1)
        first += 64
    if NORMALIZE:
        rq, rk = tl.rsqrt(rq + 1e-6) * scale, tl.rsqrt(rk + 1e-6)
    else:
        rq, rk = rq + scale, rk + 1.0
    coarse, fine, beta, run, before = load_gates(g_ptr, beta_ptr, run_ptr, T, b, h, chunk, H, RUNS)
    sees = i >= j
    if RUNS:
        sees = sees & (run[:, None] == run[None, :])
    apart = (coarse[:, None] - coarse[None, :]) + (fine[:, None] - fine[None, :])
    decay = tl.exp(tl.where(sees, apart, float("-inf"))) * (beta * rk)[None, :]

    tile = (bh * NT + chunk) * 4096 + i * 64 + j
    tl.store(scores_ptr + tile, (qk * decay * rq[:, None]).to(scores_ptr.dtype.element_ty))
    kk *= tl.where(i > j, decay * rk[:, None], 0.0)
    inverse = invert_unit_lower(kk, PRECISION, HALF)
    tl.store(inverse_ptr + tile, inverse.to(inverse_ptr.dtype.element_ty))

    coarse_end, fine_end = end_of_chunk(coarse, fine)
    read, carry = tl.exp(coarse + fine), tl.exp(coarse_end + fine_end)
    write = tl.exp((coarse_end - coarse) + (fine_end - fine)) * beta * rk
    if RUNS:
        last_run = tl.max(run, 0)
        read = tl.where(run == before, read, 0.0)
        write = tl.where(run == last_run, write, 0.0)
        carry = tl.where(last_run == before, carry, 0.0)
    factors = factors_ptr + (bh * NT + chunk) * 256 + rows
    tl.store(factors, read * rk)
    tl.store(factors + 64, read * rq)
    tl.store(factors + 128, write)
    tl.store(factors + 192, rows * 0.0 + carry)


@jit
def _scan_chunks(
    q_ptr, k_ptr, v_ptr, inverse_ptr, scores_ptr, factors_ptr, initial_ptr, T, length,
    o_ptr, r_ptr, rest_ptr, states_ptr, final_ptr,
    H: tl.constexpr, K: tl.constexpr, N: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr,
    INITIAL: tl.constexpr, SEGMENTS: tl.constexpr, ENDS: tl.constexpr, WRITES: tl.constexpr, STATES: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of values of a head, over one of SEGMENTS stretches of ``length`` chunks.

    With ENDS only the state after the segment is wanted, from zeros; further blocks start from rows of the identity and
    write nothing, which gives the segment's transition.
    """
    bh, segment = tl.program_id(1).to(tl.int64), tl.program_id(2)
    b, h = bh // H, bh % H
    NT = tl.cdiv(T, 64)
    first = segment * length
    rows, n = tl.arange(0, 64), tl.arange(0, BN)
    columns = tl.program_id(0) * BV + tl.arange(0, BV)
    state = ()
    for part in tl.static_range(N // BN):
        x = tl.zeros([BV, BN], tl.float32)
        if ENDS:
            x += tl.where(columns[:, None] - V == part * BN + n[None, :], 1.0, 0.0)
        elif SEGMENTS > 1:
            at = ((bh * SEGMENTS + segment) * V + columns[:, None]) * N + part * BN + n[None, :]
            x += tl.load(initial_ptr + at)
        elif INITIAL:
            x += tl.load(initial_ptr + bh * N * V + (part * BN + n[None, :]) * V + columns[:, None])
        state += (x,)
    at_k = ((b * T + first * 64) * K + h // (H // K)) * N + rows[:, None] * (K * N) + n[None, :]
    at_v = ((b * T + first * 64) * H + h) * V + rows[None, :] * (H * V) + columns[:, None]
    square = (bh * NT + first) * 4096 + rows[:, None] * 64 + rows[None, :]
    factors = factors_ptr + (bh * NT + first) * 256
    out = states_ptr + (bh * NT + first) * V * N + columns[:, None] * N + n[None, :]
    dtype = k_ptr.dtype.element_ty
    for chunk in range(first, tl.minimum(first + length, NT)):
        inside = (chunk * 64 + rows) < T
        seen, o = tl.zeros([BV, 64], tl.float32), tl.zeros([BV, 64], tl.float32)
        keys = ()
        for part in tl.static_range(N // BN):
            low = state[part].to(dtype)
            if STATES:
                tl.store(out + part * BN, low)
            k = load_rows(k_ptr + at_k + part * BN, inside[:, None], EVEN or ENDS)
            seen = tl.dot(low, tl.trans(k), seen, input_precision=PRECISION)
            keys += (k,)
            if not ENDS:
                q = load_rows(q_ptr + at_k + part * BN, inside[:, None], EVEN)
                o = tl.dot(low, tl.trans(q), o, input_precision=PRECISION)
        if ENDS:
            v = tl.load(v_ptr + at_v, mask=columns[:, None] < V, other=0.0)
        else:
            v = load_rows(v_ptr + at_v, inside[None, :], EVEN)
        inverse = tl.load(inverse_ptr + square)
        y = v.to(tl.float32) - seen * tl.load(factors + rows)[None, :]
        # In pairs: rows of A add many y that almost cancel where keys are alike, and without decay every write stays.
        r = dot_in_pairs(y, tl.trans(inverse), tl.zeros([BV, 64], tl.float32), PRECISION)
        if not ENDS:
            scores = tl.load(scores_ptr + square)
            o = dot_in_pairs(r, tl.trans(scores), o * tl.load(factors + 64 + rows)[None, :], PRECISION)
        if WRITES:
            store_rows(r_ptr + at_v, r, inside[None, :], EVEN)
        if STATES:
            store_rows(rest_ptr + at_v, r - r.to(dtype).to(tl.float32), inside[None, :], EVEN)
        written = r * tl.load(factors + 128 + rows)[None, :]
        after = ()
        for part in tl.static_range(N // BN):
            after += (dot_in_pairs(written, keys[part], state[part] * tl.load(factors + 192), PRECISION),)
        state = after
        if not ENDS:
            store_rows(o_ptr + at_v, o, inside[None, :], EVEN)
        at_k += 64 * K * N
        at_v += 64 * H * V
        square += 4096
        factors += 256
        out += V * N
    for part in tl.static_range(N // BN):
        if ENDS:
            at = (bh * (SEGMENTS - 1) + segment) * (V + N) + columns[:, None]
            tl.store(final_ptr + at * N + part * BN + n[None, :], state[part])
        elif segment == SEGMENTS - 1:
            tl.store(final_ptr + bh * N * V + (part * BN + n[None, :]) * V + columns[:, None], state[part])


def check(case: Any) -> None:
    """Raises UnsupportedCase unless these kernels do ``case``."""
    check_installed("gated_delta_rule")
    choice = Arguments("gated_delta_rule").choice
    if not interpreting():  # dots of float32 operands in full precision do not use the tensor cores
        choice("dtype", case.dtype, ("bfloat16", "float16"), "cast q, k and v or use implementation='xla'")
    choice("key head size", case.head_size, HEAD_SIZES, "use implementation='xla'")
    choice("value head size", case.value_size, (case.head_size, 2 * case.head_size), "use implementation='xla'")


def precision(dtype: Any) -> str:
    """float32 inputs get float32 dots; for bfloat16 inputs only the inverse is affected, and tf32 is enough for it."""
    return "ieee" if dtype == jnp.float32 else "tf32"


def within_chunks(q, k, g, beta, runs, *, scale: float, normalize: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(A, P [B,H,chunks,64,64] in the dtype of k, factors [B,H,chunks,4,64] float32) of every chunk.

    The factors' rows: what multiplies k S, what multiplies q S, what multiplies r before the write, and the carry.
    """
    B, T, K, N = k.shape
    H, chunks = g.shape[2], ceil_div(T, CHUNK)
    tile = choose("within", N)
    return triton_call(
        _within_chunks, q, k, g, beta, runs, T, scale, N,
        out_shape=(
            jax.ShapeDtypeStruct((B, H, chunks, CHUNK, CHUNK), k.dtype),
            jax.ShapeDtypeStruct((B, H, chunks, CHUNK, CHUNK), k.dtype),
            jax.ShapeDtypeStruct((B, H, chunks, 4, CHUNK), jnp.float32),
        ),
        grid=(chunks, B * H), num_warps=tile.warps, num_stages=tile.stages,
        H=H, K=K, N=N, NORMALIZE=normalize, RUNS=runs is not None, PRECISION=precision(k.dtype),
        HALF=normalize and k.dtype != jnp.float32,
    )  # fmt: skip


def _launch_scan(q, k, v, inverse, scores, factors, initial, outputs, plan, *, ends, writes=False, states=False):
    B, T, K, N = k.shape
    H, V = v.shape[2:]
    columns, segments = (V + N, plan.segments - 1) if ends else (V, plan.segments)
    tile = choose("scan", N, B * H * segments * columns)
    return triton_call(
        _scan_chunks, q, k, v, inverse, scores, factors, initial, T, plan.length, out_shape=outputs,
        grid=(columns // tile.block, B * H, segments), num_warps=tile.warps, num_stages=tile.stages,
        H=H, K=K, N=N, V=V, BV=tile.block, BN=min(N, tile.keys),
        INITIAL=initial is not None, SEGMENTS=plan.segments, ENDS=ends,
        WRITES=writes, STATES=states, EVEN=T % CHUNK == 0, PRECISION=precision(k.dtype),
    )  # fmt: skip


def scan_chunks(q, k, v, inverse, scores, factors, initial_state, *, writes: bool, states: bool):
    """(o [B,T,H,V], r, its rest, states before each chunk, final state [B,H,N,V] float32, transitions).

    With ``writes`` there is r, like o; with ``states`` the states, transposed [B,H,chunks,V,N] in the dtype of k, and
    the rest of r, like it: what its dtype leaves of it, a second summand. Else they are None. Of a split sequence, the
    transitions [B,H,segments-1,N,N] float32 are what each segment but the last does to a state before it; else None.
    """
    B, T, _, N = k.shape
    H, V = v.shape[2:]
    plan = split.plan(B * H * V // 64, ceil_div(T, CHUNK), wanted=256)
    small = jax.ShapeDtypeStruct((B, 1), v.dtype)
    arrays = (q, k, v, inverse, scores, factors)
    start, transitions = initial_state, None
    if plan.segments > 1:
        ends = jax.ShapeDtypeStruct((B, H, plan.segments - 1, V + N, N), jnp.float32)
        *_, ends = _launch_scan(*arrays, None, (small, small, small, small, ends), plan, ends=True)
        ends, transitions = ends[..., :V, :], ends[..., V:, :]
        start = triton_split.join(initial_state, ends, transitions, backwards=False)
    outputs = (
        jax.ShapeDtypeStruct(v.shape, v.dtype),
        jax.ShapeDtypeStruct(v.shape, v.dtype) if writes else small,
        jax.ShapeDtypeStruct(v.shape, v.dtype) if states else small,
        jax.ShapeDtypeStruct((B, H, ceil_div(T, CHUNK), V, N), k.dtype) if states else small,
        jax.ShapeDtypeStruct((B, H, N, V), jnp.float32),
    )
    o, r, rest, before, final = _launch_scan(*arrays, start, outputs, plan, ends=False, writes=writes, states=states)
    kept = (rest, before) if states else (None, None)
    return o, r if writes else None, *kept, final, transitions


@functools.partial(fold_batch, static=("scale", "normalize", "writes", "states"))
def _forward(q, k, v, g, beta, runs, initial_state, *, scale: float, normalize: bool, writes: bool, states: bool):
    within = within_chunks(q, k, g, beta, runs, scale=scale, normalize=normalize)
    o, r, rest, before, final_state, transitions = scan_chunks(
        q, k, v, *within, initial_state, writes=writes, states=states
    )
    return o, final_state, r, (rest, *within, before, transitions) if states else None


def forward(q, k, v, g, beta, runs, initial_state, *, scale, normalize, return_updates):
    """o, final_state, updates, residuals; the protocol is in ``api``."""
    o, final_state, r, residuals = _forward(
        q, k, v, g, beta, runs, initial_state, scale=scale, normalize=normalize, writes=True, states=True
    )
    return o, final_state, _updates(r, beta) if return_updates else None, (r, *residuals)


def values(q, k, v, g, beta, runs, initial_state, *, scale, normalize, return_updates):
    """o, final_state, updates: what nobody differentiates is not written."""
    o, final_state, r, _ = _forward(
        q, k, v, g, beta, runs, initial_state, scale=scale, normalize=normalize, writes=return_updates, states=False
    )
    return o, final_state, _updates(r, beta) if return_updates else None


def _updates(r, beta):
    return r.astype(jnp.float32) * beta[..., None]


@functools.partial(fold_batch, static=("scale", "normalize"))
def _backward(*arrays: Any, scale: float, normalize: bool):
    from pallas_kernels.gated_delta_rule import triton_bwd

    return triton_bwd.backward(*arrays, scale=scale, normalize=normalize)


def backward(q, k, v, g, beta, runs, initial_state, residuals, do, dfinal_state, *, scale, normalize):
    """dq, dk, dv, dg, dbeta, dinitial_state; the protocol is in ``api``. v itself is not needed: r stands for it."""
    del v
    return _backward(q, k, g, beta, runs, initial_state, residuals, do, dfinal_state, scale=scale, normalize=normalize)


@functools.partial(fold_batch, static=("scale", "normalize"))
def _step(*arrays: Any, scale: float, normalize: bool):
    from pallas_kernels.gated_delta_rule import triton_step

    return triton_step.one_token(*arrays, scale=scale, normalize=normalize)


def step(q, k, v, g, beta, state, *, scale, normalize, return_update):
    """o, state, update; the protocol is in ``api``. Not differentiable."""
    o, state, update = _step(q, k, v, g, beta, state, scale=scale, normalize=normalize)
    return o, state, update if return_update else None
