"""What the gated norm computes, which arguments it takes, and what a backend must provide.

    y = weight x / sqrt(mean(x^2) + eps) silu(gate)

over the last dimension, in float32 throughout; without a gate, without the last factor.

A backend is a module of this folder with three functions, whose arguments have been checked:

``check(case: Case) -> None``
    Raises UnsupportedCase for what the backend does not do.
``forward(x, weight, gate, *, eps, dtype) -> y``
    x and gate (or None) [..., V], weight [V]; y in ``dtype``. Not as rows: batch and length stay apart for the compiler
    to split them on a mesh.
``backward(x, weight, gate, dy, past=None, *, eps) -> dx, dweight, dgate``
    Gradients in the dtype of what they belong to; dgate is None where gate is. ``past``, like x and where there is no
    gate, is added to dx.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from types import ModuleType
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.arguments import FLOATS, Arguments
from pallas_kernels.dispatch import Operation

OPERATION = Operation("rms_norm", implementations=("triton", "xla"), fastest=("triton", "xla"))


@dataclasses.dataclass(frozen=True)
class Case:
    """One call, as far as the choice of an implementation is concerned."""

    rows: int
    width: int
    dtype: str
    gated: bool


def _make_case(check: Arguments, x: Any, weight: Any, gate: Any) -> Case:
    rows = " ".join(f"rows_{axis}" for axis in range(getattr(x, "ndim", 1) - 1))
    check.array("x", x, f"{rows} V", *FLOATS)
    check.array("weight", weight, "V", *FLOATS)
    check.optional("gate", gate, f"{rows} V", *FLOATS)
    return Case(math.prod(x.shape[:-1]), x.shape[-1], str(x.dtype), gate is not None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _differentiable(backend: ModuleType, eps: float, dtype: DTypeLike, x, weight, gate):
    return backend.forward(x, weight, gate, eps=eps, dtype=dtype)


def _forward_rule(backend, eps, dtype, *inputs):
    return checkpoint_name(backend.forward(*inputs, eps=eps, dtype=dtype), "rms_norm_out"), inputs


def _backward_rule(backend, eps, dtype, inputs, dy):
    return backend.backward(*inputs, dy, eps=eps)


_differentiable.defvjp(_forward_rule, _backward_rule)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _residual(backend: ModuleType, eps: float, dtype: DTypeLike, x, weight):
    return x, backend.forward(x, weight, None, eps=eps, dtype=dtype)


def _residual_forward_rule(backend, eps, dtype, x, weight):
    return _residual(backend, eps, dtype, x, weight), (x, weight)


def _residual_backward_rule(backend, eps, dtype, inputs, cotangents):
    past, dy = cotangents
    return backend.backward(*inputs, None, dy, past, eps=eps)[:2]


_residual.defvjp(_residual_forward_rule, _residual_backward_rule)


def rms_norm(
    x: Float[Array, "*rows V"],
    weight: Float[Array, " V"],
    gate: Float[Array, "*rows V"] | None = None,
    *,
    eps: float,
    dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> Float[Array, "*rows V"]:
    """y = weight x / sqrt(mean(x^2) + eps) silu(gate), the mean over the last dimension; computed in float32.

    Args:
      x: float32, bfloat16 or float16, with any leading dimensions.
      gate: multiplies by its SiLU; None means no gate.
      eps: not negative.
      dtype: of y, a float one; by default that of x.
      implementation: "triton", "xla", or None for the fastest that supports the case.

    Returns:
      y, differentiable in x, weight and gate.

    Raises:
      UnsupportedCase: an argument breaks the rules above, or the named implementation does not support the case.
    """
    check = Arguments("rms_norm")
    case = _make_case(check, x, weight, gate)
    dtype, eps = check.dtype("dtype", x.dtype if dtype is None else dtype), check.number("eps", eps, least=0.0)
    backend = OPERATION.select(implementation, case)
    return _differentiable(backend, eps, dtype, x, weight, gate)


def residual_rms_norm(
    x: Float[Array, "*rows V"],
    weight: Float[Array, " V"],
    *,
    eps: float,
    dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "*rows V"], Float[Array, "*rows V"]]:
    """(x, its norm), for a residual stream, in which x goes on beside its norm: one pass adds up its two gradients.

    Arguments and errors are those of :func:`rms_norm`.
    """
    check = Arguments("rms_norm")
    case = _make_case(check, x, weight, None)
    dtype, eps = check.dtype("dtype", x.dtype if dtype is None else dtype), check.number("eps", eps, least=0.0)
    return _residual(OPERATION.select(implementation, case), eps, dtype, x, weight)
