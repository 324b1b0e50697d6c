"""What does vmap do with an operation that has no rule for it? Its axis joins the batch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def fold_batch(function: Callable, static: Sequence[str] = ()) -> Callable:
    """Gives ``function`` a vmap rule: its arrays, in and out, all lead with the batch, and vmap's axis joins it.

    Args:
      function: takes pytrees of arrays (None allowed) and keyword-only values named in ``static``.
    """

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        assert set(options) == set(static), options
        return batched(options)(*arguments)

    def batched(options: dict[str, Any]) -> Callable:
        body = jax.custom_batching.custom_vmap(functools.partial(function, **options))

        @body.def_vmap
        def rule(size: int, mapped: Any, *arguments: Any) -> Any:
            def fold(array: jax.Array, is_mapped: bool) -> jax.Array:
                array = array if is_mapped else jnp.broadcast_to(array, (size, *array.shape))
                return array.reshape(size * array.shape[1], *array.shape[2:])

            results = batched(options)(*jax.tree.map(fold, arguments, tuple(mapped)))
            results = jax.tree.map(lambda array: array.reshape(size, -1, *array.shape[1:]), results)
            return results, jax.tree.map(lambda _: True, results)

        return body

    return call
