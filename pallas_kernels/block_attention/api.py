r"""What block attention (native sparse attention) computes, which arguments it takes, and what a backend must provide.

**Backend modules** (``pallas_kernels.block_attention.<implementation>``) see only valid arguments and provide

``check(case)``
    Raises ``UnsupportedCase`` (value, rule, fix) before any launch.
``forward(case, q, k, v, layout) -> ((o_compressed, o_selected), residuals)``
    Both [B,T,H,V] in v's dtype. ``layout``: a ``blocks.Layout`` of packed rows, None for one document without padding.
``backward(case, q, k, v, layout, outputs, residuals, cotangents) -> (dq, dk, dv)``
``attend(case, q, k, v, pooled_k, pooled_v, position) -> (o_compressed, o_selected)``
    The same for queries at ``position`` [B,T] (-1: padding) of the one document of their row, whose U tokens are keys
    and whose complete blocks are pooled already: the cached form, where ``case.cached`` is set.
``step(case, q, k, v, gates, cache, active, window) -> (o, cache)``
    Optional: the whole operation for T = 1, cache and window branch included. ``active`` [B] int32, 0 for padding, or
    None: all are tokens.

All of them work under ``vmap``.

The window branch is the operation ``window_attention``; the merge by gates is plain jax.numpy, which the compiler fuses
into one pass, forward and backward.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int32

from pallas_kernels.arguments import FLOATS, Arguments
from pallas_kernels.block_attention.blocks import BlockCache, Layout, append, row_layout, table_size
from pallas_kernels.dispatch import Operation
from pallas_kernels.window_attention.api import window_attention, window_attention_step

OPERATION = Operation("block_attention", ("pallas", "triton", "xla"), fastest=("triton", "pallas", "xla"))
# Where the kernels for Hopper were the faster ones on an H200: see fastest_order.
HOPPER = Operation("block_attention", OPERATION.implementations, fastest=("pallas", "triton", "xla"))


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes and options of one call: T query tokens, U keys. ``B`` follows the arrays under ``vmap``."""

    B: int
    T: int
    U: int
    H: int
    K: int
    N: int
    V: int
    dtype: str
    block_size: int
    block_counts: int
    scale: float
    segment_ids: bool
    cached: bool


def fastest_order(case: Case) -> Operation:
    """The operation with its implementations in the order in which they were the faster ones on an H200.

    A program of the Hopper kernels has 64 tokens of a KV head, one of Triton's fewer: below 160 of them a GPU is idle.
    """
    return HOPPER if case.B * case.K * case.T >= 160 * 64 else OPERATION


