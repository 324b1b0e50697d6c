"""What a decode step of LTE computes before it attends, which arguments that takes, and what a backend must provide.

For a token at position p of its document, per KV head, with J = 2 reach + 1 and the last J - 1 inputs remembered,

    x = [remembered ; [k ; v]]                            J inputs of C channels; those before position 0 are 0
    x <- silu(real * (sum_i x[i d :] W_i + b))            a convolution drops (taps - 1) d inputs; at last 1 is left
    score = real * (sigmoid(w . x + b') - 1/2   or   relu(w . x + b'))       of the token at position p - reach
    q, k <- (x1 cos - x2 sin, x2 cos + x1 sin) on halves;     the remembered inputs move on by one

A backend is a module of this folder with two functions, whose arguments have been checked:

``check(case: Case) -> None``
    Raises UnsupportedCase for what the backend does not do.
``step(operands: Operands, active, *, method) -> Results``
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
from jaxtyping import Array, Bool, Float, Float32, Int32

from pallas_kernels.arguments import Arguments
from pallas_kernels.dispatch import Operation

OPERATION = Operation("lte_inputs", implementations=("triton", "xla"), fastest=("triton", "xla"))


class Convolution(NamedTuple):
    """W [heads, taps, I, O] and b [heads, O], heads K or 1; ``dilation`` is static."""

    weight: Float[Array, "heads taps I O"]
    bias: Float[Array, "heads O"]
    dilation: int


class Operands(NamedTuple):
    """The arrays of one call."""

    q: Float[Array, "B H N"]
    k: Float[Array, "B K N"]
    v: Float[Array, "B K N"]
    position: Int32[Array, "B"]
    cos: Float32[Array, "B half"]
    sin: Float32[Array, "B half"]
    recent: Float[Array, "B past K C"]
    convolutions: tuple[Convolution, ...]
    weight: Float[Array, "heads I"]
    bias: Float[Array, "heads"]


class Results(NamedTuple):
    """q and k rotated, the score that is now final, float32, and the inputs to remember."""

    q: jax.Array
    k: jax.Array
    score: Float32[Array, "B K"]
    recent: jax.Array


@dataclasses.dataclass(frozen=True)
class Case:
    """One call, as far as the choice of an implementation is concerned."""

    batch: int
    heads: int
    kv_heads: int
    size: int
    channels: tuple[int, ...]
    taps: tuple[int, ...]
    dilations: tuple[int, ...]
    dtype: str
    recent_dtype: str


def lte_inputs_step(
    operands: Operands, *, method: str, active: Bool[Array, "B"] | None = None, implementation: str | None = None
) -> Results:
    """The step above; ``recent`` is updated in place where it is donated.

    Args:
      method: "sigmoid" or "relu".
      active: rows that have a token; the others keep their ``recent``. None means all.

    Raises:
      UnsupportedCase: shapes that do not fit each other, or an implementation that does not do them.
    """
    check = Arguments("lte_inputs")
    check.array("k", operands.k, "B K N")
    sizes, convolutions = check.sizes, operands.convolutions
    sizes["past"] = sum((c.weight.shape[1] - 1) * c.dilation for c in convolutions)
    sizes["2*N"] = 2 * sizes["N"]
    check.array("q", operands.q, "B H N")
    check.array("v", operands.v, "B K N")
    check.array("recent", operands.recent, "B past K 2*N")
    check.array("position", operands.position, "B")
    check.choice("method", method, ("sigmoid", "relu"))
    B, H, K, N = (sizes[letter] for letter in "BHKN")
    case = Case(
        B,
        H,
        K,
        N,
        channels=(2 * N, *(c.weight.shape[3] for c in convolutions)),
        taps=tuple(c.weight.shape[1] for c in convolutions),
        dilations=tuple(c.dilation for c in convolutions),
        dtype=str(operands.k.dtype),
        recent_dtype=str(operands.recent.dtype),
    )
    return OPERATION.select(implementation, case).step(operands, active, method=method)
