"""The generation engine: batches of prompts in, tokens streamed out.

Prompts of different lengths are padded at the left (padding is invisible to every mixer), read at once or in chunks,
and continued by one compiled loop with a donated cache. Every few steps the loop hands its tokens to the host, which
streams them, looks for stop strings, and ends when all rows have ended.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Key

from lte_jax import sharding
from lte_jax.continuations import Generation, Rows
from lte_jax.decode import DecodeWeights, LayerCaches, decode_step, decode_weights, layer_caches
from lte_jax.inputs import check_tokens
from lte_jax.lengths import warn_beyond
from lte_jax.mixers.base import Reading
from lte_jax.model import LanguageModel, ModelCache
from lte_jax.sampling import Sampling, draw

# Prompts are padded to a multiple of this, so that few lengths are compiled.
LENGTH_STEP = 64


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    sampling: Sampling = Sampling(),  # noqa: B008 - frozen
    seeds: Sequence[int] | int = 0,
    eos_id: int | None = None,
    stop: Sequence[str] = (),
    decode: Callable[[Sequence[int]], str] | None = None,
    reading: Reading = "prompt",
    chunk: int | None = None,
    steps_per_call: int = 16,
    on_tokens: Callable[[int, list[int]], Any] | None = None,
    mesh: Mesh | None = None,
) -> list[Generation]:
    """Continues each prompt.

    Args:
      prompts: token ids; lengths may differ.
      seeds: one per prompt, or one for all; a row's tokens depend on its own seed and prompt alone.
      eos_id: a row ends when it draws this; None never.
      stop: strings that end a row; they need ``decode``.
      decode: tokens to text.
      reading: how LTE reads the prompt; "prompt" is the authors', "streaming" the causal one.
      chunk: reads prompts in pieces of this many tokens, in bounded memory; needs reading="streaming".
      steps_per_call: tokens drawn between two looks of the host; it changes no token.
      on_tokens: called with (row, new tokens) as they come.
      mesh: the devices that share the rows, each with whole weights; None for the model's own device.

    Raises:
      ValueError: no prompts, an empty prompt, ids outside the vocabulary, settings that exclude each other.
      LengthWarning (a warning): prompt and answer may be longer than the model was made for.
    """
    _check_request(model, prompts, max_new_tokens, stop, decode, reading, chunk, steps_per_call)
    seeds = _seed_per_row(seeds, len(prompts))
    rows = Rows(len(prompts), eos_id, tuple(stop), decode, on_tokens)
    if max_new_tokens == 0:
        return rows.results()

    # Every device has as many rows: the last prompt fills up, and what it says again is not looked at.
    spare = 0 if mesh is None else -len(prompts) % mesh.size
    prompts, seeds = [*prompts, *[prompts[-1]] * spare], [*seeds, *[seeds[-1]] * spare]
    graph, state = nnx.split(model)
    ids, mask = pad_left(prompts)
    steps = min(steps_per_call, max_new_tokens)
    calls = -(-max_new_tokens // steps)  # the last call may draw more tokens than are wanted: one program for all
    cache = model.init_cache(len(prompts), ids.shape[1] + _round_up(calls * steps))
    weights = decode_weights(model)
    if mesh is not None:
        state, weights = sharding.put((state, weights), mesh, PartitionSpec())
        cache = sharding.put(cache, mesh, _cache_specs(cache, mesh))
    logits, cache = read_prompt(graph, state, ids, mask, cache, reading=reading, chunk=chunk, mesh=mesh)
    seen = _seen(ids, mask, model.config.vocab_size) if sampling.repetition_penalty != 1.0 else None
    loop = begin_loop(cache, logits, seeds, seen, mesh)
    for call in range(calls):
        loop, tokens, log_probs = decode_steps(graph, state, weights, loop, sampling=sampling, steps=steps, mesh=mesh)
        wanted = max_new_tokens - call * steps
        rows.add(np.asarray(tokens)[:, :wanted], np.asarray(log_probs)[:, :wanted])
        if rows.done():
            break
    return rows.results()


def _cache_specs(cache: ModelCache, mesh: Mesh) -> Any:
    """Where a cache's arrays are split: rows come first, after the repeats in stacked layers."""
    layers = jax.tree.map(lambda _: sharding.by_rows(mesh, before=1), cache.layers)
    length: Any = sharding.by_rows(mesh)
    return dataclasses.replace(cache, length=length, layers=layers)


