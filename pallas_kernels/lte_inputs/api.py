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

from jaxtyping import Array, Bool, Float, Float32, Int32

from pallas_kernels.arguments import FLOATS, Arguments
from pallas_kernels.dispatch import Operation

OPERATION = Operation("lte_inputs", implementations=("triton", "xla"), fastest=("triton", "xla"))


class Convolution(NamedTuple):
    """W [heads, taps, I, O] and b [heads, O], heads K or 1; ``dilation`` is static."""

    weight: Float[Array, "heads taps I O"]
    bias: Float[Array, "heads O"]
    dilation: int


class Operands(NamedTuple):
    """The arrays of one call: q, k and v of one dtype; half = N/2, C = 2N, past = sum of (taps - 1) dilation."""

    q: Float[Array, "B H N"]
    k: Float[Array, "B K N"]
    v: Float[Array, "B K N"]
    position: Int32[Array, "B"]
    cos: Float32[Array, "B half"]
    sin: Float32[Array, "B half"]
    recent: Float[Array, "B past K C"]
    convolutions: tuple[Convolution, ...]
    weight: Float[Array, "heads I"]
    bias: Float[Array, " heads"]


class Results(NamedTuple):
    """q and k rotated, the score that is now final, float32, and the inputs to remember."""

    q: Float[Array, "B H N"]
    k: Float[Array, "B K N"]
    score: Float32[Array, "B K"]
    recent: Float[Array, "B past K C"]


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
      UnsupportedCase: shapes or dtypes that do not fit each other, or an implementation that does not do them.
    """
    case = _make_case(operands, active, method)
    return OPERATION.select(implementation, case).step(operands, active, method=method)


def _make_case(operands: Operands, active: Bool[Array, "B"] | None, method: str) -> Case:
    """Checks every argument."""
    check, convolutions = Arguments("lte_inputs"), operands.convolutions
    sizes = check.sizes
    check.array("k", operands.k, "B K N", *FLOATS)
    dtype = str(operands.k.dtype)
    check.array("q", operands.q, "B H N", dtype)
    check.array("v", operands.v, "B K N", dtype)
    check.heads()
    check.array("position", operands.position, "B", "int32")
    check.require(sizes["N"] % 2 == 0, f"heads have {sizes['N']} channels; their halves are rotated: an even number")
    sizes |= {"half": sizes["N"] // 2, "C_0": 2 * sizes["N"], "past": 0}
    check.array("cos", operands.cos, "B half", "float32")
    check.array("sin", operands.sin, "B half", "float32")
    check.array("bias", operands.bias, "heads", *FLOATS)
    heads, K = sizes["heads"], sizes["K"]
    check.require(heads in (1, K), f"weights for {heads} heads; there must be {K}, as k has, or 1 that all share")
    given = isinstance(convolutions, (list, tuple))
    check.require(given, f"convolutions is {type(convolutions).__name__}; it must be a tuple of Convolution")
    for n, convolution in enumerate(convolutions, start=1):
        name = f"convolution {n}"
        check.record(name, convolution, Convolution)
        check.count(f"the dilation of {name}", convolution.dilation)
        check.array(f"the weight of {name}", convolution.weight, f"heads taps_{n} C_{n - 1} C_{n}", *FLOATS)
        check.array(f"the bias of {name}", convolution.bias, f"heads C_{n}", *FLOATS)
        sizes["past"] += (sizes[f"taps_{n}"] - 1) * convolution.dilation
    past, count = sizes["past"], len(convolutions)
    check.require(past > 0 and past % 2 == 0, f"the convolutions reach over {past} inputs; it must be an even number")
    check.array("weight", operands.weight, f"heads C_{count}", *FLOATS)
    check.array("recent", operands.recent, "B past K C_0", *FLOATS)
    check.choice("method", method, ("sigmoid", "relu"))
    check.optional("active", active, "B", "bool")
    return Case(
        batch=sizes["B"],
        heads=sizes["H"],
        kv_heads=K,
        size=sizes["N"],
        channels=tuple(sizes[f"C_{n}"] for n in range(count + 1)),
        taps=tuple(sizes[f"taps_{n + 1}"] for n in range(count)),
        dilations=tuple(convolution.dilation for convolution in convolutions),
        dtype=dtype,
        recent_dtype=str(operands.recent.dtype),
    )
