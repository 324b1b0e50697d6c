"""How does a computation run through the depth of a model: as a loop of the program, or written out?

"scan"     a ``jax.lax.scan`` over the repeats of the pattern. Compile time does not grow with depth. What its backward
           pass keeps goes through stacks of all repeats: each array is copied into its stack after the kernel that
           made it, and copied out again.
"unroll"   one repeat after the other. Arrays stay where they were made; compile time grows with depth.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lte_jax.remat import checkpointed
from pallas_kernels.dispatch import on_gpu


def through(step: Callable, x: Any, stacked: Any, *, layers: str | None, remat: str) -> tuple[Any, Any]:
    """``jax.lax.scan(step, x, stacked)``, differentiable; what ``step`` keeps is said by the policy ``remat``.

    Args:
      layers: "scan", "unroll", or None: "unroll" on a GPU, where the copies cost most and nobody waits for many
        compilations, else "scan".

    Raises:
      ValueError: the name of the loop or of the policy is unknown.
    """
    if layers is None:
        layers = "unroll" if on_gpu() else "scan"
    if layers not in ("scan", "unroll"):
        raise ValueError(f"layers={layers!r} is not one of scan, unroll")
    if layers == "scan":
        return jax.lax.scan(checkpointed(step, remat), x, stacked)
    leaves, structure = jax.tree.flatten(stacked)
    run = checkpointed(step, remat, unrolled=True)
    outputs = []
    for inputs in zip(*(unstacked(leaf) for leaf in leaves), strict=True):
        x, output = run(x, jax.tree.unflatten(structure, inputs))
        outputs.append(output)
    return x, jax.tree.map(lambda *parts: jnp.stack(parts), *outputs)


def unstacked(x: jax.Array) -> tuple[jax.Array, ...]:
    """(x[0], x[1], ...); backward, their gradients are stacked once.

    The gradient of plain slices pads each one to the whole stack and adds up the stacks.
    """
    return _unstack(x) if jnp.issubdtype(x.dtype, jnp.inexact) else tuple(x)


@jax.custom_vjp
def _unstack(x: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(x[index] for index in range(x.shape[0]))


def _stack_gradients(_: None, gradients: tuple[jax.Array, ...]) -> tuple[jax.Array]:
    # One array, written part after part. A stack would be fused into the optimiser's kernels, which then do not work in
    # place: the moments are copied first, and all of it is read again for each of the three arrays that are written.
    whole = jnp.zeros((len(gradients), *gradients[0].shape), gradients[0].dtype)
    for index, gradient in enumerate(gradients):
        whole = jax.lax.dynamic_update_index_in_dim(whole, gradient, index, 0)
    return (jax.lax.optimization_barrier(whole),)


_unstack.defvjp(lambda x: (_unstack(x), None), _stack_gradients)
