"""The language model: a pattern of mixers repeated to depth, between an embedding and a head.

The pattern is data: ``ModelConfig.pattern`` holds the settings of the layers that repeat, such as (GDN, LTE). The
parameters of the repeats are stacked, and one repeat is one step through the depth (``depth.py``).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from lte_jax import partition
from lte_jax.blocks import Unit
from lte_jax.depth import through
from lte_jax.dims import Hidden, SegmentIds, Tokens
from lte_jax.inputs import check_room, check_tokens, mask_to_segment_ids, zero_padding
from lte_jax.layers import Embedding, InitRule, Linear, Recipe, RMSNorm, as_read, document_positions, row_positions
from lte_jax.mixers import mixer_name
from lte_jax.mixers.base import Aux, MixerConfig, Reading
from lte_jax.mixers.lte import make_router, needs_shared_router
from lte_jax.model_config import ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelOutput:
    """What a forward pass returns.

    Attributes:
      logits: [B, T, L] float32.
      scores: retention scores r, [B, T, K] float32, by the LTE layer's number (from 0, over all layers); may be empty.
      selected: the tokens that stay beyond the window, keyed likewise, [B, T, K] bool.
    """

    logits: jax.Array
    scores: dict[int, jax.Array]
    selected: dict[int, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelCache:
    """The state of B sequences: fixed shapes, a plain pytree to copy, fork, save and donate.

    Attributes:
      length: tokens seen by each row, [B] int32, padding not counted.
      layers: for each position of the pattern the mixer's cache, stacked over repeats: leaves [R, B, ...].
      max_length: the bound of the caches that grow; None where none does.
    """

    length: jax.Array
    layers: tuple[Any, ...]
    max_length: int | None = dataclasses.field(metadata={"static": True})


class LanguageModel(nnx.Module):
    """An embedding, stacked units, a final norm and a head (tied or not).

    Args:
      config: the shape; checked here.
      rngs: draws the parameters from its ``params`` stream.
      dtype: of the computation; norms, gates, scores, softmax and logits are float32 always.
      param_dtype: of the stored weights.
      implementation: of every operation: "pallas", "triton", "xla", or None for the fastest measured.
      remat: what a backward pass keeps: a name in ``remat.POLICIES``.
      layers: how training runs through the depth: "scan", "unroll", or None for the rule of ``depth.through``.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        implementation: str | None = None,
        remat: str = "none",
        layers: str | None = None,
    ):
        config.validate()
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.remat, self.layers, self.implementation = remat, layers, implementation
        init = InitRule(config.init_std, config.num_layers, config.rescale_residual)
        recipe = Recipe(rngs, init, self.dtype, param_dtype, config.max_length, implementation)
        self.embeddings = Embedding(config.vocab_size, config.width, recipe)
        shared = [mixer for mixer in config.pattern if needs_shared_router(mixer)]
        self.router = make_router(shared[0], config.width, recipe) if shared else None
        repeats = config.num_layers // len(config.pattern)

        @nnx.split_rngs(splits=repeats)
        @nnx.vmap(in_axes=(0,), out_axes=0, axis_size=repeats)
        def stack(rngs: nnx.Rngs) -> Unit:
            return Unit(config, dataclasses.replace(recipe, rngs=rngs))

        self.units = stack(rngs)
        self.norm = RMSNorm(config.width, recipe, eps=config.norm_eps)
        tied = config.tie_embeddings
        self.lm_head = None if tied else Linear(config.width, config.vocab_size, recipe, axes=("embed", "vocab"))

    @property
    def head_weight(self) -> Float[Array, "D L"]:
        """The weight that maps the final hidden state to logits."""
        return self.embeddings.weight[...].T if self.lm_head is None else self.lm_head.weight[...]

    def logits(self, hidden: Hidden) -> Float[Array, "B T L"]:
        """hidden W_head, float32."""
        weight = self.head_weight.astype(self.dtype)
        return jnp.matmul(hidden.astype(self.dtype), weight, preferred_element_type=jnp.float32)

    def hidden(
        self,
        input_ids: Tokens,
        *,
        segment_ids: SegmentIds | None = None,
        reading: Reading = "prompt",
        key: jax.Array | None = None,
        select: jax.Array | None = None,
    ) -> tuple[Hidden, Aux]:
        """The final hidden states, for losses that never hold all logits.

        Args:
          segment_ids: document of each token, 0 for padding; None for one document a row.
          reading: how LTE reads the sequence (``mixers.base.Reading``).
          key: draws dropout; None means none.
          select: scalar bool for LTE's warm-up: False keeps every token and cuts the router's gradient into k and v.

        Returns:
          [B, T, D] after the final norm, and, with LTE layers, ``{"scores", "selected"}`` stacked over those layers,
          [layers, B, T, K].
        """
        positions = row_positions(input_ids) if segment_ids is None else document_positions(segment_ids)
        shared = dict(positions=positions, segment_ids=segment_ids, reading=reading)
        graph, state = nnx.split(self.units)
        state = as_read(state, self.dtype) if reading == "train" else state

        def step(x: Hidden, inputs: tuple[Any, jax.Array | None]) -> tuple[Hidden, tuple[Aux, ...]]:
            unit = nnx.merge(graph, inputs[0])
            keys = [None] * len(unit.blocks) if inputs[1] is None else jax.random.split(inputs[1], len(unit.blocks))
            auxes: list[Aux] = []
            for block, block_key, mixer in zip(unit.blocks, keys, self.config.pattern, strict=True):
                options = self.mixer_options(mixer, {} if select is None else {"select": select})
                context = auxes[-1] if auxes else {}
                x, aux = block(x, key=block_key, context=context, **shared, **options)
                auxes.append(aux)
            return x, tuple(auxes)

        keys = None if key is None else jax.random.split(key, self.config.num_layers // len(self.config.pattern))
        x = zero_padding(partition.lookup(self.embeddings.weight[...], input_ids, self.dtype), segment_ids)
        layers = self.layers if reading == "train" else "scan"
        x, auxes = through(step, x, (state, keys), layers=layers, remat=self.remat)
        return self.norm(x), self._stack_routing(auxes)

    def __call__(
        self,
        input_ids: Tokens,
        attention_mask: Any = None,
        *,
        segment_ids: SegmentIds | None = None,
        reading: Reading = "prompt",
        key: jax.Array | None = None,
    ) -> ModelOutput:
        """Logits of whole sequences.

        Args:
          input_ids: [B, T], in [0, L).
          attention_mask: [B, T] of 1 for tokens and 0 for padding at the left or the right; or give ``segment_ids``.
          reading: the default is the authors' evaluation.

        Raises:
          ValueError: ids outside the vocabulary, a mask with holes, both mask and segment_ids.
        """
        input_ids, segment_ids = self._door(input_ids, attention_mask, segment_ids)
        graph, state = nnx.split(self)
        return _forward(graph, state, input_ids, segment_ids, key, reading=reading)

    def init_cache(self, batch_size: int, max_length: int | None = None, dtype: DTypeLike | None = None) -> ModelCache:
        """The cache of ``batch_size`` empty sequences.

        Args:
          max_length: the longest sequence, for mixers whose cache grows; default ``config.max_length``.
          dtype: of stored keys and values; default the model's.
        """
        bound = self.config.max_length if max_length is None else max_length
        repeats = self.config.num_layers // len(self.config.pattern)
        mixers = [block.mixer for block in self.units.blocks]  # their weights are stacked, their settings are not
        caches = [mixer.init_cache(batch_size, bound, dtype or self.dtype) for mixer in mixers]
        stacked = jax.tree.map(lambda leaf: jnp.tile(leaf[None], (repeats,) + (1,) * leaf.ndim), tuple(caches))
        grows = any(mixer.needs_max_length for mixer in mixers)
        return ModelCache(jnp.zeros(batch_size, jnp.int32), stacked, bound if grows else None)

    def extend(
        self,
        input_ids: Tokens,
        cache: ModelCache,
        attention_mask: Any = None,
        *,
        reading: Reading | None = None,
        logits_to_keep: int | None = None,
    ) -> tuple[jax.Array, ModelCache]:
        """Continues each row by T >= 1 tokens: prompts in any pieces, and single steps.

        Args:
          attention_mask: [B, T] of 1 for tokens and 0 for padding at the left or the right of this piece; a longer mask
            (one that covers earlier pieces too) is cut to its last T columns.
          reading: None takes the authors' default, "prompt" for a first call and "streaming" afterwards.
          logits_to_keep: compute the logits of the last so many positions only.

        Returns:
          logits [B, T, L] float32 and the new cache; the old one stays valid.

        Raises:
          ValueError: as ``__call__``; a cache of ``max_length`` that would overflow; reading="prompt" for several
            tokens after others; reading=None for several tokens inside jit, where the cache cannot be looked at.
        """
        if attention_mask is not None:
            attention_mask = jnp.asarray(attention_mask)[:, -jnp.shape(input_ids)[1] :]
        input_ids, segment_ids = self._door(input_ids, attention_mask, None)
        reading = _default_reading(reading, cache, input_ids.shape[1])
        if cache.max_length is not None:
            new = input_ids.shape[1] if segment_ids is None else (segment_ids != 0).sum(axis=1)
            check_room(cache.length, new, cache.max_length)
        graph, state = nnx.split(self)
        logits, cache, _ = _extend(graph, state, input_ids, segment_ids, cache, reading=reading, keep=logits_to_keep)
        return logits, cache

    def extend_hidden(
        self,
        input_ids: Tokens,
        cache: ModelCache,
        *,
        segment_ids: SegmentIds | None = None,
        reading: Reading = "streaming",
    ) -> tuple[Hidden, ModelCache, Aux]:
        """``extend`` without checks, head or jit, for loops that are compiled as a whole; also returns the routing."""
        graph, state = nnx.split(self.units)

        # The stack of caches is carried and changed in place; as input and output of the scan it would be there twice.
        def step(carry: tuple[Hidden, Any], inputs: tuple[Any, jax.Array]) -> tuple[tuple[Hidden, Any], Any]:
            (x, layers), (weights, index) = carry, inputs
            unit, caches = nnx.merge(graph, weights), jax.tree.map(lambda leaf: leaf[index], layers)
            x, caches, auxes = self.extend_unit(unit, x, caches, segment_ids=segment_ids, reading=reading)
            x, caches = jax.lax.optimization_barrier((x, caches))  # the stack is read before it is changed
            put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=index, axis=0)
            return (x, jax.tree.map(put, layers, caches)), auxes

        x = zero_padding(self.embeddings(input_ids), segment_ids)
        repeats = jnp.arange(self.config.num_layers // len(self.config.pattern))
        (x, layers), auxes = jax.lax.scan(step, (x, cache.layers), (state, repeats))
        new = input_ids.shape[1] if segment_ids is None else jnp.sum(segment_ids != 0, axis=1, dtype=jnp.int32)
        cache = dataclasses.replace(cache, length=cache.length + new, layers=layers)
        return self.norm(x), cache, self._stack_routing(auxes)

    def extend_unit(
        self, unit: Unit, x: Hidden, caches: tuple[Any, ...], **shared: Any
    ) -> tuple[Hidden, tuple[Any, ...], tuple[Aux, ...]]:
        """One repeat of the pattern, with unstacked weights and caches."""
        auxes: list[Aux] = []
        updated = []
        for block, cache, mixer in zip(unit.blocks, caches, self.config.pattern, strict=True):
            context = auxes[-1] if auxes else {}
            x, cache, aux = block.extend(x, cache, context=context, **shared, **self.mixer_options(mixer))
            auxes.append(aux)
            updated.append(cache)
        return x, tuple(updated), tuple(auxes)

    def mixer_options(self, mixer: MixerConfig, for_lte: dict[str, Any] | None = None) -> dict[str, Any]:
        """What the model passes to LTE alone: the router that all layers share, and ``for_lte``."""
        options = {"router": self.router} if needs_shared_router(mixer) else {}
        return {**options, **(for_lte or {})} if mixer_name(mixer) == "lte" else options

    def _stack_routing(self, auxes: tuple[Aux, ...]) -> Aux:
        """Scores and selections of the LTE layers in layer order: from [repeats, ...] per position to [layers, ...]."""
        routed = [aux for aux in auxes if "scores" in aux]
        if not routed:
            return {}
        return {
            name: jnp.stack([aux[name] for aux in routed], axis=1).reshape(-1, *routed[0][name].shape[1:])
            for name in ("scores", "selected")
        }

    def _door(self, input_ids: Any, attention_mask: Any, segment_ids: Any) -> tuple[jax.Array, jax.Array | None]:
        """Arguments as int32 arrays, checked where they are concrete."""
        if not isinstance(input_ids, jax.core.Tracer):
            check_tokens(input_ids, self.config.vocab_size)
        input_ids = jnp.asarray(input_ids, jnp.int32)
        if attention_mask is not None:
            if segment_ids is not None:
                raise ValueError("give attention_mask or segment_ids, not both")
            segment_ids = mask_to_segment_ids(attention_mask)
        if segment_ids is None:
            return input_ids, None
        segment_ids = jnp.asarray(segment_ids, jnp.int32)
        if segment_ids.shape != input_ids.shape:
            raise ValueError(f"the mask's shape {segment_ids.shape} is not that of input_ids {input_ids.shape}")
        return input_ids, segment_ids


def _default_reading(reading: Reading | None, cache: ModelCache, tokens: int) -> Reading:
    """The reading of this piece, checked where the cache's length is concrete."""
    traced = isinstance(cache.length, jax.core.Tracer)
    if reading is None and traced and tokens > 1:
        raise ValueError("inside jit the cache cannot be looked at: say reading='prompt' or reading='streaming'")
    if tokens == 1 or traced:
        return reading or "streaming"  # one token reads alike either way
    read = int(np.max(np.asarray(cache.length)))
    if read and reading == "prompt":
        raise ValueError(
            f"reading='prompt' after {read} tokens: the retained tokens of a prompt are those at its end, so it is "
            "read in one piece, from an empty cache; use reading='streaming'"
        )
    return reading or ("streaming" if read else "prompt")


@functools.partial(jax.jit, static_argnums=0, static_argnames="reading")
def _forward(
    graph: Any,
    state: Any,
    input_ids: Tokens,
    segment_ids: SegmentIds | None,
    key: jax.Array | None,
    *,
    reading: Reading,
) -> ModelOutput:
    model = nnx.merge(graph, state)
    hidden, routing = model.hidden(input_ids, segment_ids=segment_ids, reading=reading, key=key)
    layers = [index for index, name in enumerate(model.config.layer_names()) if name == "lte"]
    per_layer = {
        name: {layer: routing[name][i] for i, layer in enumerate(layers)} if routing else {}
        for name in ("scores", "selected")
    }
    return ModelOutput(model.logits(hidden), **per_layer)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("reading", "keep"))
def _extend(
    graph: Any,
    state: Any,
    input_ids: Tokens,
    segment_ids: SegmentIds | None,
    cache: ModelCache,
    *,
    reading: Reading,
    keep: int | None,
) -> tuple[jax.Array, ModelCache, Aux]:
    model = nnx.merge(graph, state)
    hidden, cache, routing = model.extend_hidden(input_ids, cache, segment_ids=segment_ids, reading=reading)
    return model.logits(hidden if keep is None else hidden[:, -keep:]), cache, routing
