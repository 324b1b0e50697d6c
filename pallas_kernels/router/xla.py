"""The router in plain jax.numpy: one product for all taps of a convolution, then shifts of its narrower result."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Shaped

from pallas_kernels.dispatch import platform
from pallas_kernels.router import dropout
from pallas_kernels.router.api import Case, Convolution, Gradients, Operands


def check(case: Case) -> None:
    """Every case is supported."""


def forward(case: Case, operands: Operands) -> Float32[Array, "B T K"]:
    real = None if operands.segment_ids is None else (operands.segment_ids != 0)[..., None]
    wide = None if real is None else real[..., None]
    x = _zero(jnp.concatenate([operands.k, operands.v], axis=-1), wide)
    for layer, conv in enumerate(operands.convolutions):
        if case.threshold:
            assert operands.seeds is not None
            shape = (case.B, case.T, case.K)
            kept = dropout.keep(operands.seeds[layer], shape, x.shape[3], case.threshold, case.extent)
            x = _zero(x, kept)
        y = _convolve(case, layer, x, conv, operands.segment_ids) * case.scale + conv.bias
        x = jax.nn.silu(_zero(y, wide)).astype(x.dtype)
    z = jnp.sum(x.astype(jnp.float32) * operands.weight, axis=-1) + operands.bias
    return _zero(jax.nn.relu(z) if case.method == "relu" else jax.nn.sigmoid(z) - 0.5, real)


def backward(case: Case, operands: Operands, dr: Float32[Array, "B T K"]) -> Gradients:
    """Differentiates the forward pass, computed again from its inputs."""

    def run(gradients: Gradients) -> Array:
        return forward(case, operands._replace(**gradients._asdict()))

    wanted = Gradients(*operands[:5])
    return jax.vjp(run, wanted)[1](dr)[0]


def _convolve(
    case: Case, layer: int, x: Float[Array, "B T K I"], conv: Convolution, segment_ids: Array | None
) -> Array:
    heads, taps, inputs, outputs = conv.weight.shape
    weight = conv.weight.astype(x.dtype).transpose(0, 2, 1, 3).reshape(heads, inputs, taps * outputs)
    if heads == 1:
        products = jnp.matmul(x, weight[0], preferred_element_type=jnp.float32)
    else:
        if platform() == "cpu":  # XLA's CPU has no batched product of 16-bit inputs into float32
            x, weight = x.astype(jnp.float32), weight.astype(jnp.float32)
        products = jnp.einsum("btki,kio->btko", x, weight, preferred_element_type=jnp.float32)
    total = jnp.zeros((), jnp.float32)
    for tap, offset in enumerate(case.offsets(layer)):
        product = products[..., tap * outputs : (tap + 1) * outputs]
        total = total + _same_document(_shift(product, offset), offset, segment_ids)
    return total


def _zero(x: Array, real: Bool[Array, "..."] | None) -> Array:
    return x if real is None else jnp.where(real, x, jnp.zeros((), x.dtype))


def _shift(x: Shaped[Array, "B T ..."], offset: int) -> Shaped[Array, "B T ..."]:
    """y_t = x_{t + offset}, 0 outside the sequence."""
    tokens = x.shape[1]
    if abs(offset) >= tokens:
        return jnp.zeros_like(x)
    pads = [(0, 0)] * x.ndim
    pads[1] = (max(-offset, 0), max(offset, 0))
    return jax.lax.slice_in_dim(jnp.pad(x, pads), max(offset, 0), max(offset, 0) + tokens, axis=1)


def _same_document(shifted: Float[Array, "B T K O"], offset: int, segment_ids: Array | None) -> Array:
    """Zeros where the token that was shifted in belongs to another document than the token that reads it."""
    if segment_ids is None or offset == 0:
        return shifted
    return _zero(shifted, (_shift(segment_ids, offset) == segment_ids)[..., None, None])
