"""What LTE's router computes, which arguments it takes, and what a backend must provide.

Each KV head h of each token t has a score of its own. With C_0 = 2N channels and n convolutions,

    x_0 = [k_h ; v_h]
    x_n = silu(real * (conv_n(dropout(x_{n-1})) + b_n))        C_n = floor(C_{n-1} / 2) channels
    z   = w . x_last + b,      r = real * (sigmoid(z) - 1/2   or   relu(z))
    conv_n(x)_t = sum_i x_{t + i d_n - (taps_n - 1) d_n / 2} W_n[i]

over the tokens of one document; what lies outside of it, and padding, counts as zeros (paper 2510.20787, section 3).

A backend is a module of this folder with three functions, whose arguments have been checked:

``check(case: Case) -> None``
    Raises UnsupportedCase for what the backend does not do.
``forward(case, operands: Operands) -> r``
``backward(case, operands, dr) -> Gradients``
    Of k and v in their dtype, of the weights in float32.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32, Int32, UInt32

from pallas_kernels.arguments import FLOATS, Arguments
from pallas_kernels.dispatch import Operation
from pallas_kernels.router import dropout as counters
from pallas_kernels.router.dropout import Dropout

OPERATION = Operation("router", implementations=("triton", "xla"), fastest=("triton", "xla"))

METHODS = ("sigmoid", "relu")


class Convolution(NamedTuple):
    """W [heads, taps, C_{n-1}, C_n] and b [heads, C_n]; heads is K, or 1 where all heads share the weights."""

    weight: Float[Array, "heads taps I O"]
    bias: Float[Array, "heads O"]


class Operands(NamedTuple):
    """The arrays of one call, weights in float32; ``segment_ids`` and ``seeds`` are None where not given."""

    k: Float[Array, "B T K N"]
    v: Float[Array, "B T K N"]
    convolutions: tuple[Convolution, ...]
    weight: Float32[Array, "heads I"]
    bias: Float32[Array, " heads"]
    segment_ids: Int32[Array, "B T"] | None
    seeds: UInt32[Array, "convolutions 2"] | None


class Gradients(NamedTuple):
    """Cotangents of the differentiable operands."""

    k: Array
    v: Array
    convolutions: tuple[Convolution, ...]
    weight: Array
    bias: Array


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes and options of one call.

    ``channels`` are C_0 .. C_last; ``threshold`` is the dropout rate in 2^-16, 0 for none, and ``extent`` the (T, K)
    that its counter runs over.
    """

    B: int
    T: int
    K: int
    N: int
    heads: int
    channels: tuple[int, ...]
    taps: tuple[int, ...]
    dilations: tuple[int, ...]
    method: str
    dtype: str
    segment_ids: bool
    threshold: int
    extent: tuple[int, int]

    def offsets(self, layer: int) -> tuple[int, ...]:
        """Where the taps of a convolution stand, from the token that reads them."""
        taps, dilation = self.taps[layer], self.dilations[layer]
        return tuple(tap * dilation - (taps - 1) * dilation // 2 for tap in range(taps))

    @property
    def scale(self) -> float:
        return counters.scale(self.threshold)


def router_scores(
    k: Float[Array, "B T K N"],
    v: Float[Array, "B T K N"],
    convolutions: Sequence[Convolution],
    weight: Float[Array, "heads I"],
    bias: Float[Array, " heads"],
    *,
    dilations: Sequence[int],
    method: str = "sigmoid",
    segment_ids: Int32[Array, "B T"] | None = None,
    dropout: Dropout | None = None,
    implementation: str | None = None,
) -> Float32[Array, "B T K"]:
    """The score r of every token and KV head, float32; 0 at padding.

    Args:
      k, v: keys without rotary positions, and values, of one shape and dtype: float32, bfloat16 or float16. Products
        take operands of this dtype and accumulate in float32; x_n is rounded to it.
      convolutions: n of them, each halving the channels (rounded down). (taps - 1) * dilation must be even.
      weight, bias: of the last, linear map. All weights are rounded to k's dtype but these two, which stay float32.
      method: "sigmoid" or "relu".
      segment_ids: a document's number for each token, 0 for padding; None: one document, no padding.
      dropout: None for none.
      implementation: "triton", "xla", or None for the fastest here.

    Differentiable in k, v and all weights; the gradients of weights are summed in float32. A second run gives the same
    bits. Under vmap the calls run one after the other.

    Raises:
      UnsupportedCase: an argument breaks one of these rules, or the implementation does not do this case.
    """
    check = Arguments("router")
    for name, value in (("convolutions", convolutions), ("dilations", dilations)):
        check.require(isinstance(value, (list, tuple)), f"{name} is {type(value).__name__}; it must be a list or tuple")
    for n, conv in enumerate(convolutions, start=1):
        check.record(f"convolution {n}", conv, Convolution)
    convolutions = tuple(convolutions)
    seeds = None
    if dropout is not None:
        check.require(isinstance(dropout, Dropout), f"dropout is {type(dropout).__name__}; it must be a Dropout")
        seeds = dropout.seeds
    operands = Operands(k, v, convolutions, weight, bias, segment_ids, seeds)
    case = _make_case(check, operands, tuple(dilations), method, dropout)
    module = OPERATION.select(implementation, case)
    if case.threshold == 0:
        operands = operands._replace(seeds=None)
    # Here, so that a gradient is rounded to a weight's own dtype once, at the end.
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (convolutions, weight, bias))
    operands = operands._replace(convolutions=wide[0], weight=wide[1], bias=wide[2])
    return _scores(module, case, operands)


