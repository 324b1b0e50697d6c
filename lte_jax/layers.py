"""The small layers that mixers and blocks are made of: linear maps, RMSNorm, rotary positions, gated MLP, embedding.

Weights are stored in ``param_dtype`` and cast to ``dtype`` where they are used. Every parameter names its logical axes
(``axes`` in its metadata), which ``sharding.py`` maps to mesh axes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Int32

from lte_jax.dims import Hidden, Positions, Tokens
from lte_jax.remat import operand
from pallas_kernels.documents import document_bounds

Initializer = Callable[[jax.Array, Sequence[int], DTypeLike], jax.Array]


@dataclasses.dataclass(frozen=True)
class InitRule:
    """How weights start: one rule for every model.

    Linear maps, convolutions and embeddings are drawn from N(0, std^2). With ``rescale_residual``, the maps that write
    into the residual stream (output and down projections) are uniform in +-1/sqrt(fan_in), divided by
    sqrt(2 * num_layers); without it they follow the first rule, as the authors' non-hybrid baselines do.
    """

    std: float = 0.006
    num_layers: int = 1
    rescale_residual: bool = True

    def normal(self) -> Initializer:
        return jax.nn.initializers.normal(self.std)

    def residual(self, fan_in: int) -> Initializer:
        if not self.rescale_residual:
            return self.normal()
        bound = 1.0 / math.sqrt(fan_in * 2 * self.num_layers)
        return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the modules of one model are made: what each of them is given.

    Attributes:
      rngs: draws the parameters from its ``params`` stream.
      dtype: of the computation; param_dtype: of the stored weights.
      max_length: the default bound of caches that grow.
      implementation: of every operation; None picks the fastest.
    """

    rngs: nnx.Rngs
    init: InitRule = InitRule()
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    max_length: int = 4096
    implementation: str | None = None

    def parameter(
        self, initializer: Initializer, shape: Sequence[int], axes: Sequence[str | None], multiplied: bool = False
    ) -> nnx.Param:
        """A parameter of ``shape`` whose dimensions carry the logical names ``axes``.

        ``multiplied``: every reader casts it to the model's dtype first (``as_read``).
        """
        assert len(axes) == len(shape), f"{len(axes)} axis names for {len(shape)} dimensions"
        named: dict[str, Any] = {"multiplied": True} if multiplied else {}
        return nnx.Param(initializer(self.rngs.params(), tuple(shape), self.param_dtype), axes=tuple(axes), **named)


def as_read(state: Any, dtype: DTypeLike) -> Any:
    """A module's state with the weights of products in ``dtype``, the model's: cast once, and no gradient wider."""

    def cast(variable: nnx.Variable) -> nnx.Variable:
        multiplied = variable.get_metadata().get("multiplied")
        return variable.replace(variable.get_value().astype(dtype)) if multiplied else variable

    return jax.tree.map(cast, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


class Linear(nnx.Module):
    """y = x W + b, with W [in, out]; bias only if asked for (it starts at 0).

    ``residual``: y goes into the residual stream, which decides how W starts.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        recipe: Recipe,
        *,
        axes: tuple[str | None, str | None],
        residual: bool = False,
        use_bias: bool = False,
    ):
        start = recipe.init.residual(in_features) if residual else recipe.init.normal()
        self.weight = recipe.parameter(start, (in_features, out_features), axes, multiplied=True)
        self.bias = recipe.parameter(jax.nn.initializers.zeros, (out_features,), axes[1:]) if use_bias else None
        self.dtype = recipe.dtype

    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        y = _multiply(x.astype(self.dtype), self.weight[...].astype(self.dtype))
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


def _multiply(x: Float[Array, "... I"], weight: Float[Array, "I O"]) -> Float[Array, "... O"]:
    """x W. A single row is multiplied with rows of zeros beside it.

    XLA's GPU compiler writes the product of one row as a sum over x_i W_i, which in 16 bits it first stores as a whole
    and then adds up in 16 bits: several times slower than reading W once, and less exact.
    """
    if math.prod(x.shape[:-1]) != 1:
        return jnp.matmul(x, weight)
    rows = jnp.pad(x.reshape(1, -1), ((0, 7), (0, 0)))
    return jnp.matmul(rows, weight)[:1].reshape(*x.shape[:-1], -1)


class RMSNorm(nnx.Module):
    """y = weight * x / sqrt(mean(x^2) + eps) over the last dimension, computed in float32."""

    def __init__(self, features: int, recipe: Recipe, *, eps: float):
        self.weight = recipe.parameter(jax.nn.initializers.ones, (features,), (None,))
        self.eps = eps
        self.dtype = recipe.dtype

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        x32 = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return (x32 * scale * self.weight[...].astype(jnp.float32)).astype(self.dtype)


def rotation(positions: Int[Array, "..."], half: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """cos and sin, [..., half] float32, of the angles position * theta^(-2n/N) that :func:`rotary` turns by."""
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotary(x: Float[Array, "B T H N"], positions: Positions, theta: float) -> Float[Array, "B T H N"]:
    """Rotary positions on halves: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin), angle = position * theta^(-2n/N).

    x1 and x2 are the first and the second half of the head, and positions count from the start of the document.
    The rotation is computed in float32 and returned in the dtype of x.
    """
    cos, sin = (part[..., None, :] for part in rotation(positions, x.shape[-1] // 2, theta))
    return operand(_turn(x, cos, sin))


@jax.custom_vjp
def _turn(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    half = x.shape[-1] // 2
    x1, x2 = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)


def _turn_back(angle: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, None, None]:
    """The turn by the opposite angle. The derivative of the slices would pad both halves and add them up."""
    cos, sin = angle
    return _turn(dy, cos, -sin), None, None


_turn.defvjp(lambda x, cos, sin: (_turn(x, cos, sin), (cos, sin)), _turn_back)


def mlp_width(width: int, hidden_ratio: float, intermediate_size: int | None) -> int:
    """The inner width of the MLP: ``intermediate_size``, or 256 * ceil(int(D * hidden_ratio * 2/3) / 256)."""
    if intermediate_size is not None:
        return intermediate_size
    return 256 * math.ceil(int(width * hidden_ratio * 2 / 3) / 256)


class GatedMLP(nnx.Module):
    """SwiGLU: y = (silu(x W_gate) * (x W_up)) W_down, no biases."""

    def __init__(self, width: int, inner: int, recipe: Recipe):
        self.gate_proj = Linear(width, inner, recipe, axes=("embed", "mlp"))
        self.up_proj = Linear(width, inner, recipe, axes=("embed", "mlp"))
        self.down_proj = Linear(inner, width, recipe, axes=("mlp", "embed"), residual=True)

    def __call__(self, x: Hidden) -> Hidden:
        return self.down_proj(operand(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x)))


class Embedding(nnx.Module):
    """A table [L, D]: token ids to vectors, and (tied) vectors to float32 logits."""

    def __init__(self, vocab_size: int, width: int, recipe: Recipe):
        self.weight = recipe.parameter(recipe.init.normal(), (vocab_size, width), ("vocab", "embed"))
        self.dtype = recipe.dtype

    def __call__(self, tokens: Tokens) -> Hidden:
        return jnp.take(self.weight[...], tokens, axis=0).astype(self.dtype)


def row_positions(tokens: Tokens) -> Positions:
    """Positions of rows that hold one document each."""
    return jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)


def document_positions(segment_ids: Int32[Array, "B T"]) -> Positions:
    """Positions that count from 0 at the first token of each document (a run of one segment id)."""
    return jnp.arange(segment_ids.shape[1], dtype=jnp.int32) - document_bounds(segment_ids)[0]
