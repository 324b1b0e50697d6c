"""Window attention with retained columns beside cuDNN, FlexAttention, jax-linear-attention and the authors' kernel."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import peers
from experiments.benchmarks.cases import Case, Options, Setup
from experiments.benchmarks.clock import Contender
from experiments.benchmarks.torch_attention import attend_sdpa, authors_prompt, flex_contenders
from pallas_kernels.window_attention.api import NEVER, DecodeCache, window_attention, window_attention_update_step

NAMES = ("o", "dq", "dk", "dv", "dscores")
REACH = 6  # how many tokens later a score becomes final, as with the router of three convolutions
LONGEST_CHECKED = 16384  # the float32 path of longer rows takes longer than all else together


@dataclasses.dataclass(frozen=True)
class Size:
    """B, T, H, K, N as everywhere; W keys in the window with self; ``kept`` columns per head, None for no selection."""

    B: int
    T: int
    H: int
    K: int
    N: int
    W: int
    kept: int | None
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        columns = "" if self.kept is None else f", {self.kept} retained per head"
        return f"B {self.B}, T {self.T}, H {self.H}, K {self.K}, N {self.N}, window {self.W}{columns}"

    def seen(self) -> float:
        """Keys that a query sees, on average, if the retained ones lie evenly: the work for each token."""
        window = min(self.W, self.T)
        far = self.T - window
        beyond = (self.kept or 0) / self.T * far * (far + 1) / (2 * self.T)
        return window - window * (window - 1) / (2 * self.T) + beyond


def cases(tiny: bool) -> list[Case]:
    """Prompts, training at several shares of kept tokens, long rows with grouped heads, and decode steps."""
    batches: tuple[int, ...]
    long: tuple[tuple[int, int], ...]
    if tiny:
        base, batches, long = Size(2, 96, 2, 2, 16, 24, None, "bfloat16"), (2,), ((1, 128),)
    else:
        base, batches, long = Size(4, 4096, 16, 16, 64, 768, None), (1, 8, 64), ((4, 4096), (1, 16384), (1, 65536))
    budget = base.T // 8
    named = {
        "window": (base, False),
        "prompt": (dataclasses.replace(base, kept=budget), False),
        "window-backward": (base, True),
    }
    for percent in ("100", "50", "12.5", "2"):
        kept = max(1, round(base.T * float(percent) / 100))
        named[f"train-{percent}%"] = (dataclasses.replace(base, kept=kept), True)
    heads, kv_heads = (4, 2) if tiny else (32, 8)
    for batch, tokens in long:
        size = dataclasses.replace(base, B=batch, T=tokens, H=heads, K=kv_heads, kept=budget)
        named[f"long-{tokens}"] = (size, True)
    found = [
        Case(
            name,
            f"{size}, {size.seen():.0f} keys a query, {'forward + backward' if backward else 'forward'}",
            size.dtype,
            _bind(size, backward),
        )
        for name, (size, backward) in named.items()
    ]
    many, few = (
        dataclasses.replace(base, T=1, kept=budget),
        dataclasses.replace(base, T=1, kept=budget, H=heads, K=kv_heads),
    )
    late = 4 * (base.W + budget) if tiny else 100_000
    steps = [(f"{batch}", dataclasses.replace(many, B=batch), late) for batch in batches]
    steps += [(f"{batch}-grouped", dataclasses.replace(few, B=batch), late) for batch in batches]
    steps += [
        (f"{batch}-step-{at}", dataclasses.replace(many, B=batch), at) for batch in batches[::2] for at in (100, 2_000)
    ]
    for name, size, position in steps:
        make = functools.partial(_decode, size, position)
        found.append(Case(f"decode-{name}", f"decode step at position {position}, {size}", size.dtype, make))
    return found


def _bind(size: Size, backward: bool) -> Any:
    return functools.partial(_whole, size, backward)


def draw(size: Size, seed: int) -> tuple[list[Any], Any, Any]:
    """[q, k, v, scores], the cotangent, and the retained tokens [B, kept, K] in order (None without)."""

    @jax.jit
    def make(key: jax.Array) -> Any:
        keys = jax.random.split(key, 5)
        wide, narrow = (size.B, size.T, size.H, size.N), (size.B, size.T, size.K, size.N)
        shapes = (wide, narrow, narrow, wide)
        q, k, v, do = (
            jax.random.normal(key, shape).astype(size.dtype) for key, shape in zip(keys[:4], shapes, strict=True)
        )
        scores = jax.random.normal(keys[4], narrow[:3])
        kept = None
        if size.kept is not None:
            best = jnp.argsort(-scores, axis=1)[:, : size.kept]
            kept = jnp.sort(best, axis=1).astype(jnp.int32)
        return [q, k, v, scores], do, kept

    return make(jax.random.key(seed))


def _expiry(size: Size, kept: Any) -> Any:
    if kept is None:
        return None
    batch = jnp.arange(size.B)[:, None, None]
    heads = jnp.arange(size.K)[None, None, :]
    return jnp.zeros((size.B, size.T, size.K), jnp.int32).at[batch, kept, heads].set(NEVER)


def _whole(size: Size, backward: bool, options: Options) -> Setup:
    inputs, do, kept = draw(size, options.seed)
    expiry = _expiry(size, kept)
    cotangent = do if backward else None

    def attend(name: str, window: int | None, q: Any, k: Any, v: Any, scores: Any) -> Any:
        return window_attention(q, k, v, scores, window=window, expiry=expiry, implementation=name)

    def ours(name: str) -> Contender:
        return peers.jax_contender(name, functools.partial(attend, name, size.W), inputs, cotangent, NAMES)

    def reference() -> dict[str, Any]:
        with jax.default_matmul_precision("highest"):
            wide = [x.astype(jnp.float32) for x in inputs]
            high = None if cotangent is None else cotangent.astype(jnp.float32)
            contender = peers.jax_contender("", functools.partial(attend, "xla", size.W), wide, high, NAMES)
            assert contender.values is not None
            return contender.values(contender.call())

    found = _peers(size, inputs, do, kept, backward, options)
    moved = (2 * do.nbytes + 2 * inputs[1].nbytes) * (3 if backward else 1)
    return Setup(ours, found, reference if size.T <= LONGEST_CHECKED else None, moved)


def _peers(size: Size, inputs: list[Any], do: Any, kept: Any, backward: bool, options: Options) -> dict[str, Any]:
    cotangent = do if backward else None
    plain = inputs[:3]

    def cudnn(window: int | None) -> Contender:
        peers.cudnn_on_gpu()
        local = None if window is None else (window - 1, 0)

        def forward(q: Any, k: Any, v: Any) -> Any:
            return jax.nn.dot_product_attention(
                q, k, v, implementation="cudnn", is_causal=True, local_window_size=local
            )

        name = "cudnn: causal" if window is None else "cudnn: window"
        same = window is not None or size.kept == size.T
        return _mark(peers.jax_contender(name, forward, plain, cotangent, NAMES), same)

    def torch_causal() -> Contender:
        forward = functools.partial(attend_sdpa, grouped=size.H != size.K)
        tensors, high = peers.to_torch(*plain), None if cotangent is None else peers.to_torch(cotangent)[0].detach()
        contender = peers.torch_contender("torch: causal", forward, tensors, high, NAMES)
        return _mark(contender, kept is not None and size.kept == size.T)

    def jla() -> Contender:
        module = peers.load("jla.ops.mosaic_gpu.attention", "jax-linear-attention")

        def forward(q: Any, k: Any, v: Any) -> Any:
            return module.flash_attention(q, k, v, sliding_window=size.W)

        return peers.jax_contender("jax_linear_attention: window", forward, plain, cotangent, NAMES)

    found = {"torch: causal": torch_causal, "cudnn: causal": functools.partial(cudnn, None)}
    if kept is None:
        found |= {"cudnn: window": functools.partial(cudnn, size.W), "jax_linear_attention: window": jla}
    elif (
        backward and size.H == size.K and size.kept and 8 * size.kept == size.T
    ):  # one share for all: each compiles for 40 s
        found |= flex_contenders(size, plain, cotangent, kept, NAMES)
    if not backward and size.T > 1:
        found["authors"] = functools.partial(authors_prompt, size, plain, kept, options.authors_path)
    return found


def _mark(contender: Contender, same: bool) -> Contender:
    """A peer that computes something else is shown without ratio and without error."""
    if same:
        return contender
    return dataclasses.replace(contender, other=True, values=None, note="another pattern: for orientation")


def _decode(size: Size, position: int, options: Options) -> Setup:
    """One token goes into ring and store, as ``position`` tokens leave them; each call is one further on."""
    ring, slots = size.W + 1, size.kept or 1
    stored = min(slots, max(position - ring, 0))

    @jax.jit
    def make(key: jax.Array) -> Any:
        def normal(*shape: int) -> Any:
            return jax.random.normal(next(keys), shape).astype(size.dtype)

        keys = iter(jax.random.split(key, 10))
        token = (normal(size.B, size.H, size.N), normal(size.B, size.K, size.N), normal(size.B, size.K, size.N))
        score = jax.random.uniform(next(keys), (size.B, size.K), minval=0.1)
        slot = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32)[None, :, None], (size.B, slots, size.K))
        cache = DecodeCache(
            normal(size.B, ring, size.K, size.N),
            normal(size.B, ring, size.K, size.N),
            jax.random.uniform(next(keys), (size.B, ring, size.K), minval=0.1),
            normal(size.B, slots, size.K, size.N),
            normal(size.B, slots, size.K, size.N),
            jnp.where(slot < stored, slot, -1),
            jnp.where(slot < stored, jax.random.uniform(next(keys), slot.shape), -jnp.inf),
        )
        return (*token, score), cache, jnp.full(size.B, position, jnp.int32)

    def step(name: str, cache: Any, length: Any, *token: Any) -> Any:
        o, cache = window_attention_update_step(*token, cache, length, sinks=4, reach=REACH, implementation=name)
        return o, cache, length + 1

    token, cache, length = make(jax.random.key(options.seed))

    def ours(name: str) -> Contender:
        held = [*jax.tree.map(jnp.copy, (cache, length))]
        program = jax.jit(functools.partial(step, name), donate_argnums=(0, 1))
        compiled = program.lower(*held, *token).compile()

        def call() -> Any:
            o, *held[:] = compiled(*held, *token)
            return o

        def first(_: Any) -> dict[str, Any]:
            return {"o": np.asarray(compiled(*jax.tree.map(jnp.copy, (cache, length)), *token)[0], np.float32)}

        return Contender(name, call, first, note="cache in place, token taken in")

    def reference() -> dict[str, Any]:
        with jax.default_matmul_precision("highest"):
            wide = jax.tree.map(
                lambda x: x.astype(jnp.float32) if x.dtype == size.dtype else x, (cache, length, *token)
            )
            return {"o": np.asarray(jax.jit(functools.partial(step, "xla"))(*wide)[0])}

    def dense() -> Contender:
        torch = peers.torch_on_gpu()
        seen = (min(position + 1, ring), stored or 1)
        pairs = ((cache.ring_k, cache.store_k), (cache.ring_v, cache.store_v))
        joined = [jnp.concatenate([x[:, :n] for x, n in zip(pair, seen, strict=True)], axis=1) for pair in pairs]
        one, keys, values = peers.to_torch(token[0][:, None], *joined)

        def forward(*tensors: Any) -> Any:
            moved = (x.transpose(1, 2) for x in tensors)
            attend = torch.nn.functional.scaled_dot_product_attention
            return attend(*moved, enable_gqa=size.H != size.K).transpose(1, 2)[:, 0]

        contender = peers.torch_contender("torch: dense slots", forward, (one, keys, values), None, ("o",))
        return dataclasses.replace(contender, other=True, values=None, note="attention alone over as many slots")

    item = token[0].dtype.itemsize
    slots_read = min(position + 1, ring) + stored
    moved = 2 * token[0].nbytes + size.B * size.K * (2 * slots_read * size.N * item + slots * 8)
    return Setup(ours, {"torch: dense slots": dense}, reference, moved)