def _make_case(
    check: Arguments, operands: Operands, dilations: tuple[int, ...], method: str, dropout: Dropout | None
) -> Case:
    k, convolutions = operands.k, operands.convolutions
    count, sizes = len(convolutions), check.sizes
    check.array("k", k, "B T K N", *FLOATS)
    check.array("v", operands.v, "B T K N", str(k.dtype))
    check.require(
        0 < count == len(dilations),
        f"{count} convolutions and {len(dilations)} dilations; give each convolution one, and at least one",
    )
    check.array("the last map's bias", operands.bias, "heads", *FLOATS)
    heads, K = sizes["heads"], sizes["K"]
    check.require(heads in (1, K), f"weights for {heads} heads; there must be {K}, as k has, or 1 that all share")
    sizes["C_0"] = 2 * sizes["N"]
    for n, (conv, dilation) in enumerate(zip(convolutions, dilations, strict=True), start=1):
        sizes[f"C_{n}"] = halved = sizes[f"C_{n - 1}"] // 2
        check.require(halved > 0, f"{count} convolutions halve the {sizes['C_0']} channels to nothing: use fewer")
        check.array(f"the weight of convolution {n}", conv.weight, f"heads taps_{n} C_{n - 1} C_{n}", *FLOATS)
        check.array(f"the bias of convolution {n}", conv.bias, f"heads C_{n}", *FLOATS)
        taps = sizes[f"taps_{n}"]
        check.count(f"the dilation of convolution {n}", dilation)
        check.require(
            (taps - 1) * dilation % 2 == 0,
            f"{taps} taps at dilation {dilation} have no centre: (taps - 1) * dilation must be even",
        )
    check.array("the last map's weight", operands.weight, f"heads C_{count}", *FLOATS)
    check.choice("method", method, METHODS)
    check.optional("segment_ids", operands.segment_ids, "B T", "int32")
    if dropout is not None:
        sizes["convolutions"] = count
        check.array("dropout.seeds", dropout.seeds, "convolutions 2", "uint32")
        rate = check.number("dropout.rate", dropout.rate, least=0.0)
        fits = rate <= 1.0 and counters.threshold(rate) < 2**16
        check.require(fits, f"dropout.rate={dropout.rate} must lie in [0, 1), also once rounded to a multiple of 2^-16")
    return Case(
        **{letter: sizes[letter] for letter in "BTKN"},
        heads=heads,
        channels=tuple(sizes[f"C_{n}"] for n in range(count + 1)),
        taps=tuple(sizes[f"taps_{n + 1}"] for n in range(count)),
        dilations=dilations,
        method=method,
        dtype=str(k.dtype),
        segment_ids=operands.segment_ids is not None,
        threshold=0 if dropout is None else counters.threshold(dropout.rate),
        extent=(sizes["T"], K) if dropout is None or dropout.extent is None else dropout.extent,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scores(module: ModuleType, case: Case, operands: Operands) -> Array:
    return jax.custom_batching.sequential_vmap(functools.partial(module.forward, case))(operands)


def _forward_rule(module: ModuleType, case: Case, operands: Operands) -> tuple[Array, Operands]:
    # The backward pass computes again from k and v: what lies between is three times their size in float32.
    return checkpoint_name(_scores(module, case, operands), "router_out"), operands


def _backward_rule(module: ModuleType, case: Case, operands: Operands, dr: Array) -> tuple[Operands]:
    found = jax.custom_batching.sequential_vmap(functools.partial(module.backward, case))(operands, dr)
    return (Operands(found.k, found.v, found.convolutions, found.weight, found.bias, None, None),)


_scores.defvjp(_forward_rule, _backward_rule)
