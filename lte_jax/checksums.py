"""What number does an array have that any change of it changes, on whatever devices it lies?

    checksum(x) = sum_i bits(x_i) (hash(i) | 1)  mod 2^32,   i the row-major index

It is computed on the devices, does not depend on how x is laid out over them, and every weight is odd, so that a change
of one element always changes it.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def checksums(tree: Any) -> dict[str, int]:
    """Path -> checksum of each array of a tree; the same for every layout over devices."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    if not flat:
        return {}
    values = np.asarray(_checksum_all([leaf for _, leaf in flat]))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): int(value)
        for (path, _), value in zip(flat, values, strict=True)
    }


@jax.jit
def _checksum_all(leaves: list[jax.Array]) -> jax.Array:
    return jnp.stack([_checksum(jnp.asarray(leaf)) for leaf in leaves])


def _checksum(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.bool_:
        bits = x.astype(jnp.uint32)
    else:
        width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
        bits = jax.lax.bitcast_convert_type(x, width).astype(jnp.uint32)
    # The index is built from one iota per dimension: flattening would gather an array that is spread over devices.
    index = jnp.zeros(x.shape, jnp.uint32)
    for dimension in range(x.ndim):
        stride = math.prod(x.shape[dimension + 1 :]) % 2**32
        index += jax.lax.broadcasted_iota(jnp.uint32, x.shape, dimension) * jnp.uint32(stride)
    mixed = index * jnp.uint32(2654435761)
    mixed ^= mixed >> 15
    mixed = (mixed * jnp.uint32(2246822519)) | jnp.uint32(1)
    return jnp.sum(bits * mixed, dtype=jnp.uint32)
