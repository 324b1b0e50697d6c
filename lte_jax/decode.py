"""How a generation loop runs the layers: every layer apart, its maps merged, its cache changed in place.

``LanguageModel.extend`` scans over stacked layers, which is right for prompts but copies a layer's whole cache out of
the stack and back into it at every call. For single tokens that would be most of the memory traffic. Here the stack is
taken apart once, before the loop; a step is then as long a program as the model is deep.

A step reads each weight for one row, so it costs the weights' bytes and a launch for each product and for what stands
between them. The maps that read a block's input are therefore one product, with the norm before it; the MLP's gate and
up are another; the two maps that end in the residual stream add to it (:mod:`pallas_kernels.row_product`). The mixers'
own code runs unchanged between them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lte_jax.blocks import Block
from lte_jax.layers import Linear
from lte_jax.mixers.base import Aux, Mixer
from lte_jax.model import LanguageModel, ModelCache
from pallas_kernels.dispatch import xla_or_fastest
from pallas_kernels.row_product import row_product


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCaches:
    """A :class:`ModelCache` taken apart: ``layers[r][i]`` is the cache of position i in repeat r, leaves [B, ...]."""

    length: jax.Array
    layers: tuple[tuple[Any, ...], ...]
    max_length: int | None = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Map:
    """Linear maps of one input as one: their weights by output, [F, D], in the model's dtype; bias [F] or None."""

    weight: jax.Array
    bias: jax.Array | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockWeights:
    """A block's parameters: the maps in the order in which they run, the norms, and what else the mixer has."""

    mixer_norm: jax.Array
    into: Map
    mixer: Any
    out: Map
    mlp_norm: jax.Array
    gate_up: Map
    down: Map


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeWeights:
    """A model's parameters as :func:`decode_step` takes them: ``blocks[r][i]``, and the head [L, D]."""

    blocks: tuple[tuple[BlockWeights, ...], ...]
    head: jax.Array


@functools.partial(jax.jit, static_argnums=1)
def take_apart(tree: Any, repeats: int) -> tuple[Any, ...]:
    """One tree for each repeat, from leaves stacked over repeats."""
    return tuple(jax.tree.map(lambda leaf, index=index: leaf[index], tree) for index in range(repeats))


def layer_caches(cache: ModelCache) -> LayerCaches:
    """Takes the stack apart."""
    repeats = jax.tree.leaves(cache.layers)[0].shape[0]
    return LayerCaches(cache.length, take_apart(cache.layers, repeats), cache.max_length)


def stacked_cache(caches: LayerCaches) -> ModelCache:
    """The inverse of :func:`layer_caches`."""
    layers = jax.tree.map(lambda *leaves: jnp.stack(leaves), *caches.layers)
    return ModelCache(caches.length, layers, caches.max_length)


def decode_weights(model: LanguageModel) -> DecodeWeights:
    """The parameters for single tokens: a copy, but for a tied head."""
    graph, state = nnx.split(model)
    return _decode_weights(graph, state)


@functools.partial(jax.jit, static_argnums=0)
def _decode_weights(graph: Any, state: Any) -> DecodeWeights:
    model = nnx.merge(graph, state)
    units_graph, units = nnx.split(model.units)
    repeats = model.config.num_layers // len(model.config.pattern)
    blocks = tuple(
        tuple(_block_weights(block, model.dtype) for block in nnx.merge(units_graph, unit).blocks)
        for unit in take_apart(units, repeats)
    )
    head = model.embeddings.weight[...] if model.lm_head is None else model.lm_head.weight[...].T
    return DecodeWeights(blocks, head.astype(model.dtype))


