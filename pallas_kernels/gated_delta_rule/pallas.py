"""The gated delta rule for Hopper in Pallas (Mosaic GPU): chunks of 64 tokens in parallel, then a scan over the chunks.

The kernels are in ``pallas_within``, ``pallas_scan`` and ``pallas_bwd``; sequences are padded to whole chunks here with
tokens that change nothing (log decay and beta 0). There is no one-token form.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import UnsupportedCase
from pallas_kernels.gated_delta_rule import pallas_bwd, pallas_gradients, pallas_scan, pallas_within
from pallas_kernels.gated_delta_rule.pallas_tiles import CHUNK


def check(case: Any) -> None:
    """Raises UnsupportedCase unless these kernels do ``case``."""


def _whole_chunks(x: jax.Array, mode: str = "constant") -> jax.Array:
    missing = -x.shape[1] % CHUNK
    return x if missing == 0 else jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2), mode=mode)


def forward(q, k, v, g, beta, runs, initial_state, *, scale, normalize, return_updates, save_states=True):
    """o, final_state, updates, residuals; the protocol is in ``api``."""
    T = q.shape[1]
    q, k, v, g, beta = (_whole_chunks(x) for x in (q, k, v, g, beta))
    runs = None if runs is None else _whole_chunks(runs, "edge")
    gates = pallas_within.gates(g, beta, runs)
    inverse, scores, factors = pallas_within.within_chunks(q, k, gates, scale=scale, runs=runs is not None)
    o, r, final_state, states = pallas_scan.scan_chunks(
        q, k, v, inverse, scores, factors, initial_state, save_states=save_states
    )
    updates = (r.astype(jnp.float32) * beta[..., None])[:, :T] if return_updates else None
    return o[:, :T], final_state, updates, (gates, inverse, scores, factors, r, states)


def backward(q, k, v, g, beta, runs, initial_state, residuals, do, dfinal_state, *, scale, normalize):
    """dq, dk, dv, dg, dbeta, dinitial_state; the protocol is in ``api``. v itself is not needed: r stands for it."""
    del v, g, beta
    gates, inverse, scores, factors, r, states = residuals
    T = q.shape[1]
    groups = (*q.shape[:3], -1, q.shape[3])
    q, k, do = (_whole_chunks(x) for x in (q, k, do))
    dstates, dv, dinitial = pallas_bwd.scan_back(q, k, do, inverse, scores, factors, dfinal_state)
    gradients = pallas_gradients.gradients_within(
        q, k, gates, factors, r, do, dv, states, dstates, scale=scale, runs=runs is not None
    )
    dq, dk, dv, dg, dbeta = (x[:, :T] for x in (*gradients[:2], dv, *gradients[2:]))
    if dq.dtype != q.dtype:
        dq, dk = (x.reshape(groups).sum(3).astype(q.dtype) for x in (dq, dk))
    return dq, dk, dv, dg, dbeta, None if initial_state is None else dinitial
