"""What is a valid call of window attention: its arrays, its sizes and options, and the error for any other."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.arguments import FLOATS, Arguments

NEVER = 2**31 - 1  # an expiry that no query index reaches
FAR = 2**30  # beyond every index and every distance: the window where there is none, the begin of padding
LOG2_E = 1.4426950408889634  # kernels take powers of two: exp(x) = 2^(x LOG2_E)


class Columns(NamedTuple):
    """Retained keys of a cache, seen beside the keys of the call.

    ``position`` is on the axis of the key indices: key 0 of the call is index 0, so tokens before it are negative.
    An empty slot has expiry 0 and a position of at least -2**30; its k and v must be finite.
    """

    k: Float[Array, "B C K N"]
    v: Float[Array, "B C K V"]
    position: Int32[Array, "B C K"]
    expiry: Int32[Array, "B C K"]


class Operands(NamedTuple):
    """The array arguments of one call, None where not given."""

    q: Float[Array, "B T H N"]
    k: Float[Array, "B U K N"]
    v: Float[Array, "B U K V"]
    scores: Float32[Array, "B U K"] | None
    expiry: Int32[Array, "B U K"] | None
    columns: Columns | None
    segment_ids: Int32[Array, "B U"] | None


class Gradients(NamedTuple):
    """Cotangents of the differentiable operands, each in its operand's shape and dtype."""

    q: Array
    k: Array
    v: Array
    scores: Array | None = None
    columns_k: Array | None = None
    columns_v: Array | None = None


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes and options of one call. C is the number of columns, 0 for none; dtype is that of every q, k and v."""

    B: int
    T: int
    U: int
    H: int
    K: int
    N: int
    V: int
    C: int
    dtype: str
    window: int | None
    scale: float
    scores: bool
    expiry: bool
    segment_ids: bool
    return_lse: bool

    @property
    def width(self) -> int:
        """The window, ``FAR`` for none."""
        return FAR if self.window is None else min(self.window, FAR)


@dataclasses.dataclass(frozen=True)
class StepCase:
    """Shapes and options of one decode step; ``slots`` and ``lengths`` (filled from the front?) are per group."""

    B: int
    H: int
    K: int
    N: int
    V: int
    slots: tuple[int, ...]
    lengths: tuple[bool, ...]
    dtype: str
    scale: float


class DecodeCache(NamedTuple):
    """Ring of R slots and store of M, as one decode step reads and writes them; with a layer axis before B, or without.

    Token p of a row lies in slot p mod R of the ring until token p + R comes. Slots of the store fill in order; an
    empty one has position -1 and score -inf.
    """

    ring_k: Float[Array, "... B R K N"]
    ring_v: Float[Array, "... B R K V"]
    ring_score: Float32[Array, "... B R K"]
    store_k: Float[Array, "... B M K N"]
    store_v: Float[Array, "... B M K V"]
    store_position: Int32[Array, "... B M K"]
    store_score: Float32[Array, "... B M K"]


@dataclasses.dataclass(frozen=True)
class UpdateCase:
    """Shapes and options of one decode step that takes its token in; ``slots`` is (R, M)."""

    B: int
    H: int
    K: int
    N: int
    V: int
    slots: tuple[int, int]
    dtype: str
    scale: float
    sinks: int
    reach: int


def check_call(operands: Operands, window: int | None, scale: float | None, return_lse: bool) -> Case:
    q, k, v, scores, expiry, columns, segment_ids = operands
    check = Arguments("window_attention")
    sizes = check.sizes
    check.array("q", q, "B T H N", *FLOATS)
    dtype = str(q.dtype)
    check.array("k", k, "B U K N", dtype)
    check.array("v", v, "B U K V", dtype)
    check.heads()
    T, U = sizes["T"], sizes["U"]
    check.require(U >= T, f"q has {T} tokens and k has {U}; queries are the last of the keys' positions: give fewer")
    check.require(U < FAR, f"k has {U} tokens; there must be fewer than {FAR}")
    if window is not None:
        check.count("window", window)
    for name, value in (("expiry", expiry), ("columns", columns)):
        check.require(value is None or window is not None, f"{name} is given without a window; give one")
    check.optional("scores", scores, "B U K", "float32")
    check.optional("expiry", expiry, "B U K", "int32")
    if columns is not None:
        check.record("columns", columns, Columns)
        check.array("columns.k", columns.k, "B C K N", dtype)
        check.array("columns.v", columns.v, "B C K V", dtype)
        check.array("columns.position", columns.position, "B C K", "int32")
        check.array("columns.expiry", columns.expiry, "B C K", "int32")
    check.optional("segment_ids", segment_ids, "B U", "int32")
    return Case(
        **{letter: sizes[letter] for letter in "BTUHKNV"},
        C=sizes.get("C", 0),
        dtype=dtype,
        window=None if window is None else min(window, NEVER),
        scale=check.scale(scale),
        scores=scores is not None,
        expiry=expiry is not None,
        segment_ids=segment_ids is not None,
        return_lse=bool(return_lse),
    )


def check_step(
    q: Array, keys: tuple[Array, ...], values: tuple[Array, ...], valid: tuple[Array, ...], scale: float | None
) -> tuple[StepCase, tuple[Array, ...]]:
    """The case, and the validity of every group as bool [B,S,K] or as lengths int32 [B,K]."""
    check = Arguments("window_attention")
    sizes = check.sizes
    check.array("q", q, "B H N", *FLOATS)
    dtype = str(q.dtype)
    counts = (len(keys), len(values), len(valid))
    alike = len(set(counts)) == 1 and counts[0] > 0
    check.require(alike, f"k, v, valid have {counts} groups; they must have equally many")
    slots, flags, filled = [], [], []
    for n, (key, value, flag) in enumerate(zip(keys, values, valid, strict=True)):
        check.array(f"k[{n}]", key, f"B S_{n} K N", dtype)
        check.array(f"v[{n}]", value, f"B S_{n} K V", dtype)
        B, S, K = key.shape[:3]
        form = f"use bool {list(key.shape[:3])} or {list(key.shape[:2])}, or int32 {[key.shape[0], key.shape[2]]}"
        known = hasattr(flag, "shape") and hasattr(flag, "dtype")
        check.require(known, f"valid[{n}] has type {type(flag).__name__}; {form}")
        lengths = flag.dtype == jnp.int32
        allowed: list[tuple[int, ...]] = [(B, K)] if lengths else [(B, S, K), (B, S)]
        check.require(
            (lengths or flag.dtype == jnp.bool_) and flag.shape in allowed,
            f"valid[{n}] is {flag.dtype}{list(flag.shape)}; {form}",
        )
        if not lengths and flag.ndim == 2:
            flag = jnp.broadcast_to(flag[:, :, None], (B, S, K))
        slots.append(S)
        flags.append(flag)
        filled.append(bool(lengths))
    check.heads()
    B, H, K, N, V = (sizes[letter] for letter in "BHKNV")
    return StepCase(B, H, K, N, V, tuple(slots), tuple(filled), dtype, check.scale(scale)), tuple(flags)


def check_update(
    q: Array,
    k: Array,
    v: Array,
    score: Array,
    cache: DecodeCache,
    length: Array,
    sinks: int,
    reach: int,
    active: Array | None,
    layer: Array | None,
    scale: float | None,
) -> UpdateCase:
    check = Arguments("window_attention")
    sizes = check.sizes
    check.array("q", q, "B H N", *FLOATS)
    dtype = str(q.dtype)
    check.array("k", k, "B K N", dtype)
    check.array("v", v, "B K V", dtype)
    check.heads()
    check.array("score", score, "B K", "float32")
    check.array("length", length, "B", "int32")
    check.optional("active", active, "B", "bool")
    check.optional("layer", layer, "", "int32")
    check.record("cache", cache, DecodeCache)
    lead = "" if layer is None else "L"
    check.array("cache.ring_k", cache.ring_k, f"{lead} B R K N", *FLOATS)
    stored = str(cache.ring_k.dtype)
    check.array("cache.ring_v", cache.ring_v, f"{lead} B R K V", stored)
    check.array("cache.ring_score", cache.ring_score, f"{lead} B R K", "float32")
    check.array("cache.store_k", cache.store_k, f"{lead} B M K N", stored)
    check.array("cache.store_v", cache.store_v, f"{lead} B M K V", stored)
    check.array("cache.store_position", cache.store_position, f"{lead} B M K", "int32")
    check.array("cache.store_score", cache.store_score, f"{lead} B M K", "float32")
    check.count("sinks", sinks, least=0)
    check.count("reach", reach, least=0)
    R, M = sizes["R"], sizes["M"]
    check.require(reach < R, f"reach={reach}; it must be less than the ring's {R}")
    B, H, K, N, V = (sizes[letter] for letter in "BHKNV")
    return UpdateCase(B, H, K, N, V, (R, M), dtype, check.scale(scale), sinks, reach)
