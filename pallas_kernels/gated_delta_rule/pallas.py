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
from pallas_kernels.gated_delta_rule import pallas_scan, pallas_within
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
