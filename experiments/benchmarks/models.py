"""What does inference cost: time of a prompt, time per token and memory of whole models with random weights?

A prompt is read in chunks of bounded memory, as ``generate(chunk=...)`` does, and tokens are drawn by the engine's own
compiled loop. For a batch, the cache of one sequence is repeated; of very long batched prompts a few chunks, spread
over the prompt, are timed, and their mean counts for all (the line says so). Memory is the compiler's own plan of the
program: arguments, outputs that share no buffer with them, and temporaries.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.configs import _paper
from lte_jax import LTE, NSA, FullAttention, GatedDeltaNet, ModelConfig, WindowAttention
from lte_jax.convert import abstract_model
from lte_jax.decode import decode_weights, layer_caches
from lte_jax.generate import Loop, decode_steps, read_chunk
from lte_jax.lengths import device_bytes
from lte_jax.sampling import Sampling

NAMES = ("gdn", "gdn_swa", "lalte", "lansa", "gdn_attn", "transformer")
SIZES = ("0.4B", "1.4B", "tiny")
LENGTHS = (4096, 16384, 65536, 131072)
BATCHES = (1, 16)
WHOLE = 2**18  # tokens of a batched prompt that are all read; of more, SAMPLES chunks are
SAMPLES = 4


@dataclasses.dataclass(frozen=True)
class Plan:
    """What of a model is timed.

    Attributes:
      chunk: tokens of a row that are read at a time. steps: tokens drawn in one call of the loop.
      rounds: calls of the loop whose median counts.
      prompts: time the prompts of batches too; a single one is read in any case.
      done: lengths and batches that are known already, and are left out.
    """

    name: str
    size: str
    lengths: tuple[int, ...] = LENGTHS
    batches: tuple[int, ...] = BATCHES
    chunk: int = 4096
    steps: int = 32
    rounds: int = 3
    prompts: bool = True
    implementation: str | None = None
    done: frozenset[tuple[int, int]] = frozenset()

    def __post_init__(self) -> None:
        for value, known, flag in ((self.name, NAMES, "model"), (self.size, SIZES, "sizes")):
            if value not in known:
                raise ValueError(f"--{flag}={value}: there is {', '.join(known)}")
        wrong = [length for length in self.lengths if length < self.chunk or length % self.chunk]
        if wrong:
            raise ValueError(f"--lengths={wrong[0]}: it must be a multiple of --chunk={self.chunk}")
        if min(self.batches, default=0) < 1:
            raise ValueError(f"--batches={self.batches}: each must be at least 1")

    def cases(self) -> list[tuple[int, list[int]]]:
        """What is to be timed: lengths, each with its batches."""
        wanted = [(n, [batch for batch in self.batches if (n, batch) not in self.done]) for n in self.lengths]
        return [(length, batches) for length, batches in wanted if batches]


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program, and the bytes that it needs at once."""

    call: Any
    bytes: int


def model_config(name: str, size: str) -> ModelConfig:
    """The paper's model, or a tiny one of the same pattern."""
    if size != "tiny":
        return _paper.model(name, size)  # type: ignore[arg-type]
    gdn = GatedDeltaNet(num_heads=2, head_dim=8)
    patterns: dict[str, tuple[Any, ...]] = {
        "gdn": (gdn,),
        "gdn_swa": (gdn, WindowAttention(num_heads=2, window=16)),
        "lalte": (gdn, LTE(num_heads=2, window=13, budget=6, sinks=2)),
        "lansa": (gdn, NSA(num_heads=4, num_kv_heads=2, head_dim=8, block_size=4, block_counts=3, window=5)),
        "gdn_attn": (gdn, FullAttention(num_heads=2)),
        "transformer": (FullAttention(num_heads=2),),
    }
    return ModelConfig(vocab_size=64, width=16, num_layers=2, pattern=patterns[name], max_length=64)


