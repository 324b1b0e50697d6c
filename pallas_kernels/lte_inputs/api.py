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

from pallas_kernels.dispatch import Operation, UnsupportedCase

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
    q, k, recent = operands.q, operands.k, operands.recent
    B, K, N = k.shape
    past = sum((c.weight.shape[1] - 1) * c.dilation for c in operands.convolutions)
    wanted: dict[str, tuple[int, ...]] = {
        "q": (B, q.shape[1], N),
        "v": (B, K, N),
        "recent": (B, past, K, 2 * N),
        "position": (B,),
    }
    for name, shape in wanted.items():
        found = getattr(operands, name).shape
        if found != shape:
            raise UnsupportedCase(f"lte_inputs: {name} has shape {found}; it must be {shape}")
    if method not in ("sigmoid", "relu"):
        raise UnsupportedCase(f"lte_inputs: method={method!r} is not sigmoid or relu")
    case = Case(
        B,
        q.shape[1],
        K,
        N,
        (2 * N, *(c.weight.shape[3] for c in operands.convolutions)),
        tuple(c.weight.shape[1] for c in operands.convolutions),
        tuple(c.dilation for c in operands.convolutions),
        str(k.dtype),
        str(recent.dtype),
    )
    return OPERATION.select(implementation, case).step(operands, active, method=method)
