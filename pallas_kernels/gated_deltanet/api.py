"""What one token of a Gated DeltaNet layer computes between its projections, and what a backend must provide.

    q, k, v = SiLU(sum_i w[i] x_{t - taps + 1 + i}) of each projection's last inputs
    beta = beta_range sigmoid(b);   g = -exp(A_log) softplus(a + dt_bias);   q, k normalised per head
    S <- exp(g) S;   u = beta (v - S^T k);   S <- S + k u^T;   o = N^-1/2 S^T q
    y = weight o / sqrt(mean(o^2) + eps) silu(gate)

It is the one-token form of ``short_convolution``, ``gated_delta_rule`` and ``rms_norm`` together, with their roundings:
q, k, v and o to the dtype of the projections, all else float32.

A backend is a module of this folder with two functions, whose arguments have been checked:

``check(case: Case) -> None``
    Raises UnsupportedCase for what the backend does not do.
``step(inputs, parameters, state, active, *, eps, beta_range, return_update) -> y, state, update``
    active is None or [B] bool; rows that are not active keep their state and give zeros. update is u [B,H,V] float32,
    or None.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax

from pallas_kernels.dispatch import Operation, UnsupportedCase

OPERATION = Operation("gated_deltanet", ("triton", "xla"), fastest=("triton", "xla"))

_DTYPES = ("float32", "bfloat16", "float16")


class Projections(NamedTuple):
    """Of the token: q, k [B,K N], v [B,H V], a, b [B,H], and gate [B,H V] or None; of one dtype."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    a: jax.Array
    b: jax.Array
    gate: jax.Array | None


class Parameters(NamedTuple):
    """Of the layer: the taps of q, k [taps,K N] and v [taps,H V] (all None: SiLU alone), A_log and dt_bias [H], and the
    norm's weight [V]."""

    q_taps: jax.Array | None
    k_taps: jax.Array | None
    v_taps: jax.Array | None
    decay: jax.Array
    dt_bias: jax.Array
    norm: jax.Array


class State(NamedTuple):
    """What a document leaves behind: S [B,H,N,V] float32, and the last taps - 1 inputs of q, k and v (or None)."""

    state: jax.Array
    q: jax.Array | None
    k: jax.Array | None
    v: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Case:
    """One call, as far as the choice of an implementation is concerned."""

    batch: int
    key_heads: int
    heads: int
    head_size: int
    value_size: int
    taps: int
    """1 without convolutions."""
    dtype: str


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UnsupportedCase(f"gated_deltanet: {message}")


def _check(name: str, array: Any, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
    _require(hasattr(array, "shape"), f"{name} is a {type(array).__name__}; pass an array {shape}")
    _require(array.shape == shape, f"{name} has shape {array.shape}; it must be {shape}")
    _require(str(array.dtype) in dtypes, f"{name} has dtype {array.dtype}; it must be {' or '.join(dtypes)}: cast it")


def _make_case(inputs: Projections, parameters: Parameters, state: State, active: Any) -> Case:
    S = state.state
    _require(getattr(S, "ndim", 0) == 4, "the state must be an array [B,H,N,V]")
    B, H, N, V = S.shape
    _check("the state", S, (B, H, N, V), ("float32",))
    keys = inputs.q.shape[-1]
    _require(keys % N == 0, f"q has {keys} channels, not a multiple of the head size {N} of the state")
    K = keys // N
    _require(H % K == 0, f"the state has H = {H} heads and q has K = {K}; H must be a multiple of K")
    one = (str(inputs.q.dtype),)
    _require(one[0] in _DTYPES, f"q has dtype {one[0]}; it must be {' or '.join(_DTYPES)}: cast it")
    shapes = {"q": (B, K * N), "k": (B, K * N), "v": (B, H * V), "a": (B, H), "b": (B, H), "gate": (B, H * V)}
    for name, array in inputs._asdict().items():
        if array is not None or name != "gate":
            _check(name, array, shapes[name], one)
    given = [x is not None for x in (*parameters[:3], *state[1:])]
    _require(all(given) or not any(given), "the taps and the last inputs of q, k and v are all arrays or all None")
    taps = 1 if parameters.q_taps is None else parameters.q_taps.shape[0]
    _require(not given[0] or taps > 1, f"q_taps has {taps} tap; it must have at least 2")
    if given[0]:
        for name in ("q", "k", "v"):
            width = shapes[name][1]
            _check(f"{name}_taps", getattr(parameters, f"{name}_taps"), (taps, width), _DTYPES)
            _check(f"the last inputs of {name}", getattr(state, name), (B, taps - 1, width), _DTYPES)
    for name, shape in {"decay": (H,), "dt_bias": (H,), "norm": (V,)}.items():
        _check(name, getattr(parameters, name), shape, _DTYPES)
    if active is not None:
        _check("active", active, (B,), ("bool",))
    return Case(B, K, H, N, V, taps, one[0])


def gated_deltanet_step(
    inputs: Projections,
    parameters: Parameters,
    state: State,
    *,
    active: jax.Array | None = None,
    eps: float,
    beta_range: float = 1.0,
    return_update: bool = False,
    implementation: str | None = None,
) -> tuple[jax.Array, State, jax.Array | None]:
    """One token of every row: y = weight rms(o) silu(gate), o of the gated delta rule of the convolved q, k and v.

    Args:
      inputs, parameters, state: see the types.
      active: [B] bool, the rows that hold a token; the others keep their state and give zeros. None means all.
      eps: of the norm.
      beta_range: 1, or 2 to allow negative eigenvalues.
      return_update: also return u.
      implementation: "triton", "xla", or None for the fastest that supports the case.

    Returns:
      y [B,H V] in the dtype of the projections, the new state (in the old one's buffers if those are donated), and u
      [B,H,V] float32 or None. Not differentiable.

    Raises:
      UnsupportedCase: a shape or dtype breaks the rules above, or the named implementation does not support the case.
    """
    case = _make_case(inputs, parameters, state, active)
    backend = OPERATION.select(implementation, case)
    return backend.step(
        inputs, parameters, state, active, eps=float(eps), beta_range=float(beta_range), return_update=return_update
    )
