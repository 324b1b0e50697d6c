"""How a generation loop runs the layers: weights and caches of each one apart, so that every cache changes in place.

``LanguageModel.extend`` scans over stacked layers, which is right for prompts but copies a layer's whole cache out of
the stack and back into it at every call. For single tokens that would be most of the memory traffic. Here the stack is
taken apart once, before the loop; a step is then as long a program as the model is deep.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lte_jax.dims import Hidden, Tokens
from lte_jax.model import LanguageModel, ModelCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCaches:
    """A :class:`ModelCache` taken apart: ``layers[r][i]`` is the cache of position i in repeat r, leaves [B, ...]."""

    length: jax.Array
    layers: tuple[tuple[Any, ...], ...]
    max_length: int | None = dataclasses.field(metadata={"static": True})


@functools.partial(jax.jit, static_argnums=1)
def take_apart(tree: Any, repeats: int) -> tuple[Any, ...]:
    """One tree for each repeat, from leaves stacked over repeats."""
    return tuple(jax.tree.map(lambda leaf, index=index: leaf[index], tree) for index in range(repeats))


def layer_caches(cache: ModelCache) -> LayerCaches:
    """Takes the stack apart."""
    repeats = jax.tree.leaves(cache.layers)[0].shape[0]
    return LayerCaches(cache.length, take_apart(cache.layers, repeats), cache.max_length)


def layer_weights(model: LanguageModel) -> tuple[Any, ...]:
    """The parameters of each repeat on their own, as :func:`extend_layers` takes them."""
    repeats = model.config.num_layers // len(model.config.pattern)
    return take_apart(nnx.state(model.units), repeats)


def stacked_cache(caches: LayerCaches) -> ModelCache:
    """The inverse of :func:`layer_caches`."""
    layers = jax.tree.map(lambda *leaves: jnp.stack(leaves), *caches.layers)
    return ModelCache(caches.length, layers, caches.max_length)


def extend_layers(
    model: LanguageModel, weights: tuple[Any, ...], tokens: Tokens, caches: LayerCaches
) -> tuple[Hidden, LayerCaches]:
    """One token for each row, tokens [B, 1]: the final hidden states [B, 1, D], and the caches after it.

    The same sums as ``LanguageModel.extend_hidden`` with the streaming reading; jit it with the caches donated, or
    carry them through a loop, and they are updated in place.
    """
    graph = nnx.graphdef(model.units)
    x = model.embeddings(tokens)
    layers = []
    for state, layer in zip(weights, caches.layers, strict=True):
        x, layer, _ = model.extend_unit(nnx.merge(graph, state), x, layer, segment_ids=None, reading="streaming")
        layers.append(layer)
    caches = dataclasses.replace(caches, length=caches.length + tokens.shape[1], layers=tuple(layers))
    return model.norm(x), caches