def block_attention(
    q: Float[Array, "B T H N"],
    k: Float[Array, "B T K N"],
    v: Float[Array, "B T K V"],
    gates: Float[Array, "B T H 3"],
    *,
    block_size: int,
    block_counts: int,
    window: int,
    segment_ids: Int32[Array, "B T"] | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T H V"]:
    r"""Native sparse attention: three looks at the past, weighted by gates.

        o_t = gates[t,0] compressed_t + gates[t,1] selected_t + gates[t,2] window_t

    A document is cut into blocks of S = block_size tokens from its first token; t counts from there, c0 = t // S.

    * compressed_t = sum_c p_tc mean(v of block c), p_t = softmax over the complete blocks c < (t + 1) // S of
      scale q_t . mean(k of block c); 0 where there is none yet.
    * selected_t: softmax attention over the tokens j <= t of the best ``block_counts`` blocks c <= c0. A block's
      importance is p_tc summed over the query group; blocks 0, c0 - 1 and c0 count as G = H / K, the most there is.
      Larger importance first, then the smaller number. The choice carries no gradient.
    * window_t: softmax attention over the last ``window`` tokens, t included.

    Query heads h G .. h G + G - 1 read KV head h; G is any number. Where there are fewer blocks than block_counts, all
    are read.

    Args:
      q, k, v: of one dtype, float32, bfloat16 or float16; rotated already if at all.
      gates: in the order compressed, selected, window, after their sigmoid; any of the same dtypes.
      segment_ids: a document's number for each token, 0 for padding, which never lies inside a document and whose q, k,
        v and gates are finite. Documents are computed as if alone. None: one document per row, no padding.
      scale: of the logits; N ** -0.5 by default.
      implementation: "pallas", "triton", "xla", or None for the fastest here; the window branch gets the same. "pallas"
        is the compressed branch with the selection; the selected branch is Triton's, and the window's is the fastest.

    Returns:
      o [B,T,H,V] in v's dtype, 0 for padding. Products accumulate in float32, block means are rounded to the dtype of k
      and v. Differentiable in q, k, v and gates; memory is linear in T, forward and backward.

    Raises:
      UnsupportedCase: an argument breaks one of these rules, or the implementation does not do this case.

    Native Sparse Attention, arXiv 2502.11089, as arXiv 2510.20787 uses it: no overlapping blocks, no learned pooling.
    """
    case = _check(q, k, v, gates, segment_ids, window, block_size, block_counts, scale)
    module = fastest_order(case).select(implementation, case)
    layout = None if segment_ids is None else row_layout(segment_ids, block_size)
    compressed, selected = _branches(module, case, q, k, v, layout)
    windowed = window_attention(
        q, k, v, window=window, segment_ids=segment_ids, scale=case.scale, implementation=_of_window(implementation)
    )
    return _merge(gates, compressed, selected, windowed)


def block_attention_extend(
    q: Float[Array, "B T H N"],
    k: Float[Array, "B T K N"],
    v: Float[Array, "B T K V"],
    gates: Float[Array, "B T H 3"],
    cache: BlockCache,
    *,
    block_size: int,
    block_counts: int,
    window: int,
    segment_ids: Int32[Array, "B T"] | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H V"], BlockCache]:
    """The next T >= 1 tokens of one document per row: :func:`block_attention` where the past is a cache.

    Args:
      cache: from ``init_block_cache`` or an earlier call, of any of the same dtypes. The caller makes
        sure that no document outgrows it: tokens beyond its length are dropped.
      segment_ids: 0 for padding, which may stand left and right of the tokens and is finite; another number for these.
        None: all are tokens.
      Others: as in :func:`block_attention`.

    Returns:
      (o, the cache with the new tokens). A document in any pieces gives what it gives in one. No gradient is defined.

    Raises:
      UnsupportedCase: an argument breaks one of these rules, or the implementation does not do this case.
    """
    case = _check(q, k, v, gates, segment_ids, window, block_size, block_counts, scale, cache)
    module = fastest_order(case).select(implementation, case)
    if case.T == 1 and hasattr(module, "step"):
        active = None if segment_ids is None else (segment_ids[:, 0] != 0).astype(jnp.int32)
        return _call(module, "step", case)(q, k, v, gates, cache, active, window)
    before = cache.length
    valid = None if segment_ids is None else segment_ids != 0
    cache, position = append(cache, k, v, valid, block_size)
    held = (x.astype(q.dtype) for x in (cache.k, cache.v, cache.pooled_k, cache.pooled_v))
    compressed, selected = _call(module, "attend", case)(q, *held, position)
    windowed = _cached_window(q, cache, before, position, window, case, _of_window(implementation))
    return _merge(gates, compressed, selected, windowed), cache


def _of_window(implementation: str | None) -> str | None:
    return None if implementation == "pallas" else implementation


def _merge(gates: Array, *branches: Array) -> Array:
    g = gates.astype(jnp.float32)
    o = sum(g[..., n, None] * branch.astype(jnp.float32) for n, branch in enumerate(branches))
    return jnp.asarray(o).astype(branches[0].dtype)


def _cached_window(
    q: Array, cache: BlockCache, before: Array, position: Array, window: int, case: Case, implementation: str | None
) -> Array:
    """The window branch over the cache: the last window - 1 old tokens, then the call's, padding where it has it."""
    past = min(window, case.U) - 1
    left = jnp.argmax(position >= 0, axis=1).astype(jnp.int32)
    token = (before - left)[:, None] + jnp.arange(-past, case.T, dtype=jnp.int32)
    seen = (token >= 0) & (token < cache.length[:, None])
    slot = jnp.clip(token, 0, case.U - 1)
    k, v = (jnp.take_along_axis(x, slot[:, :, None, None], axis=1).astype(q.dtype) for x in (cache.k, cache.v))
    if case.T == 1:
        seen &= position >= 0
        o = window_attention_step(q[:, 0], k, v, seen, scale=case.scale, implementation=implementation)
        return o[:, None]
    # A left-padded row starts with old tokens, which are no queries; all that is not a new token is masked as padding.
    segments = seen.astype(jnp.int32)
    o = window_attention(q, k, v, window=window, segment_ids=segments, scale=case.scale, implementation=implementation)
    return jnp.where((position >= 0)[:, :, None, None], o, jnp.zeros((), o.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _branches(
    module: ModuleType, case: Case, q: Array, k: Array, v: Array, layout: Layout | None
) -> tuple[Array, Array]:
    return _call(module, "forward", case)(q, k, v, layout)[0]


def _branches_forward(module: ModuleType, case: Case, q: Array, k: Array, v: Array, layout: Layout | None) -> Any:
    outputs, residuals = _call(module, "forward", case)(q, k, v, layout)
    # Named here, inside the rule, so that a remat policy that saves these names runs no forward kernel twice.
    outputs = checkpoint_name(outputs, "block_attention_out")
    residuals = checkpoint_name(residuals, "block_attention_residual")
    return outputs, (q, k, v, layout, outputs, residuals)


def _branches_backward(module: ModuleType, case: Case, saved: Any, cotangents: tuple[Array, Array]) -> Any:
    return (*_call(module, "backward", case)(*saved, cotangents), None)


_branches.defvjp(_branches_forward, _branches_backward)


def _call(module: ModuleType, name: str, case: Case) -> Callable[..., Any]:
    """The module's function for this case, with B as the arrays have it (vmap changes it)."""

    def call(*arrays):
        return getattr(module, name)(dataclasses.replace(case, B=arrays[0].shape[0]), *arrays)

    return call


def _check(
    q: Any,
    k: Any,
    v: Any,
    gates: Any,
    segment_ids: Any,
    window: int,
    block_size: int,
    block_counts: int,
    scale: float | None,
    cache: Any = None,
) -> Case:
    check = Arguments("block_attention")
    sizes = check.sizes
    check.array("q", q, "B T H N", *FLOATS)
    dtype = str(q.dtype)
    check.array("k", k, "B T K N", dtype)
    check.array("v", v, "B T K V", dtype)
    check.array("gates", gates, "B T H 3", *FLOATS)
    check.optional("segment_ids", segment_ids, "B T", "int32")
    check.heads()
    check.count("block_size", block_size)
    check.count("block_counts", block_counts)
    check.count("window", window)
    if cache is None:
        sizes["U"] = sizes["T"]
    else:
        check.require(isinstance(cache, BlockCache), f"cache is {type(cache).__name__}; it must be a BlockCache")
        check.array("cache.k", cache.k, "B U K N", *FLOATS)
        held = str(cache.k.dtype)
        check.array("cache.v", cache.v, "B U K V", held)
        sizes["C"] = table_size(sizes["U"], block_size)
        check.array("cache.pooled_k", cache.pooled_k, "B C K N", held)
        check.array("cache.pooled_v", cache.pooled_v, "B C K V", held)
        check.array("cache.length", cache.length, "B", "int32")
    return Case(
        **{letter: sizes[letter] for letter in "BTUHKNV"},
        dtype=dtype,
        block_size=block_size,
        block_counts=block_counts,
        scale=check.scale(scale),
        segment_ids=segment_ids is not None,
        cached=cache is not None,
    )
