"""What is a valid call of window attention: its arrays, its sizes and options, and the error for any other."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.dispatch import UnsupportedCase

NEVER = 2**31 - 1  # an expiry that no query index reaches
DTYPES = ("float32", "bfloat16", "float16")


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


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UnsupportedCase(f"window_attention: {message}")


def _check_array(name: str, x: Any, letters: str, sizes: dict[str, int], dtype: str | None = None) -> None:
    """Raises unless x has these dimensions (a letter's first use sets its size) and this dtype."""
    wanted = f"[{','.join(letters)}]"
    _require(hasattr(x, "shape") and hasattr(x, "dtype"), f"{name} is {type(x).__name__}; it must be an array {wanted}")
    _require(len(x.shape) == len(letters), f"{name} has shape {x.shape}; it must be {wanted}")
    for letter, size in zip(letters, x.shape, strict=True):
        expected = sizes.setdefault(letter, size)
        _require(size == expected, f"{name} has shape {x.shape}; it must be {wanted} with {letter} = {expected}")
    _require(all(x.shape), f"{name} has shape {x.shape}; every dimension must be at least 1")
    if dtype is not None:
        _require(x.dtype == dtype, f"{name} has dtype {x.dtype}; it must be {dtype}, use .astype(jnp.{dtype})")


def _check_heads(sizes: dict[str, int]) -> None:
    H, K = sizes["H"], sizes["K"]
    _require(H % K == 0, f"q has {H} heads and k has {K}; the first must be a multiple of the second")


def _check_scale(scale: float | None, N: int) -> float:
    if scale is None:
        return N**-0.5
    try:
        value = float(scale)
    except (TypeError, ValueError, jax.errors.JAXTypeError) as error:
        raise UnsupportedCase(f"window_attention: scale is {scale!r}; it must be a number, not traced") from error
    _require(math.isfinite(value), f"scale={value}; it must be finite")
    return value


def check_call(operands: Operands, window: int | None, scale: float | None, return_lse: bool) -> Case:
    q, k, v, scores, expiry, columns, segment_ids = operands
    sizes: dict[str, int] = {}
    _check_array("q", q, "BTHN", sizes)
    dtype = str(q.dtype)
    _require(dtype in DTYPES, f"q has dtype {dtype}; it must be one of {', '.join(DTYPES)}")
    _check_array("k", k, "BUKN", sizes, dtype)
    _check_array("v", v, "BUKV", sizes, dtype)
    _check_heads(sizes)
    T, U = sizes["T"], sizes["U"]
    _require(U >= T, f"q has {T} tokens and k has {U}; queries are the last of the keys' positions, so at most as many")
    _require(U < 2**30, f"k has {U} tokens; there must be fewer than 2**30")
    if window is not None:
        whole = isinstance(window, int) and not isinstance(window, bool)
        _require(whole and window >= 1, f"window={window!r}; it must be an integer >= 1 (with self), or None for all")
    for name, value in (("expiry", expiry), ("columns", columns)):
        _require(value is None or window is not None, f"{name} is given without a window; give one")
    if scores is not None:
        _check_array("scores", scores, "BUK", sizes, "float32")
    if expiry is not None:
        _check_array("expiry", expiry, "BUK", sizes, "int32")
    if columns is not None:
        _require(isinstance(columns, Columns), f"columns is {type(columns).__name__}; it must be a Columns")
        _check_array("columns.k", columns.k, "BCKN", sizes, dtype)
        _check_array("columns.v", columns.v, "BCKV", sizes, dtype)
        _check_array("columns.position", columns.position, "BCK", sizes, "int32")
        _check_array("columns.expiry", columns.expiry, "BCK", sizes, "int32")
    if segment_ids is not None:
        _check_array("segment_ids", segment_ids, "BU", sizes, "int32")
    return Case(
        **{letter: sizes[letter] for letter in "BTUHKNV"},
        C=sizes.get("C", 0),
        dtype=dtype,
        window=None if window is None else min(window, NEVER),
        scale=_check_scale(scale, sizes["N"]),
        scores=scores is not None,
        expiry=expiry is not None,
        segment_ids=segment_ids is not None,
        return_lse=bool(return_lse),
    )


def check_step(
    q: Array, keys: tuple[Array, ...], values: tuple[Array, ...], valid: tuple[Array, ...], scale: float | None
) -> tuple[StepCase, tuple[Array, ...]]:
    """The case, and the validity of every group as bool [B,S,K] or as lengths int32 [B,K]."""
    sizes: dict[str, int] = {}
    _check_array("q", q, "BHN", sizes)
    dtype = str(q.dtype)
    _require(dtype in DTYPES, f"q has dtype {dtype}; it must be one of {', '.join(DTYPES)}")
    counts = (len(keys), len(values), len(valid))
    _require(len(set(counts)) == 1 and counts[0] > 0, f"k, v, valid have {counts} groups; they must have equally many")
    slots, flags, filled = [], [], []
    for n, (key, value, flag) in enumerate(zip(keys, values, valid, strict=True)):
        sizes.pop("S", None)
        _check_array(f"k[{n}]", key, "BSKN", sizes, dtype)
        _check_array(f"v[{n}]", value, "BSKV", sizes, dtype)
        B, S, K = key.shape[:3]
        lengths = flag.dtype == jnp.int32
        allowed: list[tuple[int, ...]] = [(B, K)] if lengths else [(B, S, K), (B, S)]
        _require(
            (lengths or flag.dtype == jnp.bool_) and flag.shape in allowed,
            f"valid[{n}] is {flag.dtype}{list(flag.shape)}; use bool {[B, S, K]} or {[B, S]}, or int32 {[B, K]}",
        )
        if not lengths and flag.ndim == 2:
            flag = jnp.broadcast_to(flag[:, :, None], (B, S, K))
        slots.append(S)
        flags.append(flag)
        filled.append(bool(lengths))
    _check_heads(sizes)
    B, H, K, N, V = (sizes[letter] for letter in "BHKNV")
    return StepCase(B, H, K, N, V, tuple(slots), tuple(filled), dtype, _check_scale(scale, N)), tuple(flags)


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
    sizes: dict[str, int] = {}
    _check_array("q", q, "BHN", sizes)
    dtype = str(q.dtype)
    _require(dtype in DTYPES, f"q has dtype {dtype}; it must be one of {', '.join(DTYPES)}")
    _check_array("k", k, "BKN", sizes, dtype)
    _check_array("v", v, "BKV", sizes, dtype)
    _check_heads(sizes)
    _check_array("score", score, "BK", sizes, "float32")
    _check_array("length", length, "B", sizes, "int32")
    if active is not None:
        _check_array("active", active, "B", sizes, "bool")
    if layer is not None:
        _check_array("layer", layer, "", sizes, "int32")
    _require(isinstance(cache, DecodeCache), f"cache is {type(cache).__name__}; it must be a DecodeCache")
    stored = str(cache.ring_k.dtype)
    _require(stored in DTYPES, f"cache.ring_k has dtype {stored}; it must be one of {', '.join(DTYPES)}")
    lead = "" if layer is None else "L"
    for name, letters, wanted in (
        ("ring_k", "BRKN", stored),
        ("ring_v", "BRKV", stored),
        ("ring_score", "BRK", "float32"),
        ("store_k", "BMKN", stored),
        ("store_v", "BMKV", stored),
        ("store_position", "BMK", "int32"),
        ("store_score", "BMK", "float32"),
    ):
        _check_array(f"cache.{name}", getattr(cache, name), lead + letters, sizes, wanted)
    _require(sinks >= 0, f"sinks={sinks}; it must be at least 0")
    _require(0 <= reach < sizes["R"], f"reach={reach}; it must be at least 0 and less than the ring's {sizes['R']}")
    B, H, K, N, V = (sizes[letter] for letter in "BHKNV")
    return UpdateCase(B, H, K, N, V, (sizes["R"], sizes["M"]), dtype, _check_scale(scale, N), sinks, reach)
