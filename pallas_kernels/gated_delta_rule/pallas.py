"""The gated delta rule for Hopper in Pallas (Mosaic GPU): chunks of 64 tokens at once, then a scan over the chunks.

The kernels are in ``pallas_within``, ``pallas_scan``, ``pallas_split``, ``pallas_bwd``, ``pallas_gradients`` and
``pallas_step``. Here sequences are padded to whole chunks with tokens that change nothing (log decay and beta 0), and
few long ones are cut into segments, which are then rows of their own for all kernels. The state before each chunk is
kept for the backward pass. States are transposed, [V,N], but for the arguments and results of the operation.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.arguments import Arguments
from pallas_kernels.batching import fold_batch
from pallas_kernels.dispatch import UnsupportedCase
from pallas_kernels.gated_delta_rule import (
    pallas_bwd,
    pallas_gradients,
    pallas_scan,
    pallas_split,
    pallas_step,
    pallas_within,
    segments,
)
from pallas_kernels.gated_delta_rule.pallas_tiles import BLOCK_V, CHUNK, bytes_of, interpreting
from pallas_kernels.tiles import ceil_div, check_shared_memory

NAME = "gated_delta_rule"


def check(case: Any) -> None:
    """Raises UnsupportedCase unless these kernels do ``case`` on this device."""
    other, choice = "use implementation='triton', 'xla' or None", Arguments(NAME).choice
    if jax.default_backend() == "gpu" and not interpreting():
        capability = str(getattr(jax.devices()[0], "compute_capability", "unknown"))
        choice("compute capability", capability, ("9.0",), other)
    choice("dtype", case.dtype, ("bfloat16", "float16"), other)
    choice("key head size", case.head_size, (64, 128, 256), other)
    choice("value head size", case.value_size, (case.head_size, 2 * case.head_size), other)
    if max(case.batch, case.heads, ceil_div(case.tokens, CHUNK)) > 65535:
        raise UnsupportedCase(f"{NAME}: {case.batch} rows, {case.heads} heads and {case.tokens} tokens make a grid of "
                              f"more than 65535 programs along one axis; {other}")  # fmt: skip
    if not case.step:
        dtype = jnp.dtype(case.dtype)
        check_shared_memory(NAME, bytes_of(pallas_within.scratch(case.head_size, dtype, case.normalize)))
        check_shared_memory(NAME, bytes_of(pallas_scan.scratch(case.head_size, dtype)))
        check_shared_memory(NAME, bytes_of(pallas_bwd.scratch(case.head_size, dtype)))
        out = dtype if case.heads == case.key_heads else jnp.float32
        check_shared_memory(NAME, bytes_of(pallas_gradients.scratch(case.head_size, case.value_size, dtype, out)))


def _plan(B: int, T: int, H: int, V: int) -> segments.Plan:
    return segments.plan(B * H * V // BLOCK_V, ceil_div(T, CHUNK), wanted=132)


def _padded(x: jax.Array, plan: segments.Plan, mode: str = "constant") -> jax.Array:
    missing = plan.segments * plan.length * CHUNK - x.shape[1]
    return x if missing == 0 else jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2), mode=mode)


def _rows(x: jax.Array, plan: segments.Plan) -> jax.Array:
    """Segments as rows: [B,T,...] to [B*segments,T/segments,...]."""
    return x.reshape(x.shape[0] * plan.segments, plan.length * CHUNK, *x.shape[2:])


def _sequences(x: jax.Array, T: int, plan: segments.Plan) -> jax.Array:
    return x.reshape(x.shape[0] // plan.segments, -1, *x.shape[2:])[:, :T]


def _transposed(state: jax.Array | None) -> jax.Array | None:
    return None if state is None else jnp.swapaxes(state, 2, 3)


@functools.partial(fold_batch, static=("scale", "normalize", "save_r", "save_states"))
def _forward(
    q, k, v, g, beta, runs, initial_state, *, scale: float, normalize: bool, save_r: bool, save_states: bool
):  # fmt: skip
    (B, T, H, V), N = v.shape, k.shape[3]
    plan = _plan(B, T, H, V)
    resets = None if runs is None else _rows(pallas_within.since_before_chunk(_padded(runs, plan, "edge")), plan)
    q, k, v, g, beta = (_rows(_padded(x, plan), plan) for x in (q, k, v, g, beta))
    gates = pallas_within.gates(g, beta, resets)
    within = pallas_within.within_chunks(q, k, gates, scale=scale, runs=runs is not None, normalize=normalize)
    start, transitions = _transposed(initial_state), None
    if plan.segments > 1:
        ends = pallas_split.segment_ends(k, v, within[0], within[2])
        transitions = ends[:, :, V : V + N]
        start = pallas_split.join(start, ends, transitions, plan.segments, backwards=False)
    o, final, r, rest, states = pallas_scan.scan_chunks(q, k, v, *within, start, save_r=save_r, save_states=save_states)
    final = final.reshape(B, plan.segments, H, V, N)[:, -1]
    return _sequences(o, T, plan), _transposed(final), r, (rest, gates, *within, states, transitions)


def _updates(r, beta):
    (B, T, H), V = beta.shape, r.shape[3]
    return _sequences(r, T, _plan(B, T, H, V)).astype(jnp.float32) * beta[..., None]


def forward(q, k, v, g, beta, runs, initial_state, *, scale, normalize, return_updates):
    """o, final_state, updates, residuals; the protocol is in ``api``."""
    o, final_state, r, residuals = _forward(
        q, k, v, g, beta, runs, initial_state, scale=scale, normalize=normalize, save_r=True, save_states=True
    )
    return o, final_state, _updates(r, beta) if return_updates else None, (*residuals, r)


def values(q, k, v, g, beta, runs, initial_state, *, scale, normalize, return_updates):
    """o, final_state, updates, without the states and r of every chunk."""
    o, final_state, r, _ = _forward(
        q, k, v, g, beta, runs, initial_state, scale=scale, normalize=normalize, save_r=return_updates,
        save_states=False,
    )  # fmt: skip
    return o, final_state, _updates(r, beta) if return_updates else None


@functools.partial(fold_batch, static=("scale", "normalize"))
def _backward(q, k, runs, residuals, do, dfinal_state, *, scale: float, normalize: bool):
    rest, gates, inverse, scores, factors, states, transitions, r = residuals
    (B, T, H, V), groups = do.shape, (*q.shape[:3], -1, q.shape[3])
    plan = _plan(B, T, H, V)
    q_rows, k, do = (_rows(_padded(x, plan), plan) for x in (q, k, do))
    arrays, dfinal = (do, inverse, scores, factors), _transposed(dfinal_state)
    if plan.segments > 1:
        *_, ends = pallas_bwd.scan_back(q_rows, k, None, None, *arrays, None)
        dfinal = pallas_split.join(dfinal, ends, transitions, plan.segments, backwards=True)
    dstates, dv, written, dstart = pallas_bwd.scan_back(q_rows, k, r, rest, *arrays, dfinal)
    gradients = pallas_gradients.gradients_within(
        q_rows, k, gates, factors, r, do, dv, states, dstates, written, scale=scale, runs=runs is not None,
        normalize=normalize,
    )  # fmt: skip
    dq, dk, dg, dbeta, dv = (_sequences(x, T, plan) for x in (*gradients, dv))
    if dq.shape != q.shape:
        dq, dk = (x.reshape(groups).sum(3).astype(q.dtype) for x in (dq, dk))
    return dq, dk, dv, dg, dbeta, _transposed(dstart.reshape(B, plan.segments, *dstart.shape[1:])[:, 0])


def backward(q, k, v, g, beta, runs, initial_state, residuals, do, dfinal_state, *, scale, normalize):
    """dq, dk, dv, dg, dbeta, dinitial_state; the protocol is in ``api``. v itself is not needed: r stands for it."""
    del v, g, beta
    *gradients, dinitial = _backward(q, k, runs, residuals, do, dfinal_state, scale=scale, normalize=normalize)
    return *gradients, None if initial_state is None else dinitial


@functools.partial(fold_batch, static=("scale", "normalize"))
def _step(*arrays: Any, scale: float, normalize: bool):
    return pallas_step.one_token(*arrays, scale=scale, normalize=normalize)


def step(q, k, v, g, beta, state, *, scale, normalize, return_update):
    """o, state, update; the protocol is in ``api``. Not differentiable."""
    o, state, update = _step(q, k, v, g, beta, state, scale=scale, normalize=normalize)
    return o, state, update if return_update else None