def pad_left(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [B, T] int32 with zeros at the left, and the mask of the tokens; T is a multiple of LENGTH_STEP."""
    length = _round_up(max(len(prompt) for prompt in prompts))
    ids = np.zeros((len(prompts), length), np.int32)
    mask = np.zeros((len(prompts), length), np.int32)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = prompt
        mask[row, length - len(prompt) :] = 1
    return ids, mask


def _round_up(length: int) -> int:
    return -(-length // LENGTH_STEP) * LENGTH_STEP


def read_prompt(
    graph: Any,
    state: Any,
    ids: np.ndarray,
    mask: np.ndarray,
    cache: ModelCache,
    *,
    reading: Reading,
    chunk: int | None = None,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, ModelCache]:
    """The logits [B, L] after the last token of left-padded prompts ``ids``, ``mask`` [B, T], and the filled cache.

    Args:
      chunk: tokens of a row that are read at a time; the first piece takes what is left over. None reads all at once.
    """
    length = ids.shape[1]
    size = length if chunk is None else chunk
    first = length % size or size
    bounds = [0, *range(first, length + 1, size)]
    logits = None
    for start, stop in itertools.pairwise(bounds):
        tokens, real = ids[:, start:stop], mask[:, start:stop]
        if mesh is not None:
            tokens, real = sharding.put((tokens, real), mesh, sharding.by_rows(mesh))
        logits, cache = read_chunk(graph, state, tokens, real, cache, reading=reading, mesh=mesh)
    assert logits is not None
    return logits, cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Loop:
    """What a step reads and writes.

    Attributes:
      logits: after the last token, float32. seen: tokens in each row so far, where a penalty asks. keys: one a row.
    """

    cache: LayerCaches
    logits: Float[Array, "B L"]
    seen: Bool[Array, "B L"] | None
    keys: Key[Array, "B"]


def begin_loop(
    cache: ModelCache,
    logits: jax.Array,
    seeds: Sequence[int],
    seen: jax.Array | None = None,
    mesh: Mesh | None = None,
) -> Loop:
    """What the first step reads, after a prompt."""
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))
    loop = Loop(cache=layer_caches(cache), logits=logits, seen=seen, keys=keys)
    # Placed as the loop itself leaves it: otherwise its second call would compile anew.
    if mesh is not None:
        return sharding.put(loop, mesh, sharding.by_rows(mesh))
    return jax.device_put(loop, logits.sharding) if logits.committed else loop


@functools.partial(jax.jit, static_argnums=0, static_argnames=("reading", "mesh"), donate_argnames="cache")
def read_chunk(
    graph: Any,
    state: Any,
    ids: jax.Array,
    mask: jax.Array,
    cache: ModelCache,
    *,
    reading: Reading,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, ModelCache]:
    """Left-padded tokens into the cache: the logits [B, L] after the last one, and the cache."""

    def local(state: Any, ids: jax.Array, mask: jax.Array, cache: ModelCache) -> tuple[jax.Array, ModelCache]:
        model = nnx.merge(graph, state)
        hidden, cache, _ = model.extend_hidden(ids, cache, segment_ids=mask, reading=reading)
        return model.logits(hidden[:, -1:])[:, 0], cache

    rows, caches = (None, None) if mesh is None else (sharding.by_rows(mesh), _cache_specs(cache, mesh))
    whole = PartitionSpec()
    return sharding.over_rows(local, mesh, (whole, rows, rows, caches), (rows, caches))(state, ids, mask, cache)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("sampling", "steps", "mesh"), donate_argnames="loop")
def decode_steps(
    graph: Any,
    state: Any,
    weights: DecodeWeights,
    loop: Loop,
    *,
    sampling: Sampling,
    steps: int,
    mesh: Mesh | None = None,
) -> tuple[Loop, jax.Array, jax.Array]:
    """Draws ``steps`` tokens a row without the host: (loop, tokens [B, steps], log_probs [B, steps])."""

    def local(state: Any, weights: DecodeWeights, loop: Loop) -> tuple[Loop, jax.Array, jax.Array]:
        model = nnx.merge(graph, state)

        def step(loop: Loop, _: None) -> tuple[Loop, tuple[jax.Array, jax.Array]]:
            keys = jax.vmap(jax.random.fold_in)(loop.keys, loop.cache.length)
            token, log_prob = draw(loop.logits, loop.seen, keys, sampling)
            logits, cache = decode_step(model, weights, token, loop.cache)
            seen = None if loop.seen is None else loop.seen.at[jnp.arange(token.shape[0]), token].set(True)
            return Loop(cache, logits, seen, loop.keys), (token, log_prob)

        loop, (tokens, log_probs) = jax.lax.scan(step, loop, None, length=steps)
        return loop, tokens.T, log_probs.T

    rows, whole = None if mesh is None else sharding.by_rows(mesh), PartitionSpec()
    return sharding.over_rows(local, mesh, (whole, whole, rows), (rows, rows, rows))(state, weights, loop)


def _seen(ids: np.ndarray, mask: np.ndarray, vocab_size: int) -> jax.Array:
    seen = np.zeros((ids.shape[0], vocab_size), bool)
    rows, columns = np.nonzero(mask)
    seen[rows, ids[rows, columns]] = True
    return jnp.asarray(seen)


def _seed_per_row(seeds: Sequence[int] | int, rows: int) -> list[int]:
    seeds = [seeds] * rows if isinstance(seeds, int) else [int(seed) for seed in seeds]
    if len(seeds) != rows:
        raise ValueError(f"{len(seeds)} seeds for {rows} prompts; give one for each, or one for all")
    wrong = [seed for seed in seeds if not 0 <= seed < 2**32]
    if wrong:
        raise ValueError(f"seed {wrong[0]} must lie in [0, 2**32)")
    return seeds


def _check_request(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop: Sequence[str],
    decode: Callable | None,
    reading: Reading,
    chunk: int | None,
    steps_per_call: int,
) -> None:
    if not prompts:
        raise ValueError("no prompts were given")
    for row, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {row} is empty; begin it with the tokenizer's bos token")
        check_tokens(np.asarray(prompt)[None], model.config.vocab_size)
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens} must not be negative")
    if steps_per_call < 1:
        raise ValueError(f"steps_per_call={steps_per_call} must be at least 1")
    if isinstance(stop, str) or not all(stop):
        raise ValueError(f"stop={stop!r} must be a sequence of strings that are not empty")
    if stop and decode is None:
        raise ValueError("stop strings need decode=, the tokenizer's tokens-to-text function")
    if chunk is not None and (chunk < 1 or reading != "streaming"):
        raise ValueError(
            f"chunk={chunk} with reading={reading!r}: chunks are at least 1 token long and need reading='streaming', "
            "because the authors' prompt reading ranks the whole prompt at once"
        )
    longest = max(len(prompt) for prompt in prompts) + max_new_tokens
    warn_beyond(longest, model.config.max_length, stacklevel=4)
