"""What the gated delta rule computes, which arguments it takes, and what a backend must provide.

With a state S [N,V] per value head, in float32:

    S <- exp(g_t) S;   u_t = beta_t (v_t - S^T k_t);   S <- S + k_t u_t^T;   o_t = scale S^T q_t

Value head h reads query and key head h // (H / K).
Source: Yang et al., "Gated Delta Networks", arXiv 2412.06464, section 3.

A backend is a module of this folder with these functions. Everything that it is given has been checked, and is prepared
so that padding needs no thought: at padded tokens ``g`` and ``beta`` are 0 (so the state passes through) and the output
is masked here, outside the backend.

``check(case: Case) -> None``
    Raises UnsupportedCase for what the backend does not do.
``forward(q, k, v, g, beta, runs, initial_state, *, scale, normalize, return_updates)
        -> o, final_state, updates, residuals``
    q, k [B,T,K,N] and v [B,T,H,V] of one dtype (float32, bfloat16 or float16), raw: with ``normalize`` the backend
    itself divides q and k by sqrt(sum x^2 + 1e-6) per head. g, beta [B,T,H] float32; any T >= 1. ``scale`` is a Python
    float.
    ``runs`` is None (one document, the faster path) or [B,T] int32: the number of resets up to and including each
    token, so 0 or more and never falling along T. Tokens see one another iff their runs are equal; token t sees the
    state from before a token s <= t iff runs[t] equals runs[s - 1], or 0 where s = 0. In particular ``initial_state``
    (None for zeros, or [B,H,N,V] float32) reaches the tokens of run 0, and ``final_state`` [B,H,N,V] float32 is the
    state of the last token's run. g at the first token of a run above 0 is an ordinary number that acts on nothing.
    ``o`` [B,T,H,V] has the dtype of v. ``updates`` is u [B,T,H,V] float32 if ``return_updates``, else None.
    ``residuals`` is any pytree of arrays beside the inputs that the backward pass wants again (chunk states, inverses).
``values(q, k, ..., *, scale, normalize, return_updates) -> o, final_state, updates``, optional
    ``forward`` without residuals, for calls that nobody differentiates.
``backward(q, k, v, g, beta, runs, initial_state, residuals, do, dfinal_state, *, scale, normalize)
        -> dq, dk, dv, dg, dbeta, dinitial_state``
    The inputs of ``forward`` again, ``do`` in the dtype of o and ``dfinal_state`` in float32. dq and dk are for the raw
    q and k and, like dv, in their dtype; dg and dbeta are float32; dinitial_state is float32, or None where
    initial_state is.
``step(q, k, v, g, beta, state, *, scale, normalize, return_update) -> o, state, update``
    One token: q, k [B,K,N], v [B,H,V], g, beta [B,H] float32, state [B,H,N,V] float32; update is [B,H,V] float32 or
    None. Inactive rows come with g = beta = 0.

``forward``, ``backward`` and ``step`` must work under jit and vmap (a kernel without a batching rule folds into B).
"""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Float32, Int32

from pallas_kernels.arguments import FLOATS, Arguments
from pallas_kernels.dispatch import Operation

OPERATION = Operation("gated_delta_rule", ("pallas", "triton", "xla"), fastest=("pallas", "triton", "xla"))
# Of one token: Triton's kernel updates the state in place.
STEP = Operation("gated_delta_rule", OPERATION.implementations, fastest=("triton", "pallas", "xla"))


@dataclasses.dataclass(frozen=True)
class Case:
    """One call, as far as the choice of an implementation is concerned."""

    batch: int
    tokens: int
    key_heads: int
    heads: int
    head_size: int
    value_size: int
    dtype: str
    packed: bool
    """Whether segment ids were given."""
    initial_state: bool
    normalize: bool
    return_updates: bool
    step: bool
    """Whether this is the one-token form (then tokens is 1)."""