def random_weights(state: Any) -> Any:
    """Weights of the shapes of ``state``: matrices out of one block of random numbers, vectors as training starts."""
    block = jax.random.normal(jax.random.key(0), (2**20 + 7,), jnp.float32)

    def fill(path: tuple[Any, ...], leaf: Any) -> jax.Array:
        names = [str(part) for part in path]
        vector = names[-1] in ("A_log", "dt_bias", "bias") or "norm" in names[-2]
        if vector:
            value = {"A_log": 0.0, "dt_bias": -4.0, "bias": 0.0}.get(names[-1], 1.0)
            return jnp.full(leaf.shape, value, leaf.dtype)
        scale = math.sqrt(2.0 / math.prod(leaf.shape[-3:-1])) if "router" in names else 0.02
        return (scale * jnp.resize(block, leaf.shape)).astype(leaf.dtype)

    flat = nnx.to_flat_state(state)
    return nnx.from_flat_state([(path, leaf.replace(fill(path, leaf.get_value()))) for path, leaf in flat])


class Bench:
    """One model: its programs by shape, and its weights once they are wanted.

    Args:
      plan: what is timed.
    """

    def __init__(self, plan: Plan):
        self.plan = plan
        self.config = model_config(plan.name, plan.size)
        dtype = jnp.float32 if plan.size == "tiny" else jnp.bfloat16
        model = abstract_model(
            self.config, dtype=dtype, param_dtype=dtype, implementation=plan.implementation, remat="none"
        )
        self._graph, self._shapes = nnx.split(model)
        self._programs: dict[Any, Program | str] = {}
        self._state: Any = None
        self._weights: Any = None
        self._limit = device_bytes() or math.inf

    def _cache(self, state: Any, batch: int, length: int) -> Any:
        return nnx.merge(self._graph, state).init_cache(batch, length + self.plan.chunk)

    def _shape_of_cache(self, batch: int, length: int) -> Any:
        return jax.eval_shape(lambda state: self._cache(state, batch, length), self._shapes)

    def _lower(self, kind: str, batch: int, cache: Any) -> Any:
        ids = jax.ShapeDtypeStruct((batch, self.plan.chunk), jnp.int32)
        if kind == "prompt":
            return read_chunk.lower(self._graph, self._shapes, ids, ids, cache, reading="streaming")
        weights = jax.eval_shape(lambda state: decode_weights(nnx.merge(self._graph, state)), self._shapes)
        logits: Any = jax.ShapeDtypeStruct((batch, self.config.vocab_size), jnp.float32)
        keys = jax.eval_shape(lambda: jax.vmap(jax.random.key)(jnp.arange(batch, dtype=jnp.uint32)))
        loop = Loop(jax.eval_shape(layer_caches, cache), logits, None, keys)
        return decode_steps.lower(self._graph, self._shapes, weights, loop, sampling=Sampling(), steps=self.plan.steps)

    def compile(self, workers: int = 4) -> None:
        """All programs, several at a time; nothing is allocated. What cannot be compiled leaves its reason."""
        wanted: dict[Any, tuple[str, int, Any]] = {}
        for length, batches in self.plan.cases():
            batches = [batch for batch in batches if self._too_large(batch, length) is None]
            for batch in {1, *batches} if batches else ():
                cache = self._shape_of_cache(batch, length)
                kinds = ["prompt"] if batch == 1 or self.plan.prompts else []
                for kind in [*kinds, *(["token"] if batch in batches else [])]:
                    wanted[self._key(kind, batch, cache)] = (kind, batch, cache)
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            compiling = {}
            for key, (kind, batch, cache) in wanted.items():
                lowered = self._lower(kind, batch, cache)
                compiling[key] = pool.submit(lowered.compile)
            for key, future in compiling.items():
                self._programs[key] = _program(future)

    @staticmethod
    def _key(kind: str, batch: int, cache: Any) -> Any:
        return kind, batch, tuple((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(cache))

    def _too_large(self, batch: int, length: int) -> str | None:
        """Says so where weights and cache alone, which every program has as arguments, are more than the device has.

        The compiler would search for minutes for a plan that there is not.
        """
        least = _bytes(self._shapes) + _bytes(self._shape_of_cache(batch, length))
        return f"needs over {least / 2**30:.0f} GiB" if least > self._limit else None

    def _find(self, kind: str, batch: int, length: int) -> Program | str:
        found = self._programs[self._key(kind, batch, self._shape_of_cache(batch, length))]
        if isinstance(found, Program) and found.bytes > self._limit:
            return f"needs {found.bytes / 2**30:.0f} GiB"
        return found

    def allocate(self) -> None:
        """The weights, on the device."""
        self._state = jax.jit(lambda: random_weights(self._shapes))()
        self._weights = decode_weights(nnx.merge(self._graph, self._state))
        jax.block_until_ready(self._weights)

    def rows(self) -> Iterator[dict[str, Any]]:
        """A line for each length and batch, as it is known. ``compile`` and ``allocate`` come before."""
        for length, batches in self.plan.cases():
            for batch in batches:
                if why := self._too_large(batch, length):
                    size = _bytes(self._shape_of_cache(batch, length))
                    yield self._line(length, batch, {"cache_bytes": size, "prompt_missing": why, "missing": why})
            batches = [batch for batch in batches if self._too_large(batch, length) is None]
            if not batches:
                continue
            single = self._find("prompt", 1, length)
            if not isinstance(single, Program):
                yield from (self._line(length, batch, {"missing": single}) for batch in batches)
                continue
            prompt_time, logits, cache = self._read_whole(single, 1, length)
            for batch in batches:
                yield self._line(length, batch, self._time(length, batch, prompt_time, logits, cache))
            del logits, cache

    def _time(self, length: int, batch: int, prompt_time: float, logits: jax.Array, cache: Any) -> dict[str, Any]:
        token = self._find("token", batch, length)
        prompt = self._find("prompt", batch, length) if batch == 1 or self.plan.prompts else None
        found: dict[str, Any] = {"cache_bytes": batch * sum(leaf.nbytes for leaf in jax.tree.leaves(cache))}
        found["chunks"] = length // self.plan.chunk
        try:
            if prompt is None:
                pass
            elif not isinstance(prompt, Program):
                found["prompt_missing"] = prompt
            elif batch == 1:
                found |= {"prompt_bytes": prompt.bytes, "prompt": prompt_time, "timed_chunks": found["chunks"]}
            else:
                seconds, timed = self._read_batch(prompt, _repeat(cache, batch, axis=1), batch, length)
                found |= {"prompt_bytes": prompt.bytes, "prompt": seconds, "timed_chunks": timed}
            if not isinstance(token, Program):
                return {**found, "missing": token}
            # Taken apart before it is repeated: a batch's whole cache is never there twice.
            rows = _repeat(layer_caches(cache), batch, axis=0)
            last = jnp.repeat(logits, batch, axis=0)
            return {**found, "token_bytes": token.bytes, **self._decode(token, rows, last, batch)}
        except jax.errors.JaxRuntimeError as error:
            return {**found, "missing": _reason(error)}

    def _chunk(self, program: Program, batch: int, cache: Any, seed: int) -> tuple[jax.Array, Any]:
        ids = np.random.default_rng(seed).integers(0, self.config.vocab_size, (batch, self.plan.chunk), np.int32)
        return program.call(self._state, ids, np.ones_like(ids), cache)

    def _read_whole(self, program: Program, batch: int, length: int) -> tuple[float, jax.Array, Any]:
        """Seconds for all chunks of an empty cache, after one chunk to warm up; the last logits and the cache."""
        empty = jax.jit(self._cache, static_argnums=(1, 2))
        jax.block_until_ready(self._chunk(program, batch, empty(self._state, batch, length), 0))
        cache = jax.block_until_ready(empty(self._state, batch, length))
        start = time.perf_counter()
        for number in range(length // self.plan.chunk):
            logits, cache = self._chunk(program, batch, cache, number)
        jax.block_until_ready(logits)
        return time.perf_counter() - start, logits, cache

    def _read_batch(self, program: Program, cache: Any, batch: int, length: int) -> tuple[float, int]:
        """Seconds for a batch's prompt, and how many chunks were timed for it. It consumes the cache."""
        chunks = length // self.plan.chunk
        places = range(chunks)
        if batch * length > WHOLE and chunks > SAMPLES:
            places = np.unique(np.linspace(0, chunks - 1, SAMPLES).round().astype(int)).tolist()
        seconds = []
        _, cache = jax.block_until_ready(self._chunk(program, batch, _at(cache, 0), 0))
        for place in places:
            cache = jax.block_until_ready(_at(cache, place * self.plan.chunk))
            start = time.perf_counter()
            _, cache = jax.block_until_ready(self._chunk(program, batch, cache, place))
            seconds.append(time.perf_counter() - start)
        return statistics.mean(seconds) * chunks, len(seconds)

    def _decode(self, program: Program, cache: Any, logits: jax.Array, batch: int) -> dict[str, Any]:
        keys = jax.vmap(jax.random.key)(jnp.arange(batch, dtype=jnp.uint32))
        loop = Loop(cache, logits, None, keys)
        del cache
        times = []
        for _ in range(self.plan.rounds + 1):
            start = time.perf_counter()
            loop, tokens, _ = program.call(self._state, self._weights, loop)
            np.asarray(tokens)
            times.append((time.perf_counter() - start) / self.plan.steps)
        return {"token": statistics.median(times[1:]), "spread": max(times[1:]) / min(times[1:])}

    def _line(self, length: int, batch: int, found: dict[str, Any]) -> dict[str, Any]:
        plan = self.plan
        case = {"who": "ours", "model": plan.name, "size": plan.size, "length": length, "batch": batch}
        return {**case, "weights_bytes": _bytes(self._shapes), **found}


def _program(future: Any) -> Program | str:
    try:
        compiled = future.result()
    except jax.errors.JaxRuntimeError as error:  # memory that no device has
        return _reason(error)
    plan = compiled.memory_analysis()
    size = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes + plan.temp_size_in_bytes
    return Program(compiled, size)


def _reason(error: Exception) -> str:
    text = str(error).splitlines()[0]
    return "out of memory" if text.startswith("RESOURCE_EXHAUSTED") else text[:120]


def _bytes(shapes: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def _repeat(cache: Any, batch: int, axis: int) -> Any:
    """The cache of one sequence for ``batch`` of them; a copy, which a program may consume. ``axis``: of the rows."""
    layers = jax.tree.map(lambda leaf: _repeat_rows(leaf, batch, axis), cache.layers)
    return dataclasses.replace(cache, length=_repeat_rows(cache.length, batch, 0), layers=layers)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _repeat_rows(leaf: jax.Array, batch: int, axis: int) -> jax.Array:
    # Compiled: op by op, jnp.repeat has its result there twice, and a leaf may take half of the device's memory.
    return jnp.repeat(leaf, batch, axis=axis)


def _at(cache: Any, length: int) -> Any:
    """The cache as if ``length`` tokens had been read."""

    def move(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        return jnp.full_like(leaf, length) if getattr(path[-1], "name", None) == "length" else leaf

    return jax.tree_util.tree_map_with_path(move, cache)


def check_lines(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The newest line of each case, in the order of the tables."""
    newest = {(x["who"], x["size"], x["model"], x["batch"], x["length"]): x for x in lines}
    order = {name: index for index, name in enumerate(NAMES)}
    return sorted(
        newest.values(),
        key=lambda x: (x["size"], x["batch"], order.get(x["model"], 9), x["who"] != "ours", x["length"]),
    )
