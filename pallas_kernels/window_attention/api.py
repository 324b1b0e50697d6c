r"""What window attention computes, which arguments it takes, and what a backend of it must provide.

**Backend modules** (``pallas_kernels.window_attention.<implementation>``) see only valid arguments and provide

``check(case)``
    ``case`` is a :class:`Case` or a :class:`StepCase`. Raises ``UnsupportedCase`` (value, rule, fix) before any launch.
``forward(case, operands) -> ((o, lse), residuals)``
    ``o`` [B,T,H,V] in v's dtype, ``lse`` [B,T,H] float32 (natural log), both always returned.
    ``residuals``: a pytree of arrays, what ``backward`` wants besides operands, o and lse; ``()`` for nothing.
``backward(case, operands, o, lse, residuals, do, dlse) -> Gradients``
    ``do`` [B,T,H,V] in o's dtype; ``dlse`` [B,T,H] float32, None unless ``case.return_lse``. :func:`row_delta` gives
    the term that both enter by. Fields of :class:`Gradients` that have no operand are None.
``step(case, q, keys, values, valid) -> o``
    The decode form; ``keys``, ``values``, ``valid`` are tuples with one array per group of slots.
``FOLD_VMAP = True``
    For a backend whose calls have no vmap rule: ``vmap`` then folds the mapped axis into B, so every residual needs B
    as its first dimension.

``Case.B`` follows the arrays under ``vmap``; all else in a case is fixed when the caller's arguments are checked.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Float32, Int32

from pallas_kernels.dispatch import Operation, UnsupportedCase

OPERATION = Operation("window_attention", ("triton", "xla"), fastest=("triton", "xla"))
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
    """Shapes and options of one decode step; ``slots`` has the number of slots of each group."""

    B: int
    H: int
    K: int
    N: int
    V: int
    slots: tuple[int, ...]
    dtype: str
    scale: float


def window_attention(
    q: Float[Array, "B T H N"],
    k: Float[Array, "B U K N"],
    v: Float[Array, "B U K V"],
    scores: Float32[Array, "B U K"] | None = None,
    *,
    window: int | None = None,
    expiry: Int32[Array, "B U K"] | None = None,
    columns: Columns | None = None,
    segment_ids: Int32[Array, "B U"] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Any:
    r"""Causal attention within a window, plus the keys that are retained beyond it.

        o_t = sum_j p_tj v_j,    p_tj = exp(scale q_t . k_j - lse_t),    lse_t = log sum_j exp(scale q_t . k_j)

    with sums over the keys that query t sees. The queries are the last T of the U positions: query t has the index
    i = U - T + t. With h the KV head of the query head (query heads h G .. h G + G - 1 read KV head h, G = H / K):

    * it sees key j if both are in the same nonzero segment, j <= i, and
      (window is None, or i - j < window, or i < expiry[b, j, h]);
    * it sees column c if i - position[b, c, h] >= window, i < expiry[b, c, h], and the query is in the first segment of
      the row that is not padding (columns belong to the document that goes on from the cache).

    So no window is full attention, a window alone is sliding-window attention (window 1: self only), and ``NEVER`` as
    the expiry of selected tokens (0 elsewhere) is the training mask of learned token eviction.

    The scores do not change the output: v passes through. Backward, dscores[b,j,h] = sum_n dv[b,j,h,n] v[b,j,h,n], with
    dv summed over the query group, whether or not j is retained: the router's gradient in arXiv 2510.20787.

    Args:
      q, k, v: of one dtype: float32, bfloat16 or float16. H is a multiple of K, U >= T. k is already rotated.
      scores: float32; only their gradient is of use.
      window: keys in the window with self; None for all.
      expiry: the index from which a key outside the window is gone; ``NEVER``, or 0 for a key that is not retained.
        Needs a window.
      columns: further retained keys, from a cache. Needs a window.
      segment_ids: a document's number for each of the U positions, 0 for padding, which never lies inside a document; a
        row never has two documents of one number. None: one document, no padding.
      scale: of the logits; N ** -0.5 by default.
      return_lse: return lse too, by which results over disjoint keys are merged. It is differentiable.
      implementation: "pallas", "triton", "xla", or None for the fastest here.

    Returns:
      o [B,T,H,V] in v's dtype, 0 for padding and where nothing is seen; with ``return_lse`` the pair (o, lse), lse
      [B,T,H] float32, natural log, -inf where o is 0 for that reason. Products accumulate in float32.
      Differentiable in q, k, v, scores, columns.k and columns.v. Memory is linear in T and U, forward and backward.

    Raises:
      UnsupportedCase: an argument breaks one of these rules, or the implementation does not do this case.
    """
    operands = Operands(q, k, v, scores, expiry, columns, segment_ids)
    case = _check(operands, window, scale, return_lse)
    module = OPERATION.select(implementation, case)
    o, lse = _attention(module, case, operands)
    return (o, lse) if return_lse else o


def window_attention_step(
    q: Float[Array, "B H N"],
    k: Float[Array, "B S K N"] | Sequence[Array],
    v: Float[Array, "B S K V"] | Sequence[Array],
    valid: Bool[Array, "B S K"] | Sequence[Array],
    *,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B H V"]:
    """One query per sequence over an explicit set of slots: attention as every cache here decodes.

        o = sum_s softmax_s(scale q . k_s) v_s    over the slots s with valid[b, s, h], h the query head's KV head

    Slots have no order and no causality: the caller writes the new token into its ring first and says which slots hold
    something. A cache of several buffers passes them as tuples of groups, k = (ring_k, store_k) and so on, under one
    softmax; no buffer is copied to join them.

    This one only reads. A form that also updates ring and store in the same launch is for a backend with a kernel to
    add, as a function of its own.

    Args:
      q: the new token's queries, rotated. k, v: of q's dtype, per group [B,S,K,N] and [B,S,K,V].
      valid: bool, [B,S,K], or [B,S] where all heads agree; or int32 [B,K] lengths: the first slots of that head.
      scale: N ** -0.5 by default.

    Returns:
      o [B,H,V] in v's dtype; 0 for a head without a valid slot, whatever the slots hold as long as it is finite.

    Raises:
      UnsupportedCase: an argument breaks one of these rules, or the implementation does not do this case.
    """
    keys, values, flags = (tuple(x) if isinstance(x, (tuple, list)) else (x,) for x in (k, v, valid))
    case, flags = _check_step(q, keys, values, flags, scale)
    module = OPERATION.select(implementation, case)
    return module.step(case, q, keys, values, flags)


def row_delta(o: Array, lse: Array, do: Array, dlse: Array | None) -> Float32[Array, "B T H"]:
    """delta = sum_n do o - dlse, of d logit_tj = p_tj (do_t . v_j - delta_t); 0 where dlse counts for nothing seen."""
    delta = jnp.sum(o.astype(jnp.float32) * do.astype(jnp.float32), axis=-1)
    return delta if dlse is None else jnp.where(jnp.isneginf(lse), 0.0, delta - dlse)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(module: ModuleType, case: Case, operands: Operands) -> tuple[Array, Array]:
    (o, lse), _ = _call(module, "forward", case)(operands)
    return o, lse


def _attention_forward(module: ModuleType, case: Case, operands: Operands) -> Any:
    (o, lse), residuals = _call(module, "forward", case)(operands)
    # Named here, inside the rule, so that a remat policy that saves these names runs no forward kernel twice.
    o = checkpoint_name(o, "window_attention_out")
    lse, residuals = checkpoint_name((lse, residuals), "window_attention_residual")
    return (o, lse), (operands, o, lse, residuals)


def _attention_backward(module: ModuleType, case: Case, saved: Any, cotangents: tuple[Array, Array]) -> tuple[Operands]:
    do, dlse = cotangents
    gradients = _call(module, "backward", case)(*saved, do, dlse if case.return_lse else None)
    columns = Columns(gradients.columns_k, gradients.columns_v, None, None) if case.C else None  # type: ignore[arg-type]
    return (Operands(gradients.q, gradients.k, gradients.v, gradients.scores, None, columns, None),)


_attention.defvjp(_attention_forward, _attention_backward)


def _call(module: ModuleType, name: str, case: Case) -> Callable[..., Any]:
    """The module's function with its case, and with vmap folded into B where the module asks for it."""
    function = getattr(module, name)

    def call(*arrays):
        batch = jax.tree.leaves(arrays)[0].shape[0]
        return function(dataclasses.replace(case, B=batch), *arrays)

    if not getattr(module, "FOLD_VMAP", False):
        return call
    foldable = jax.custom_batching.custom_vmap(call)

    @foldable.def_vmap
    def fold(axis_size, batched, *arrays):
        def into_batch(x, mapped):
            x = x if mapped else jnp.broadcast_to(x, (axis_size, *x.shape))
            return x.reshape(axis_size * x.shape[1], *x.shape[2:])

        out = foldable(*jax.tree.map(into_batch, arrays, tuple(batched)))
        out = jax.tree.map(lambda x: x.reshape(axis_size, x.shape[0] // axis_size, *x.shape[1:]), out)
        return out, jax.tree.map(lambda _: True, out)

    return foldable


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


def _check(operands: Operands, window: int | None, scale: float | None, return_lse: bool) -> Case:
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


def _check_step(
    q: Array, keys: tuple[Array, ...], values: tuple[Array, ...], valid: tuple[Array, ...], scale: float | None
) -> tuple[StepCase, tuple[Array, ...]]:
    """The case, and the validity of every group as bool [B,S,K]."""
    sizes: dict[str, int] = {}
    _check_array("q", q, "BHN", sizes)
    dtype = str(q.dtype)
    _require(dtype in DTYPES, f"q has dtype {dtype}; it must be one of {', '.join(DTYPES)}")
    counts = (len(keys), len(values), len(valid))
    _require(len(set(counts)) == 1 and counts[0] > 0, f"k, v, valid have {counts} groups; they must have equally many")
    slots, flags = [], []
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
        if lengths:
            flag = jnp.arange(S, dtype=jnp.int32)[None, :, None] < flag[:, None, :]
        elif flag.ndim == 2:
            flag = jnp.broadcast_to(flag[:, :, None], (B, S, K))
        slots.append(S)
        flags.append(flag)
    _check_heads(sizes)
    B, H, K, N, V = (sizes[letter] for letter in "BHKNV")
    return StepCase(B, H, K, N, V, tuple(slots), dtype, _check_scale(scale, N)), tuple(flags)
