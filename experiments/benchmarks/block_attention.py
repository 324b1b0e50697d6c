"""Native sparse attention beside flash-linear-attention's and cuDNN's full attention, over lengths and group sizes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks import peers
from experiments.benchmarks.cases import Case, Options, Setup
from experiments.benchmarks.clock import Contender
from experiments.benchmarks.torch_attention import attend_sdpa
from pallas_kernels.block_attention.api import block_attention, block_attention_extend
from pallas_kernels.block_attention.blocks import BlockCache, append, init_block_cache

NAMES = ("o", "dq", "dk", "dv", "dgates")
LONGEST_CHECKED = 2048
LONGEST_FLA = 65536


@dataclasses.dataclass(frozen=True)
class Size:
    """B, T, H, K, N as everywhere; S tokens a block, C blocks selected, W keys in the window with self."""

    B: int
    T: int
    H: int
    K: int
    N: int
    S: int = 64
    C: int = 16
    W: int = 512
    dtype: str = "bfloat16"
    branches: bool = False
    """Without the window branch (its gate is 0), as flash-linear-attention's runs here: errors can be compared."""

    def __str__(self) -> str:
        rest = f"blocks of {self.S}, {self.C} selected, " + ("no window" if self.branches else f"window {self.W}")
        return f"B {self.B}, T {self.T}, H {self.H}, K {self.K}, N {self.N}, {rest}"