def _block_weights(block: Block, dtype: Any) -> BlockWeights:
    def join(*maps: Linear) -> Map:
        weight = jnp.concatenate([part.weight[...].T.astype(dtype) for part in maps])
        if all(part.bias is None for part in maps):
            return Map(weight, None)
        zeros = [jnp.zeros(part.weight.shape[1], dtype) for part in maps]
        biases = [zero if part.bias is None else part.bias[...] for part, zero in zip(maps, zeros, strict=True)]
        return Map(weight, jnp.concatenate([bias.astype(dtype) for bias in biases]))

    mixer, mlp = block.mixer, block.mlp
    into, out = join(*(getattr(mixer, name) for name in _inputs(mixer))), join(mixer.o_proj)
    return BlockWeights(
        mixer_norm=block.mixer_norm.weight[...],
        into=into,
        mixer=nnx.state(_without_maps(mixer)),
        out=out,
        mlp_norm=block.mlp_norm.weight[...],
        gate_up=join(mlp.gate_proj, mlp.up_proj),
        down=join(mlp.down_proj),
    )


def _inputs(mixer: Mixer) -> list[str]:
    """The names of the maps of the mixer's input; an option may leave one out."""
    return [name for name in mixer.inputs if getattr(mixer, name) is not None]


def _without_maps(mixer: Mixer) -> Mixer:
    """A mixer without its maps from and to the residual stream."""
    rest = nnx.merge(*nnx.split(mixer))
    for name in (*_inputs(mixer), "o_proj"):
        delattr(rest, name)
    return rest


def decode_step(
    model: LanguageModel, weights: DecodeWeights, tokens: Int[Array, "B"], caches: LayerCaches
) -> tuple[Float[Array, "B L"], LayerCaches]:
    """One token for each row: the logits after it, float32, and the caches.

    The same sums as ``LanguageModel.extend`` with the streaming reading, but for roundings; jit it with the caches
    donated, or carry them through a loop, and they are updated in place.
    """
    x = model.embeddings(tokens)
    layers = []
    for blocks, before in zip(weights.blocks, caches.layers, strict=True):
        x, after = _unit(model, blocks, x, before)
        layers.append(after)
    (logits,) = row_product(
        x,
        weights.head,
        norm=model.norm.weight[...],
        eps=model.norm.eps,
        dtype=jnp.float32,
        implementation=xla_or_fastest(model.implementation),
    )
    return logits, dataclasses.replace(caches, length=caches.length + 1, layers=tuple(layers))


def _unit(
    model: LanguageModel, weights: Sequence[BlockWeights], x: Float[Array, "B D"], caches: Sequence[Any]
) -> tuple[Float[Array, "B D"], tuple[Any, ...]]:
    """One repeat of the pattern."""
    context: Aux = {}
    updated = []
    parts = zip(model.units.blocks, model.config.pattern, weights, caches, strict=True)
    for block, mixer, block_weights, cache in parts:
        x, cache, context = _block(block, block_weights, x, cache, context=context, **model.mixer_options(mixer))
        updated.append(cache)
    return x, tuple(updated)


def _block(
    block: Block, weights: BlockWeights, x: Float[Array, "B D"], cache: Any, **options: Any
) -> tuple[Float[Array, "B D"], Any, Aux]:
    """x += mixer(rms(x)); x += mlp(rms(x)), of ``block`` only the settings being read."""
    product = functools.partial(row_product, implementation=xla_or_fastest(block.mixer.implementation))
    names = _inputs(block.mixer)
    pieces = product(
        x,
        weights.into.weight,
        norm=weights.mixer_norm,
        eps=block.mixer_norm.eps,
        bias=weights.into.bias,
        widths=[getattr(block.mixer, name).weight.shape[-1] for name in names],
    )
    mixer = nnx.merge(nnx.graphdef(_without_maps(block.mixer)), weights.mixer)
    for name, piece in zip(names, pieces, strict=True):
        setattr(mixer, name, lambda x, piece=piece: piece.reshape(*x.shape[:-1], -1))
    mixer.o_proj = lambda o: o
    # Not wanted: LTE would score the token once more for its aux, which no mixer reads.
    o, cache, aux = mixer.extend(x[:, None], cache, segment_ids=None, reading="streaming", wants_aux=False, **options)
    (x,) = product(o[:, 0].astype(x.dtype), weights.out.weight, bias=weights.out.bias, residual=x)
    (inner,) = product(x, weights.gate_up.weight, norm=weights.mlp_norm, eps=block.mlp_norm.eps, gated=True)
    (x,) = product(inner, weights.down.weight, residual=x)
    return x, cache, aux
