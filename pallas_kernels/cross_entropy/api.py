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

from pallas_kernels.arguments import Arguments
from pallas_kernels.dispatch import Operation

OPERATION = Operation("cross_entropy", implementations=("triton", "xla"), fastest=("triton", "xla"))


@dataclasses.dataclass(frozen=True)
class Case:
    """One call, as far as the choice of an implementation is concerned."""

    rows: int
    vocabulary: int
    dtype: str


def cross_entropy(
    logits: Float32[Array, "rows L"],
    labels: Int32[Array, " rows"],
    *,
    dtype: DTypeLike = jnp.float32,
    implementation: str | None = None,
) -> tuple[Float32[Array, " rows"], Float32[Array, " rows"], Float[Array, "rows L"]]:
    """The loss of each row, whether its label is the best column, and the gradient in its logits.

    It is not differentiable, a gradient through it is 0: the gradient is here.

    Args:
      logits: float32.
      labels: int32, in [0, L), or negative where nothing is asked; the loss of any other is NaN.
      dtype: of the gradient, which is computed in float32: float32, bfloat16 or float16.
      implementation: "triton", "xla", or None for the fastest.

    Returns:
      loss, float32; correct, 1.0 where the first column of the largest logit is the label, else 0.0; the gradient of
      the loss. All are 0 in rows without a label.

    Raises:
      UnsupportedCase: a shape or dtype breaks the rules above, or the named implementation does not do the case.
    """
    check = Arguments("cross_entropy")
    check.array("logits", logits, "rows L", "float32")
    check.array("labels", labels, "rows", "int32")
    dtype = check.dtype("dtype", dtype)
    rows, vocabulary = logits.shape
    backend: Any = OPERATION.select(implementation, Case(rows, vocabulary, str(dtype)))
    return backend.forward(jax.lax.stop_gradient(logits), labels, dtype=dtype)
