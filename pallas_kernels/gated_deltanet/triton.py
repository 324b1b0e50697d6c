"""One token of a Gated DeltaNet layer in one Triton launch: a pass over the state, and everything around it.

One program per row and key head: it convolves that head's q and k, and for each value head that reads them its v,
updates the state block by block of values, and normalises and gates the head's output. States are updated in place.

S is decayed, read by k and q at once, and written: with S' = S + k u^T, S'^T q = S^T q + (k.q) u.
"""

# Tuples of rows grow in the kernels' loops.
# mypy: disable-error-code="assignment"

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.arguments import Arguments
from pallas_kernels.batching import fold_batch
from pallas_kernels.gated_delta_rule.triton_tiles import HEAD_SIZES
from pallas_kernels.gated_deltanet.api import Case, State
from pallas_kernels.triton_call import check_installed, interpreting, jit, tl, triton_call
from pallas_kernels.triton_math import sigmoid

# Elements of the state that a program of 4 warps works on at once, at most, while as many more are on their way. Heads
# whose values are twice as wide as their keys get half as many: all outputs of a head wait in registers for its norm.
ELEMENTS = 8192


def check(case: Case) -> None:
    """Raises UnsupportedCase unless this kernel does ``case``."""
    check_installed("gated_deltanet")
    check, other = Arguments("gated_deltanet: triton"), "use implementation='xla'"
    check.choice("key head size", case.head_size, HEAD_SIZES, other)
    check.choice("value head size", case.value_size, (case.head_size, 2 * case.head_size), other)
    check.choice("taps", case.taps, range(1, 9), other)


@jit
def _inputs(x_ptr, last_ptr, at, b, WIDTH: tl.constexpr, TAPS: tl.constexpr):
    """The last TAPS inputs of some channels, oldest first."""
    rows = ()
    for i in tl.static_range(TAPS - 1):
        rows += (tl.load(last_ptr + (b * (TAPS - 1) + i) * WIDTH + at),)
    rows += (tl.load(x_ptr + b * WIDTH + at),)
    return rows


@jit
def _convolve(rows, taps_ptr, at, WIDTH: tl.constexpr, TAPS: tl.constexpr, FAST: tl.constexpr):
    """Their sum by the taps, through SiLU, rounded as the projections are."""
    dtype: tl.constexpr = rows[TAPS - 1].dtype
    total = rows[TAPS - 1].to(tl.float32)
    if TAPS > 1:
        total *= tl.load(taps_ptr + (TAPS - 1) * WIDTH + at).to(tl.float32)
        for i in tl.static_range(TAPS - 1):
            total += rows[i].to(dtype).to(tl.float32) * tl.load(taps_ptr + i * WIDTH + at).to(tl.float32)
    return (total * sigmoid(total, FAST)).to(dtype).to(tl.float32)


@jit
def _shift(rows, next_ptr, at, b, live, WIDTH: tl.constexpr, TAPS: tl.constexpr):
    """Writes the last TAPS - 1 inputs after the token."""
    for i in tl.static_range(TAPS - 1):
        newer = rows[i + 1].to(next_ptr.dtype.element_ty)
        tl.store(next_ptr + (b * (TAPS - 1) + i) * WIDTH + at, tl.where(live, newer, rows[i]))


@jit
def _softplus(x):
    """log(1 + exp(x)), also where exp(x) vanishes beside 1."""
    small = tl.exp(-tl.abs(x))
    above = 1.0 + small
    log1p = tl.where(above == 1.0, small, tl.log(above) * (small / tl.where(above == 1.0, 1.0, above - 1.0)))
    return tl.maximum(x, 0.0) + log1p


