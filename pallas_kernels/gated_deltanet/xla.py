"""One token of a Gated DeltaNet layer in plain jax.numpy: its operations' one-token forms, one after another."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.gated_delta_rule import gated_delta_rule_step
from pallas_kernels.gated_deltanet.api import Case
from pallas_kernels.rms_norm import rms_norm
from pallas_kernels.short_convolution import short_convolution_step


def check(case: Case) -> None:
    """Every case is supported."""


def _convolve(x, taps, last, active):
    if taps is None:
        return jax.nn.silu(x), None
    y, after = short_convolution_step(x, taps, last.astype(x.dtype), active=active, implementation="xla")
    return y, after.astype(last.dtype)


def step(inputs, parameters, state, active, *, eps, beta_range, return_update):
    """y, state, update; the protocol is in ``api``."""
    B, H, N, V = state.state.shape
    q, q_last = _convolve(inputs.q, parameters.q_taps, state.q, active)
    k, k_last = _convolve(inputs.k, parameters.k_taps, state.k, active)
    v, v_last = _convolve(inputs.v, parameters.v_taps, state.v, active)
    beta = jax.nn.sigmoid(inputs.b.astype(jnp.float32)) * beta_range
    rate = inputs.a.astype(jnp.float32) + parameters.dt_bias.astype(jnp.float32)
    g = -jnp.exp(parameters.decay.astype(jnp.float32)) * jax.nn.softplus(rate)
    o, S, *update = gated_delta_rule_step(
        q.reshape(B, -1, N), k.reshape(B, -1, N), v.reshape(B, H, V), g, beta, state.state,
        active=active, return_update=return_update, implementation="xla",
    )  # fmt: skip
    gate = None if inputs.gate is None else inputs.gate.reshape(o.shape)
    y = rms_norm(o, parameters.norm, gate, eps=eps, implementation="xla").reshape(B, -1)
    if active is not None:
        y = jnp.where(active[:, None], y, jnp.zeros((), y.dtype))
    return y, type(state)(S, q_last, k_last, v_last), update[0] if return_update else None
