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
    The decode form; ``keys``, ``values``, ``valid`` are tuples with one array per group of slots; ``valid`` is bool
    [B,S,K], or int32 [B,K] where ``case.lengths`` says so.
``update_step(case, q, k, v, score, cache, length, active, layer) -> (o, cache)``
    The decode form that takes the token in. The cache has its layer axis and ``layer`` is an int32 scalar; ``active``
    is None or bool [B].
``FOLD_VMAP = True``
    For a backend whose calls have no vmap rule: ``vmap`` then folds the mapped axis into B, so every residual needs B
    as its first dimension.

``Case.B`` follows the arrays under ``vmap``; all else in a case is fixed when the caller's arguments are checked.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Float32, Int32

from pallas_kernels.batching import fold_batch
from pallas_kernels.dispatch import Operation
from pallas_kernels.window_attention.cases import (
    NEVER,
    Case,
    Columns,
    DecodeCache,
    Gradients,
    Operands,
    StepCase,
    UpdateCase,
    check_call,
    check_step,
    check_update,
)

__all__ = [
    "NEVER",
    "OPERATION",
    "Case",
    "Columns",
    "DecodeCache",
    "Gradients",
    "Operands",
    "StepCase",
    "UpdateCase",
    "row_delta",
    "window_attention",
    "window_attention_step",
    "window_attention_update_step",
]

OPERATION = Operation("window_attention", ("pallas", "triton", "xla"), fastest=("triton", "pallas", "xla"))
# Where the kernels for Hopper were the faster ones on an H200: see fastest_order.
HOPPER = Operation("window_attention", OPERATION.implementations, fastest=("pallas", "triton", "xla"))


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
      segment_ids: a document's number for each of the U positions, 0 for padding, which never lies inside a document
        and whose q, k and v are finite; a row never has two documents of one number. None: one document, no padding.
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
    case = check_call(operands, window, scale, return_lse)
    modules = tuple(fastest_order(case, gradients).select(implementation, case) for gradients in (False, True))
    o, lse = _attention(modules, case, operands)
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

    This one only reads: :func:`window_attention_update_step` also takes the token in.

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
    case, flags = check_step(q, keys, values, flags, scale)
    module = OPERATION.select(implementation, case)
    return module.step(case, q, keys, values, flags)


def window_attention_update_step(
    q: Float[Array, "B H N"],
    k: Float[Array, "B K N"],
    v: Float[Array, "B K V"],
    score: Float32[Array, "B K"],
    cache: DecodeCache,
    length: Int32[Array, "B"],
    *,
    sinks: int = 0,
    reach: int = 0,
    active: Bool[Array, "B"] | None = None,
    layer: Int32[Array, ""] | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B H V"], DecodeCache]:
    """One token per sequence goes into the cache, and its query reads what the cache then holds.

    Token p = length[b] takes slot p mod R of the ring. The token p - R that it displaces goes to the store with its
    score (+inf for one of the first ``sinks`` tokens; a score of 0 or less is no candidate): into the first free slot,
    or over the lowest score if its own is strictly greater (among equal scores the latest position goes), else nowhere.
    ``score`` is that of token p - reach, which has become final. Then

        o = sum_s softmax_s(scale q . k_s) v_s    over all that ring and store hold

    Args:
      q, k, v: the new token's, rotated; k and v are rounded to the cache's dtype first.
      score: float32.
      cache: written in place where the caller donates it.
      length: tokens that each row has seen; the caller counts on.
      reach: less than R. active: False for rows without a token: their cache stays, their o is anything finite.
      layer: given if the cache has a layer axis in front: the layer to use. A loop over layers can so carry the whole
        cache and no layer's part is ever copied.

    Returns:
      o [B,H,V] in q's dtype, and the cache.

    Raises:
      UnsupportedCase: an argument breaks one of these rules, or the implementation does not do this case.
    """
    case = check_update(q, k, v, score, cache, length, sinks, reach, active, layer, scale)
    module = OPERATION.select(implementation, case)
    k, v = k.astype(cache.ring_k.dtype), v.astype(cache.ring_v.dtype)
    if layer is not None:
        return module.update_step(case, q, k, v, score, cache, length, active, layer)
    one = DecodeCache(*(x[None] for x in cache))
    o, one = module.update_step(case, q, k, v, score, one, length, active, jnp.zeros((), jnp.int32))
    return o, DecodeCache(*(x[0] for x in one))


def fastest_order(case: Case, gradients: bool) -> Operation:
    """The order in which implementations are tried, for a pass alone or one whose gradients are wanted too.

    In rows of 1024 tokens and more, Pallas comes first for heads above 64, and for a window alone without gradients.
    """
    large = max(case.N, case.V) > 64
    alone = case.window is not None and not (case.expiry or case.C or case.segment_ids or case.return_lse)
    return HOPPER if case.T >= 1024 and (large or (alone and not gradients)) else OPERATION


def row_delta(o: Array, lse: Array, do: Array, dlse: Array | None) -> Float32[Array, "B T H"]:
    """delta = sum_n do o - dlse, of d logit_tj = p_tj (do_t . v_j - delta_t); 0 where dlse counts for nothing seen."""
    delta = jnp.sum(o.astype(jnp.float32) * do.astype(jnp.float32), axis=-1)
    return delta if dlse is None else jnp.where(jnp.isneginf(lse), 0.0, delta - dlse)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(modules: tuple[ModuleType, ModuleType], case: Case, operands: Operands) -> tuple[Array, Array]:
    """``modules``: who runs this where no gradients are wanted, and who runs it with them."""
    (o, lse), _ = _call(modules[0], "forward", case)(operands)
    return o, lse


def _attention_forward(modules: tuple[ModuleType, ModuleType], case: Case, operands: Operands) -> Any:
    (o, lse), residuals = _call(modules[1], "forward", case)(operands)
    # Named here, inside the rule, so that a remat policy that saves these names runs no forward kernel twice.
    o = checkpoint_name(o, "window_attention_out")
    lse, residuals = checkpoint_name((lse, residuals), "window_attention_residual")
    return (o, lse), (operands, o, lse, residuals)


def _attention_backward(
    modules: tuple[ModuleType, ModuleType], case: Case, saved: Any, cotangents: tuple[Array, Array]
) -> tuple[Operands]:
    do, dlse = cotangents
    gradients = _call(modules[1], "backward", case)(*saved, do, dlse if case.return_lse else None)
    columns = Columns(gradients.columns_k, gradients.columns_v, None, None) if case.C else None  # type: ignore[arg-type]
    return (Operands(gradients.q, gradients.k, gradients.v, gradients.scores, None, columns, None),)


_attention.defvjp(_attention_forward, _attention_backward)


def _call(module: ModuleType, name: str, case: Case) -> Callable[..., Any]:
    """The module's function with its case, and with vmap folded into B where the module asks for it."""

    def call(*arrays):
        batch = jax.tree.leaves(arrays)[0].shape[0]
        return getattr(module, name)(dataclasses.replace(case, B=batch), *arrays)

    return fold_batch(call) if getattr(module, "FOLD_VMAP", False) else call
