"""What cross-entropy with its gradient computes, which arguments it takes, and what a backend must provide.

    loss_r = logsumexp_l z_rl - z_r[label],   dloss_r/dz_rl = softmax(z_r)_l - [l = label]

both 0 in rows without a label. A backend is a module of this folder with two functions, whose arguments are checked:

``check(case: Case) -> None``
    Raises UnsupportedCase for what the backend does not do.
``forward(logits, labels, *, dtype) -> loss, correct, gradient``
    As :func:`cross_entropy` returns them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.dispatch import Operation, UnsupportedCase

OPERATION = Operation("cross_entropy", implementations=("triton", "xla"), fastest=("triton", "xla"))

_DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Case:
    """One call, as far as the choice of an implementation is concerned."""

    rows: int
    vocabulary: int
    dtype: str


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UnsupportedCase(f"cross_entropy: {message}")


def cross_entropy(
    logits: Float32[Array, "rows L"],
    labels: Int32[Array, "rows"],
    *,
    dtype: DTypeLike = jnp.float32,
    implementation: str | None = None,
) -> tuple[Float32[Array, "rows"], Float32[Array, "rows"], Float[Array, "rows L"]]:
    """The loss of each row, whether its label is the best column, and the gradient in its logits.

    It is not differentiable: the gradient is here.

    Args:
      logits: float32.
      labels: int32, in [0, L), or negative where nothing is asked.
      dtype: of the gradient, which is computed in float32: float32, bfloat16 or float16.
      implementation: "triton", "xla", or None for the fastest.

    Returns:
      loss, float32; correct, 1.0 where the first column of the largest logit is the label, else 0.0; the gradient of
      the loss. All are 0 in rows without a label.

    Raises:
      UnsupportedCase: a shape or dtype breaks the rules above, or the named implementation does not do the case.
    """
    for name, array, dimensions, wanted in (("logits", logits, 2, "float32"), ("labels", labels, 1, "int32")):
        _require(hasattr(array, "shape"), f"{name} is a {type(array).__name__}; pass an array")
        _require(array.ndim == dimensions and array.size > 0, f"{name} has shape {array.shape}; pass {dimensions} axes")
        _require(str(array.dtype) == wanted, f"{name} has dtype {array.dtype}; it must be {wanted}: cast it")
    rows, vocabulary = logits.shape
    _require(labels.shape == (rows,), f"labels have shape {labels.shape}; there are {rows} rows of logits")
    dtype = jnp.dtype(dtype)
    _require(str(dtype) in _DTYPES, f"dtype={dtype} is not one of {', '.join(_DTYPES)}")
    backend: Any = OPERATION.select(implementation, Case(rows, vocabulary, str(dtype)))
    return jax.lax.stop_gradient(backend.forward(logits, labels, dtype=dtype))