def _make_case(
    q: Any, k: Any, v: Any, g: Any, beta: Any, state: Any, mask: Any, *, step: bool, normalize: bool, updates: bool
) -> Case:
    """Checks every argument; ``mask`` is segment_ids [B,T], or the step's active [B]."""
    check = Arguments("gated_delta_rule")
    time = "" if step else "T"
    check.array("q", q, f"B {time} K N", *FLOATS)
    sizes, dtype = check.sizes, str(q.dtype)
    check.array("k", k, f"B {time} K N", dtype)
    check.array("v", v, f"B {time} H V", dtype)
    check.array("g", g, f"B {time} H", "float32")
    check.array("beta", beta, f"B {time} H", *FLOATS)
    check.heads()
    if step:
        check.array("state", state, "B H N V", "float32")
        check.optional("active", mask, "B", "bool")
    else:
        check.optional("initial_state", state, "B H N V", "float32")
        check.optional("segment_ids", mask, "B T", "int32")
    return Case(
        batch=sizes["B"],
        tokens=sizes.get("T", 1),
        key_heads=sizes["K"],
        heads=sizes["H"],
        head_size=sizes["N"],
        value_size=sizes["V"],
        dtype=dtype,
        packed=mask is not None and not step,
        initial_state=state is not None,
        normalize=normalize,
        return_updates=updates,
        step=step,
    )


def _scale(case: Case, scale: float | None) -> float:
    return case.head_size**-0.5 if scale is None else Arguments("gated_delta_rule").number("scale", scale)


