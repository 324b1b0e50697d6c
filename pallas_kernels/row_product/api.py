"""What the product of few rows computes, which arguments it takes, and what a backend must provide.

For rows x [B,D] and a weight that lies by output, [F,D]:

    n = rms(x) if a norm is given, else x;    z = n W^T + bias
    y = silu(z[:, :F/2]) z[:, F/2:] if gated, else z;    y += residual

A decode step reads every weight for a handful of rows: its time is that of the memory, and of the launches. So what
stands before and after a product is part of its launch, several maps of one input are one weight, and y is handed out
in the pieces that the maps have. By output, a weight's rows are read whole, and no sum is split over programs.

A backend is a module of this folder with two functions, whose arguments have been checked:

``check(case: Case) -> None``
    Raises UnsupportedCase for what the backend does not do.
``forward(x, weight, norm, bias, residual, *, eps, gated, widths, dtype) -> tuple of y's pieces``
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.arguments import FLOATS, Arguments
from pallas_kernels.dispatch import Operation

OPERATION = Operation("row_product", implementations=("triton", "xla"), fastest=("triton", "xla"))


@dataclasses.dataclass(frozen=True)
class Case:
    """One call, as far as the choice of an implementation is concerned."""

    rows: int
    depth: int
    widths: tuple[int, ...]
    dtype: str
    gated: bool


def row_product(
    x: Float[Array, "B D"],
    weight: Float[Array, "F D"],
    *,
    norm: Float[Array, " D"] | None = None,
    eps: float = 1e-6,
    bias: Float[Array, " F"] | None = None,
    residual: Float[Array, "B Y"] | None = None,
    gated: bool = False,
    widths: Sequence[int] | None = None,
    dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, ...]:
    """y as above, in pieces; not differentiable (training multiplies whole batches).

    Args:
      weight: in the dtype of x.
      norm: the weight of an RMSNorm over x, any float dtype; the norm is computed in float32.
      eps: of that norm.
      residual: added to y, whose width is Y: F, or F/2 if gated.
      gated: the first half of the weight's rows is the gate's.
      widths: of the pieces; they add up to Y. None is one piece.
      dtype: of y; default that of x. Sums are float32 always.
      implementation: "triton", "xla", or None for the fastest.

    Raises:
      UnsupportedCase: a shape, dtype or implementation outside of this; nothing has been launched then.
    """
    check = Arguments("row_product")
    check.array("x", x, "B D", *FLOATS)
    check.array("weight", weight, "F D", str(x.dtype))
    (B, D), F = x.shape, weight.shape[0]
    check.require(not (gated and F % 2), f"weight has {F} rows; gated, it must have an even number")
    check.sizes["Y"] = width = F // 2 if gated else F
    widths = (width,) if widths is None else tuple(widths)
    for piece in widths:
        check.count("the width of one of y's pieces", piece)
    check.require(sum(widths) == width, f"widths={widths}; they must be positive numbers that add up to {width}")
    check.optional("norm", norm, "D", *FLOATS)
    check.optional("bias", bias, "F", *FLOATS)
    check.optional("residual", residual, "B Y", *FLOATS)
    out, eps = check.dtype("dtype", x.dtype if dtype is None else dtype), check.number("eps", eps, least=0.0)
    backend = OPERATION.select(implementation, Case(B, D, widths, str(x.dtype), bool(gated)))
    return backend.forward(x, weight, norm, bias, residual, eps=eps, gated=bool(gated), widths=widths, dtype=out)