@jit
def _layer_token(
    q_ptr, k_ptr, v_ptr, a_ptr, b_ptr, gate_ptr, q_taps_ptr, k_taps_ptr, v_taps_ptr, decay_ptr, dt_bias_ptr, norm_ptr,
    state_ptr, q_last_ptr, k_last_ptr, v_last_ptr, active_ptr, group, eps, beta_range, scale,
    y_ptr, next_ptr, q_next_ptr, k_next_ptr, v_next_ptr, update_ptr,
    H: tl.constexpr, K: tl.constexpr, N: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, TAPS: tl.constexpr,
    GATED: tl.constexpr, ACTIVE: tl.constexpr, UPDATE: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    HEADS: tl.constexpr = H // K
    BLOCKS: tl.constexpr = V // BV
    b = (tl.program_id(0) // K).to(tl.int64)
    kh = tl.program_id(0) % K
    n, part = tl.arange(0, N), tl.arange(0, BV)
    states = state_ptr + (b * H + kh * HEADS) * N * V  # of HEADS heads, one after another
    next_states = next_ptr + (b * H + kh * HEADS) * N * V
    block = n[:, None] * V + part[None, :]
    S = tl.load(states + block)
    live = True
    if ACTIVE:
        live = tl.load(active_ptr + b) != 0
    q_taps_ptr += b // group * TAPS * K * N
    k_taps_ptr += b // group * TAPS * K * N
    v_taps_ptr += b // group * TAPS * H * V
    q_rows = _inputs(q_ptr, q_last_ptr, kh * N + n, b, K * N, TAPS)
    k_rows = _inputs(k_ptr, k_last_ptr, kh * N + n, b, K * N, TAPS)
    v_rows = _inputs(v_ptr, v_last_ptr, kh * HEADS * V + part, b, H * V, TAPS)
    tl.debug_barrier()  # several threads read what one of them will write, as the buffers are the same
    _shift(q_rows, q_next_ptr, kh * N + n, b, live, K * N, TAPS)
    _shift(k_rows, k_next_ptr, kh * N + n, b, live, K * N, TAPS)
    q = _convolve(q_rows, q_taps_ptr, kh * N + n, K * N, TAPS, FAST)
    k = _convolve(k_rows, k_taps_ptr, kh * N + n, K * N, TAPS, FAST)
    q *= tl.rsqrt(tl.sum(q * q, 0) + 1e-6) * scale
    k *= tl.rsqrt(tl.sum(k * k, 0) + 1e-6)
    if ACTIVE:
        k = tl.where(live, k, 0.0)  # whatever stands in a row without a token: NaN times 0 would reach its state
    qk = tl.sum(q * k, 0)
    for i in tl.static_range(HEADS):
        h = kh * HEADS + i
        rate = tl.load(a_ptr + b * H + h).to(tl.float32) + tl.load(dt_bias_ptr + b // group * H + h).to(tl.float32)
        decay = tl.exp(-tl.exp(tl.load(decay_ptr + b // group * H + h).to(tl.float32)) * _softplus(rate))
        beta = beta_range / (1.0 + tl.exp(-tl.load(b_ptr + b * H + h).to(tl.float32)))
        if ACTIVE:
            decay = tl.where(live, decay, 1.0)
        outputs = ()
        squares = 0.0
        for j in tl.static_range(BLOCKS):
            at = h * V + j * BV + part
            here = S * decay
            _shift(v_rows, v_next_ptr, at, b, live, H * V, TAPS)
            v = _convolve(v_rows, v_taps_ptr, at, H * V, TAPS, FAST)
            if i * BLOCKS + j + 1 < HEADS * BLOCKS:  # the next block is on its way while this one is worked on
                S = tl.load(states + ((i * BLOCKS + j + 1) // BLOCKS * N * V + (j + 1) % BLOCKS * BV) + block)
                v_rows = _inputs(v_ptr, v_last_ptr, at + BV, b, H * V, TAPS)
                tl.debug_barrier()
            u = (v - tl.sum(here * k[:, None], 0)) * beta
            if ACTIVE:
                u = tl.where(live, u, 0.0)
            o = tl.sum(here * q[:, None], 0) + qk * u
            tl.store(next_states + (i * N * V + j * BV) + block, here + k[:, None] * u[None, :])
            if UPDATE:
                tl.store(update_ptr + b * H * V + at, u)
            o = o.to(y_ptr.dtype.element_ty).to(tl.float32)
            squares += tl.sum(o * o, 0)
            outputs += (o,)
        r = tl.rsqrt(squares / V + eps)
        for j in tl.static_range(BLOCKS):
            at = h * V + j * BV + part
            y = outputs[j] * r * tl.load(norm_ptr + b // group * V + j * BV + part).to(tl.float32)
            if GATED:
                gate = tl.load(gate_ptr + b * H * V + at).to(tl.float32)
                y *= gate * sigmoid(gate, FAST)
            if ACTIVE:
                y = tl.where(live, y, 0.0)
            tl.store(y_ptr + b * H * V + at, y.to(y_ptr.dtype.element_ty))


@functools.partial(fold_batch, static=("eps", "beta_range", "return_update"))
def _step(inputs, parameters, state, active, *, eps, beta_range, return_update):
    """y, state, update; each of the parameters has a leading dimension G: one for each B / G rows."""
    B, H, N, V = state.state.shape
    K = inputs.q.shape[1] // N
    like = lambda x: jax.ShapeDtypeStruct((B, 1), inputs.q.dtype) if x is None else x  # noqa: E731
    outputs = [inputs.v, *map(like, state), jax.ShapeDtypeStruct((B, H, V) if return_update else (B, 1), jnp.float32)]
    first = len(inputs) + len(parameters)
    y, *after, update = triton_call(
        _layer_token, *inputs, *parameters, *state, None if active is None else active.astype(jnp.int8),
        B // parameters.norm.shape[0], eps, beta_range, float(N**-0.5),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs],
        grid=(B * K,), num_warps=4, num_stages=1,
        input_output_aliases={first + i: 1 + i for i, x in enumerate(state) if x is not None},
        H=H, K=K, N=N, V=V, BV=min(64, ELEMENTS // max(N, V)), TAPS=1 if state.q is None else state.q.shape[1] + 1,
        GATED=inputs.gate is not None, ACTIVE=active is not None, UPDATE=return_update, FAST=not interpreting(),
    )  # fmt: skip
    after = [None if old is None else new for old, new in zip(state, after, strict=True)]
    return y, State._make(after), update if return_update else None


def step(inputs, parameters, state, active, *, eps, beta_range, return_update):
    """y, state, update; the protocol is in ``api``."""
    parameters = jax.tree.map(lambda x: x[None], parameters)
    return _step(inputs, parameters, state, active, eps=eps, beta_range=beta_range, return_update=return_update)
