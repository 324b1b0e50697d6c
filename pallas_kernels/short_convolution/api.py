"""What the short convolution computes, which arguments it takes, and what a backend must provide.

Depthwise and causal, without bias, over the tokens of one document:

    y_t = act(sum_i w[i] x_{t - taps + 1 + i}),   so that w[-1] multiplies the current token

A backend is a module of this folder with four functions, whose arguments have been checked:

``check(case: Case) -> None``
    Raises UnsupportedCase for what the backend does not do.
``forward(x, weight, segment_ids, initial_state, *, activation) -> y, final_state``
    segment_ids is None or [B,T] int32 with padding anywhere; initial_state is None or an array.
``backward(x, weight, segment_ids, initial_state, dy, dfinal_state, *, activation) -> dx, dweight, dinitial_state``
    dfinal_state is None where nothing depends on the final state, as in training. Gradients in the dtype of what they
    belong to; dinitial_state is None where initial_state is.
``step(x, weight, state, *, activation) -> y, state``
    One token of every row.
"""

from __future__ import annotations

import dataclasses
import functools
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.arguments import FLOATS, Arguments
from pallas_kernels.dispatch import Operation

OPERATION = Operation("short_convolution", implementations=("triton", "xla"), fastest=("triton", "xla"))

ACTIVATIONS = ("silu", None)


@dataclasses.dataclass(frozen=True)
class Case:
    """One call, as far as the choice of an implementation is concerned."""

    batch: int
    tokens: int
    width: int
    taps: int
    dtype: str
    packed: bool
    initial_state: bool
    activation: str | None
    step: bool


def _make_case(x: Any, weight: Any, state: Any, mask: Any, activation: Any, *, step: bool) -> Case:
    """Checks every argument; ``mask`` is segment_ids [B,T], or the step's active [B]."""
    check = Arguments("short_convolution")
    check.array("x", x, "B D" if step else "B T D", *FLOATS)
    check.array("weight", weight, "taps D", *FLOATS)
    sizes, dtype = check.sizes, str(x.dtype)
    taps = sizes["taps"]
    check.require(taps > 1, f"weight has {taps} tap; it must have at least 2: multiply x by the weight instead")
    sizes["taps-1"] = taps - 1
    if step:
        check.array("state", state, "B taps-1 D", dtype)
        check.optional("active", mask, "B", "bool")
    else:
        check.optional("initial_state", state, "B taps-1 D", dtype)
        check.optional("segment_ids", mask, "B T", "int32")
    check.choice("activation", activation, ACTIVATIONS)
    return Case(
        batch=sizes["B"],
        tokens=sizes.get("T", 1),
        width=sizes["D"],
        taps=taps,
        dtype=dtype,
        packed=mask is not None and not step,
        initial_state=state is not None,
        activation=activation,
        step=step,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _differentiable(backend: ModuleType, activation: str | None, x, weight, segment_ids, initial_state):
    return backend.forward(x, weight, segment_ids, initial_state, activation=activation)


def _forward_rule(backend, activation, *inputs):
    inputs = tuple(None if x is None else x.value for x in inputs)
    outputs = backend.forward(*inputs, activation=activation)
    return checkpoint_name(outputs, "short_convolution_out"), inputs


def _backward_rule(backend, activation, inputs, cotangents):
    dy, dfinal_state = cotangents
    if isinstance(dy, SymbolicZero):
        dy = jnp.zeros(dy.shape, dy.dtype)
    if isinstance(dfinal_state, SymbolicZero):
        dfinal_state = None
    dx, dweight, dinitial_state = backend.backward(*inputs, dy, dfinal_state, activation=activation)
    return dx, dweight, None, dinitial_state


_differentiable.defvjp(_forward_rule, _backward_rule, symbolic_zeros=True)


def short_convolution(
    x: Float[Array, "B T D"],
    weight: Float[Array, "taps D"],
    *,
    segment_ids: Int32[Array, "B T"] | None = None,
    initial_state: Float[Array, "B taps-1 D"] | None = None,
    activation: str | None = "silu",
    implementation: str | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B taps-1 D"]]:
    """y_t = act(sum_i w[i] x_{t - taps + 1 + i}) within each document; sums in float32.

    Args:
      x: float32, bfloat16 or float16.
      weight: w[-1] multiplies the current token; at least 2 taps.
      segment_ids: document of each token; no tap reaches over a change of id, and tokens of id 0 are padding, whose x
        is finite: they change nothing and their outputs are 0. None means one document without padding.
      initial_state: the taps - 1 inputs before the row's first document token, oldest first, in the dtype of x; None
        means zeros, as before a document's start.
      activation: "silu" or None.
      implementation: "triton", "xla", or None for the fastest that supports the case.

    Returns:
      y in the dtype of x, and final_state: the last taps - 1 inputs of the row's last document, zeros where it is
      shorter (of a row of padding: its initial state). Both are differentiable in x, weight and initial_state.

    Raises:
      UnsupportedCase: a shape, dtype or activation breaks the rules above, or the named implementation does not
        support the case.
    """
    case = _make_case(x, weight, initial_state, segment_ids, activation, step=False)
    backend = OPERATION.select(implementation, case)
    return _differentiable(backend, activation, x, weight, segment_ids, initial_state)


def short_convolution_step(
    x: Float[Array, "B D"],
    weight: Float[Array, "taps D"],
    state: Float[Array, "B taps-1 D"],
    *,
    active: Bool[Array, "B"] | None = None,
    activation: str | None = "silu",
    implementation: str | None = None,
) -> tuple[Float[Array, "B D"], Float[Array, "B taps-1 D"]]:
    """One token of :func:`short_convolution`; rows that are not ``active`` keep their state and output 0.

    Raises:
      UnsupportedCase: as :func:`short_convolution`; the state is required.
    """
    case = _make_case(x, weight, state, active, activation, step=True)
    backend = OPERATION.select(implementation, case)
    y, after = backend.step(x, weight, state, activation=activation)
    if active is not None:
        y = jnp.where(active[:, None], y, jnp.zeros((), y.dtype))
        after = jnp.where(active[:, None, None], after, state)
    return y, after
