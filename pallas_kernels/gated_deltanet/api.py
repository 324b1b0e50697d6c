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

from jaxtyping import Array, Bool, Float, Float32

from pallas_kernels.arguments import FLOATS, Arguments
from pallas_kernels.dispatch import Operation

OPERATION = Operation("gated_deltanet", ("triton", "xla"), fastest=("triton", "xla"))


class Projections(NamedTuple):
    """What the layer's input maps give for the token, in one dtype."""

    q: Float[Array, "B KN"]
    k: Float[Array, "B KN"]
    v: Float[Array, "B HV"]
    a: Float[Array, "B H"]
    b: Float[Array, "B H"]
    gate: Float[Array, "B HV"] | None


class Parameters(NamedTuple):
    """Of the layer: the taps (all None: SiLU alone), A_log as ``decay``, dt_bias, and the norm's weight."""

    q_taps: Float[Array, "taps KN"] | None
    k_taps: Float[Array, "taps KN"] | None
    v_taps: Float[Array, "taps HV"] | None
    decay: Float[Array, " H"]
    dt_bias: Float[Array, " H"]
    norm: Float[Array, " V"]


class State(NamedTuple):
    """What a document leaves behind: S, and the last taps - 1 inputs of each convolution (None without them)."""

    state: Float32[Array, "B H N V"]
    q: Float[Array, "B past KN"] | None
    k: Float[Array, "B past KN"] | None
    v: Float[Array, "B past HV"] | None


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


def _make_case(check: Arguments, inputs: Projections, parameters: Parameters, state: State, active: Any) -> Case:
    check.record("inputs", inputs, Projections)
    check.record("parameters", parameters, Parameters)
    check.record("state", state, State)
    check.array("the state", state.state, "B H N V", "float32")
    check.array("q", inputs.q, "B K*N", *FLOATS)
    sizes, dtype = check.sizes, str(inputs.q.dtype)
    H, N, V = sizes["H"], sizes["N"], sizes["V"]
    keys = sizes["K*N"]
    check.require(keys % N == 0, f"q has {keys} channels, not a multiple of the head size {N} of the state")
    sizes |= {"K": keys // N, "H*V": H * V}
    check.heads()
    check.array("k", inputs.k, "B K*N", dtype)
    check.array("v", inputs.v, "B H*V", dtype)
    check.array("a", inputs.a, "B H", dtype)
    check.array("b", inputs.b, "B H", dtype)
    check.optional("gate", inputs.gate, "B H*V", dtype)
    given = [x is not None for x in (*parameters[:3], *state[1:])]
    alike = all(given) or not any(given)
    check.require(alike, "the taps and the last inputs of q, k and v are all arrays or all None")
    if given[0]:
        for name, width in {"q": "K*N", "k": "K*N", "v": "H*V"}.items():
            check.array(f"{name}_taps", getattr(parameters, f"{name}_taps"), f"taps {width}", *FLOATS)
            sizes["taps-1"] = sizes["taps"] - 1
            check.array(f"the last inputs of {name}", getattr(state, name), f"B taps-1 {width}", *FLOATS)
        check.require(sizes["taps"] > 1, f"q_taps has {sizes['taps']} tap; it must have at least 2")
    check.array("decay", parameters.decay, "H", *FLOATS)
    check.array("dt_bias", parameters.dt_bias, "H", *FLOATS)
    check.array("norm", parameters.norm, "V", *FLOATS)
    check.optional("active", active, "B", "bool")
    return Case(sizes["B"], sizes["K"], H, N, V, sizes.get("taps", 1), dtype)


def gated_deltanet_step(
    inputs: Projections,
    parameters: Parameters,
    state: State,
    *,
    active: Bool[Array, "B"] | None = None,
    eps: float,
    beta_range: float = 1.0,
    return_update: bool = False,
    implementation: str | None = None,
) -> tuple[Float[Array, "B HV"], State, Float32[Array, "B H V"] | None]:
    """One token of every row: y = weight rms(o) silu(gate), o of the gated delta rule of the convolved q, k and v.

    Args:
      inputs, parameters, state: see the types.
      active: the rows that hold a token; the others keep their state and give zeros. None means all.
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
    check = Arguments("gated_deltanet")
    case = _make_case(check, inputs, parameters, state, active)
    numbers = {name: check.number(name, x, least=0.0) for name, x in dict(eps=eps, beta_range=beta_range).items()}
    backend = OPERATION.select(implementation, case)
    return backend.step(inputs, parameters, state, active, **numbers, return_update=return_update)