def cases(tiny: bool) -> list[Case]:
    """Lengths with 16 query heads to a KV head, smaller groups, and the decode step at a long context."""
    batches: tuple[int, ...]
    groups: tuple[int, ...]
    forward: tuple[str, ...]
    if tiny:
        base = Size(2, 100, 4, 2, 16, 16, 2, 20, "bfloat16")
        named = {"tiny": base}
        context, batches, groups, forward = 128, (2,), (1,), ("tiny",)
    else:
        base = Size(4, 4096, 32, 2, 64)
        lengths = ((4, 4096), (1, 8192), (1, 16384), (1, 32768), (1, 65536), (4, 1024), (4, 2048), (1, 131072))
        named = {f"{tokens}": dataclasses.replace(base, B=batch, T=tokens) for batch, tokens in lengths}
        context, batches, groups, forward = 65536, (1, 16), (8, 4, 2, 1), ("4096", "32768")
    named["branches"] = dataclasses.replace(base, B=1, T=min(base.T, LONGEST_CHECKED), branches=True)
    for group in groups:
        named[f"group-{group}"] = dataclasses.replace(base, K=base.H // group)
    found = []
    for name, size in named.items():
        for backward in (False, True) if name in forward else (True,):
            what = f"{size}, {'forward + backward' if backward else 'forward'}"
            make = functools.partial(_whole, size, backward)
            found.append(Case(f"{name}-{'backward' if backward else 'forward'}", what, size.dtype, make))
    for batch in batches:
        size = dataclasses.replace(base, B=batch, T=context)
        make = functools.partial(_decode, size)
        found.append(Case(f"decode-{batch}", f"decode step at {context}: {size}", size.dtype, make))
    return found


def _draw(size: Size, seed: int) -> tuple[Any, ...]:
    """q, k, v, gates and the cotangent of o."""

    @jax.jit
    def make(key: jax.Array) -> tuple[Any, ...]:
        keys = jax.random.split(key, 5)
        wide, narrow = (size.B, size.T, size.H, size.N), (size.B, size.T, size.K, size.N)
        q, k, v, do = (
            jax.random.normal(key, shape).astype(size.dtype)
            for key, shape in zip(keys[:4], (wide, narrow, narrow, wide), strict=True)
        )
        gates = jax.nn.sigmoid(jax.random.normal(keys[4], (*wide[:3], 3))).astype(size.dtype)
        return q, k, v, gates, do

    return make(jax.random.key(seed))


def _attend(size: Size, name: str, *arrays: Any) -> Any:
    return block_attention(*arrays, block_size=size.S, block_counts=size.C, window=size.W, implementation=name)


def _whole(size: Size, backward: bool, options: Options) -> Setup:
    *inputs, do = _draw(size, options.seed)
    if size.branches:
        inputs[3] = inputs[3].at[..., 2].set(0)
    cotangent = do if backward else None

    def ours(name: str) -> Contender:
        return peers.jax_contender(name, functools.partial(_attend, size, name), inputs, cotangent, NAMES)

    def reference() -> dict[str, Any]:
        # Block means are rounded to 16 bits in the timed calls alone: where that changes which block comes last among
        # the selected, the whole row counts as error.
        with jax.default_matmul_precision("highest"):
            wide = [x.astype(jnp.float32) for x in inputs]
            high = None if cotangent is None else cotangent.astype(jnp.float32)
            contender = peers.jax_contender("", functools.partial(_attend, size, "xla"), wide, high, NAMES)
            assert contender.values is not None
            return contender.values(contender.call())

    moved = sum(x.nbytes for x in inputs) + do.nbytes
    if backward:
        moved += do.nbytes + 2 * sum(x.nbytes for x in inputs)
    checked = reference if size.T <= LONGEST_CHECKED else None
    return Setup(ours, _peers(size, inputs, cotangent, options), checked, moved)


def _peers(size: Size, inputs: list[Any], cotangent: Any | None, options: Options) -> dict[str, Any]:
    q, k, v, gates = inputs

    def detached() -> Any:
        return None if cotangent is None else peers.to_torch(cotangent)[0].detach()

    def sparse(name: str, load: Callable[[], Any]) -> Contender:
        module = load()

        def forward(q: Any, k: Any, v: Any, compressed: Any, selected: Any) -> Any:
            return module.parallel_nsa(q, k, v, compressed, selected, block_counts=size.C, block_size=size.S)

        tensors = peers.to_torch(q, k, v, gates[..., 0], gates[..., 1])
        note = "without its window branch, which needs flash-attn"
        contender = peers.torch_contender(name, forward, tensors, detached(), NAMES[:4], note)
        return contender if size.branches else dataclasses.replace(contender, values=None, other=True)

    def cudnn(window: int | None) -> Contender:
        peers.cudnn_on_gpu()
        local = None if window is None else (window - 1, 0)

        def forward(q: Any, k: Any, v: Any) -> Any:
            return jax.nn.dot_product_attention(
                q, k, v, implementation="cudnn", is_causal=True, local_window_size=local
            )

        name, note = ("cudnn: causal", "full attention") if window is None else ("cudnn: window", "the window branch")
        contender = peers.jax_contender(name, forward, (q, k, v), cotangent, NAMES, note)
        return dataclasses.replace(contender, values=None, other=True)

    def torch_causal() -> Contender:
        forward = functools.partial(attend_sdpa, grouped=size.H != size.K)
        contender = peers.torch_contender(
            "torch: causal", forward, peers.to_torch(q, k, v), detached(), NAMES, "full attention"
        )
        return dataclasses.replace(contender, values=None, other=True)

    fla = functools.partial(sparse, "fla", functools.partial(peers.fla_module, "ops.nsa"))
    authors = functools.partial(
        sparse, "authors", functools.partial(peers.authors_file, options.authors_path, "fla/ops/nsa/parallel.py")
    )
    found: dict[str, Callable[[], Contender]] = {"fla": fla, "authors": authors} if size.T <= LONGEST_FLA else {}
    if not size.branches:
        found |= {
            "cudnn: window": functools.partial(cudnn, size.W),
            "cudnn: causal": functools.partial(cudnn, None),
            "torch: causal": torch_causal,
        }
    return found


def _decode(size: Size, options: Options) -> Setup:
    """One token behind T - 1 others, the cache changed in place; its length stays as it is for the next call."""
    length = size.T - 1

    @jax.jit
    def fill(key: jax.Array) -> Any:
        keys = jax.random.split(key, 2)
        shape = (size.B, length, size.K, size.N)
        k, v = (jax.random.normal(key, shape).astype(size.dtype) for key in keys)
        empty = init_block_cache(size.B, size.T, size.K, size.N, size.N, size.S, jnp.dtype(size.dtype))
        return append(empty, k, v, None, size.S)[0]

    token = _draw(dataclasses.replace(size, T=1), options.seed)[:4]
    key = jax.random.key(options.seed)

    def ours(name: str) -> Contender:
        def step(held: Any, length: Any, q: Any, k: Any, v: Any, gates: Any) -> Any:
            o, cache = block_attention_extend(
                q,
                k,
                v,
                gates,
                BlockCache._make((*held, length)),
                block_size=size.S,
                block_counts=size.C,
                window=size.W,
                implementation=name,
            )
            return o, tuple(cache[:4])

        *arrays, filled = fill(key)
        held = [tuple(arrays)]
        compiled = jax.jit(step, donate_argnums=0).lower(held[0], filled, *token).compile()

        def call() -> Any:
            o, held[0] = compiled(held[0], filled, *token)
            return o

        return Contender(name, call, note="cache in place")

    # The pooled keys (scores) and pooled values, the selected tokens and the window's, of every KV head.
    item = token[0].dtype.itemsize
    tokens = 2 * (size.T // size.S) + 2 * size.C * size.S + 2 * size.W
    return Setup(ours, {}, None, size.B * size.K * tokens * size.N * item)