def count_resets(segment_ids: Int32[Array, "B T"]) -> Int32[Array, "B T"]:
    """The resets up to and including each token: one where an id differs from the last non-padding id before it."""
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    latest = jax.lax.cummax(jnp.where(segment_ids != 0, index, -1), axis=1)
    before = jnp.pad(latest[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    previous = jnp.take_along_axis(segment_ids, jnp.maximum(before, 0), axis=1)
    starts = (segment_ids != 0) & (before >= 0) & (previous != segment_ids)
    return jnp.cumsum(starts, axis=1, dtype=jnp.int32)


@dataclasses.dataclass(frozen=True)
class _Call:
    """What is fixed about a call when it is traced."""

    backend: ModuleType
    scale: float
    normalize: bool
    return_updates: bool


def _forward(call: _Call, *inputs):
    return call.backend.forward(*inputs, scale=call.scale, normalize=call.normalize, return_updates=call.return_updates)


def _primal(call, *inputs):
    if not hasattr(call.backend, "values"):
        return _forward(call, *inputs)[:3]
    return call.backend.values(*inputs, scale=call.scale, normalize=call.normalize, return_updates=call.return_updates)


def _forward_rule(call, *inputs):
    o, final_state, updates, residuals = _forward(call, *inputs)
    o, final_state, updates = checkpoint_name((o, final_state, updates), "gated_delta_rule_out")
    residuals = checkpoint_name(residuals, "gated_delta_rule_residual")
    return (o, final_state, updates), (inputs, residuals)


def _backward_rule(call, saved, cotangents):
    inputs, residuals = saved
    do, dfinal_state, _ = cotangents
    dq, dk, dv, dg, dbeta, dinitial_state = call.backend.backward(
        *inputs, residuals, do, dfinal_state, scale=call.scale, normalize=call.normalize
    )
    return dq, dk, dv, dg, dbeta, None, dinitial_state


_differentiable = jax.custom_vjp(_primal, nondiff_argnums=(0,))
_differentiable.defvjp(_forward_rule, _backward_rule)


def gated_delta_rule(
    q: Float[Array, "B T K N"],
    k: Float[Array, "B T K N"],
    v: Float[Array, "B T H V"],
    g: Float32[Array, "B T H"],
    beta: Float[Array, "B T H"],
    *,
    segment_ids: Int32[Array, "B T"] | None = None,
    initial_state: Float32[Array, "B H N V"] | None = None,
    scale: float | None = None,
    normalize: bool = True,
    return_updates: bool = False,
    implementation: str | None = None,
) -> tuple[jax.Array, ...]:
    """S <- exp(g_t) S;  u_t = beta_t (v_t - S^T k_t);  S <- S + k_t u_t^T;  o_t = scale S^T q_t.

    Args:
      q, k: float32, bfloat16 or float16, of the same dtype as v.
      v: H value heads, a multiple of K; value head h reads key head h // (H / K).
      g: natural logarithm of the decay, at most 0, float32.
      beta: how much of a value is rewritten, in [0, 1], or [0, 2] to allow negative eigenvalues.
      segment_ids: document of each token; the state starts at 0 at each change of id. Tokens of id 0 are padding, whose
        q, k and v are finite: they change nothing and their outputs are 0. None means one document without padding, and
        is faster.
      initial_state: state before the first document of the row, float32; None means zeros.
      scale: of q; by default N^-1/2.
      normalize: divide q and k by sqrt(sum x^2 + 1e-6) per head.
      return_updates: also return u. No gradient flows through it.
      implementation: "xla", "triton", "pallas", or None for the fastest that supports the case.

    Returns:
      o [B,T,H,V] in the dtype of v; final_state [B,H,N,V] float32, the state of the row's last document (of a row of
      padding: its initial state); and with ``return_updates`` u [B,T,H,V] float32. All but u are differentiable in q,
      k, v, g, beta and initial_state.

    Raises:
      UnsupportedCase: a shape or dtype breaks the rules above, or the named implementation does not support the case.
    """
    case = _make_case(
        q, k, v, g, beta, initial_state, segment_ids, step=False, normalize=normalize, updates=return_updates
    )
    backend = OPERATION.select(implementation, case)
    beta = beta.astype(jnp.float32)
    runs = None
    if segment_ids is not None:
        live = (segment_ids != 0)[:, :, None]
        g, beta = jnp.where(live, g, 0.0), jnp.where(live, beta, 0.0)
        runs = count_resets(segment_ids)
    call = _Call(backend, _scale(case, scale), normalize, return_updates)
    o, final_state, updates = _differentiable(call, q, k, v, g, beta, runs, initial_state)
    if segment_ids is not None:
        o = jnp.where(live[..., None], o, jnp.zeros((), o.dtype))
    return (o, final_state, jax.lax.stop_gradient(updates)) if return_updates else (o, final_state)


def gated_delta_rule_step(
    q: Float[Array, "B K N"],
    k: Float[Array, "B K N"],
    v: Float[Array, "B H V"],
    g: Float32[Array, "B H"],
    beta: Float[Array, "B H"],
    state: Float32[Array, "B H N V"],
    *,
    active: Bool[Array, "B"] | None = None,
    scale: float | None = None,
    normalize: bool = True,
    return_update: bool = False,
    implementation: str | None = None,
) -> tuple[jax.Array, ...]:
    """One token of :func:`gated_delta_rule` from the state before it to the state after it.

    Args:
      state: float32, required.
      active: rows that hold a token; the others keep their state and output 0. None means all.

    Returns:
      o [B,H,V] in the dtype of v, the new state, and with ``return_update`` u [B,H,V] float32.

    Raises:
      UnsupportedCase: as :func:`gated_delta_rule`.
    """
    case = _make_case(q, k, v, g, beta, state, active, step=True, normalize=normalize, updates=return_update)
    backend = STEP.select(implementation, case)
    beta = beta.astype(jnp.float32)
    if active is not None:
        g, beta = jnp.where(active[:, None], g, 0.0), jnp.where(active[:, None], beta, 0.0)
    scale = _scale(case, scale)
    o, state, update = backend.step(
        q, k, v, g, beta, state, scale=scale, normalize=normalize, return_update=return_update
    )
    if active is not None:
        o = jnp.where(active[:, None, None], o, jnp.zeros((), o.dtype))
    return (o, state, update) if return_update else (o, state)
