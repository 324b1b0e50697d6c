"""Window attention in plain jax.numpy, for any device: an obvious reference, and a blockwise form of linear memory.

* :func:`reference` is the rule written down: one mask, one softmax, gradients by autodiff. T x U memory.
* ``forward`` and ``backward`` use the same dense form with its gradients written out while T x U is small. Beyond, they
  walk query blocks x key blocks with an online softmax: memory is linear in T and U both ways, since the backward pass
  rebuilds probabilities from the saved log-sum-exp.

What the blockwise form visits: for the window, the key blocks from the window's start to the query. For keys that
outlive it, a copy of k and v in which each KV head's retained keys (and the cache's columns) stand first, in order of
position; of that, as many blocks as the fullest head has behind the window. So the work is T x (window + kept).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from pallas_kernels.window_attention import xla_update
from pallas_kernels.window_attention.api import NEVER, Case, Columns, Gradients, Operands, StepCase, row_delta

BLOCK = 128
DENSE_LIMIT = 256 * 512  # largest T * (U + C) that takes the dense form


def check(case: Case | StepCase) -> None:
    """Every valid case is supported."""


def reference(
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
) -> tuple[Float[Array, "B T H V"], Float32[Array, "B T H"]]:
    """(o, lse) of :func:`~pallas_kernels.window_attention.window_attention`, one step after the other, by autodiff."""
    B, T, H, N = q.shape
    K, V, dtype = *v.shape[2:], v.dtype
    if scores is not None:
        v = v + ((scores - jax.lax.stop_gradient(scores))[..., None] * jax.lax.stop_gradient(v)).astype(v.dtype)
    mask = _dense_mask(T, window, Operands(q, k, v, scores, expiry, columns, segment_ids))
    if columns is not None:
        k, v = jnp.concatenate([k, columns.k], axis=1), jnp.concatenate([v, columns.v], axis=1)
    q, k, v = (x.astype(jnp.float32) for x in (q.reshape(B, T, K, H // K, N), k, v))
    logits = jnp.einsum("btkgn,bukn->bkgtu", q, k) * (N**-0.5 if scale is None else scale)
    largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True, where=mask[:, :, None], initial=-1e30))
    weights = jnp.where(mask[:, :, None], jnp.exp(jnp.where(mask[:, :, None], logits - largest, 0.0)), 0.0)
    total = jnp.sum(weights, axis=-1)
    seen = total > 0
    o = jnp.einsum("bkgtu,bukv->btkgv", weights / jnp.where(seen, total, 1.0)[..., None], v)
    lse = jnp.where(seen, jnp.log(jnp.where(seen, total, 1.0)) + largest[..., 0], -jnp.inf)
    return o.reshape(B, T, H, V).astype(dtype), jnp.moveaxis(lse, 3, 1).reshape(B, T, H)


def forward(case: Case, operands: Operands) -> tuple[tuple[Array, Array], tuple[()]]:
    q = _group_queries(case, operands.q)
    if _is_dense(case):
        k, v, mask = _dense_operands(case, operands)
        o, lse = _finish(_visit_forward(case, _start(q, case.V), q, k, v, mask))
    else:
        blocks = _split(q, 3, BLOCK)
        sources = _sources(case, operands)
        queries = _query_blocks(case, operands)
        o, lse = jax.lax.map(lambda x: _forward_block(case, sources, *x), (blocks, *queries))
        o, lse = _join(o, 3, case.T), _join(lse, 3, case.T)
    o = jnp.moveaxis(o, 3, 1).reshape(case.B, case.T, case.H, case.V)
    lse = jnp.moveaxis(lse, 3, 1).reshape(case.B, case.T, case.H)
    return (o.astype(operands.v.dtype), lse), ()


def backward(
    case: Case, operands: Operands, o: Array, lse: Array, residuals: tuple[()], do: Array, dlse: Array | None
) -> Gradients:
    q, do_grouped = _group_queries(case, operands.q), _group_queries(case, do)
    delta = _group_queries(case, row_delta(o, lse, do, dlse))
    lse = _group_queries(case, jnp.where(jnp.isneginf(lse), 0.0, lse))  # all is masked there: exp must only stay finite
    rows = (q, do_grouped, lse, delta)
    if _is_dense(case):
        k, v, mask = _dense_operands(case, operands)
        dq, dk, dv = _visit_backward(case, rows, k, v, mask)
        dk, dv = (jnp.moveaxis(x, 1, 2) for x in (dk, dv))
        kept = (dk[:, case.U :], dv[:, case.U :]) if case.C else None
        dk, dv = dk[:, : case.U], dv[:, : case.U]
    else:
        dq, dk, dv, kept = _backward_blocks(case, operands, rows)
    dq = jnp.moveaxis(dq, 3, 1).reshape(operands.q.shape).astype(operands.q.dtype)
    dscores = jnp.sum(dv * operands.v.astype(jnp.float32), axis=-1) if case.scores else None
    dk, dv = dk.astype(operands.k.dtype), dv.astype(operands.v.dtype)
    if kept is None:
        return Gradients(dq, dk, dv, dscores)
    return Gradients(dq, dk, dv, dscores, kept[0].astype(dk.dtype), kept[1].astype(dv.dtype))


def step(
    case: StepCase, q: Array, keys: tuple[Array, ...], values: tuple[Array, ...], valid: tuple[Array, ...]
) -> Float[Array, "B H V"]:
    q = q.reshape(case.B, case.K, case.H // case.K, case.N)
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    logits = jnp.concatenate([dot("bkgn,bskn->bkgs", q, k) for k in keys], axis=-1) * case.scale
    flags = [
        jnp.arange(slots, dtype=jnp.int32)[None, :, None] < held[:, None, :] if filled else held
        for held, slots, filled in zip(valid, case.slots, case.lengths, strict=True)
    ]
    mask = jnp.moveaxis(jnp.concatenate(flags, axis=1), 1, 2)[:, :, None]
    largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True, where=mask, initial=-1e30))
    weights = jnp.where(mask, jnp.exp(jnp.where(mask, logits - largest, 0.0)), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = (weights / jnp.where(total > 0, total, 1.0)).astype(values[0].dtype)
    bounds = [sum(case.slots[:n]) for n in range(1, len(case.slots))]
    parts = zip(jnp.split(weights, bounds, axis=-1), values, strict=True)
    o = jnp.stack([dot("bkgs,bskv->bkgv", part, v) for part, v in parts]).sum(axis=0)
    return o.reshape(case.B, case.H, case.V).astype(values[0].dtype)


update_step = functools.partial(xla_update.update_step, step)


# The mask, on the index axis of the keys.


def _near(window: int | None, i: Array, position: Array) -> Bool[Array, "..."]:
    causal = position <= i
    return causal if window is None else causal & (i - position < window)


def _retained(window: int | None, i: Array, position: Array, expiry: Array) -> Bool[Array, "..."]:
    assert window is not None  # checked at the door: neither expiry nor columns without one
    return (i - position >= window) & (i < expiry)


def _column_segment(segment_ids: Int32[Array, "B U"]) -> Int32[Array, "B 1"]:
    """The first segment of each row that is not padding: the one that goes on from the cache."""
    return jnp.take_along_axis(segment_ids, jnp.argmax(segment_ids != 0, axis=1)[:, None], axis=1)


def _dense_mask(T: int, window: int | None, operands: Operands) -> Bool[Array, "B|1 K|1 T U+C"]:
    segments, expiry, columns = operands.segment_ids, operands.expiry, operands.columns
    B, U, K = operands.k.shape[:3]
    i, j = jnp.arange(U - T, U, dtype=jnp.int32)[:, None], jnp.arange(U, dtype=jnp.int32)
    mask = _near(window, i, j)[None, None]
    if expiry is not None:
        mask = mask | ((j <= i) & _retained(window, i, j, jnp.swapaxes(expiry, 1, 2)[:, :, None]))
    if segments is not None:
        own = segments[:, None, U - T :, None]
        mask = mask & (own == segments[:, None, None]) & (own != 0)
    if columns is None:
        return mask
    position, until = (jnp.swapaxes(x, 1, 2)[:, :, None] for x in (columns.position, columns.expiry))
    seen = _retained(window, i, position, until)
    if segments is not None:
        seen = seen & (own == _column_segment(segments)[:, None, None]) & (own != 0)
    return jnp.concatenate([jnp.broadcast_to(mask, (B, K, T, U)), seen], axis=-1)


def _is_dense(case: Case) -> bool:
    return case.T * (case.U + case.C) <= DENSE_LIMIT


def _dense_operands(case: Case, operands: Operands) -> tuple[Array, Array, Array]:
    """k [B,K,S,N], v [B,K,S,V] with the columns behind the keys, and the mask."""
    k, v, columns = operands.k, operands.v, operands.columns
    if columns is not None:
        k, v = jnp.concatenate([k, columns.k], axis=1), jnp.concatenate([v, columns.v], axis=1)
    return jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2), _dense_mask(case.T, case.window, operands)


# One block of queries [B,K,G,t,N] against one block of keys [B,K,s,N]; mask [B|1,K|1,t,s].


def _start(q: Array, V: int) -> tuple[Array, Array, Array]:
    """Largest logit, sum of weights, weighted sum of v: nothing seen yet."""
    rows = q.shape[:-1]
    return jnp.full(rows, -jnp.inf), jnp.zeros(rows), jnp.zeros((*rows, V))


def _logits(case: Case, q: Array, k: Array, mask: Array) -> Array:
    logits = jnp.einsum("bkgtn,bksn->bkgts", q, k, preferred_element_type=jnp.float32) * case.scale
    return jnp.where(mask[:, :, None], logits, -jnp.inf)


def _visit_forward(case: Case, state: Any, q: Array, k: Array, v: Array, mask: Array) -> tuple[Array, Array, Array]:
    largest, total, o = state
    logits = _logits(case, q, k, mask)
    new = jnp.maximum(largest, jnp.max(logits, axis=-1))
    base = jnp.where(jnp.isneginf(new), 0.0, new)  # -inf - -inf would be NaN
    weights = jnp.exp(logits - base[..., None])
    shrink = jnp.exp(largest - base)
    update = jnp.einsum("bkgts,bksv->bkgtv", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return new, total * shrink + jnp.sum(weights, axis=-1), o * shrink[..., None] + update


def _finish(state: tuple[Array, Array, Array]) -> tuple[Array, Array]:
    largest, total, o = state
    seen = total > 0
    total = jnp.where(seen, total, 1.0)
    return o / total[..., None], jnp.where(seen, largest + jnp.log(total), -jnp.inf)


def _visit_backward(case: Case, rows: Any, k: Array, v: Array, mask: Array) -> tuple[Array, Array, Array]:
    """This block's share of dq, dk, dv in float32."""
    q, do, lse, delta = rows
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    weights = jnp.exp(_logits(case, q, k, mask) - lse[..., None])
    dweights = dot("bkgtv,bksv->bkgts", do, v)
    dlogits = (weights * (dweights - delta[..., None]) * case.scale).astype(k.dtype)
    dq = dot("bkgts,bksn->bkgtn", dlogits, k)
    dk = dot("bkgts,bkgtn->bksn", dlogits, q)
    return dq, dk, dot("bkgts,bkgtv->bksv", weights.astype(do.dtype), do)


# Blocks. Arrays are cut along time into a leading axis of blocks, so that a loop reads whole blocks.


class _Source(NamedTuple):
    """Keys to visit. Every array begins with [blocks, B, K|1, BLOCK]."""

    k: Array
    v: Array
    position: Array
    segment: Array | None
    expiry: Array | None = None  # None: the window's keys; else the retained ones
    nearest: Array | None = None  # [blocks]: the smallest position at each block's first slot


def _split(x: Array, axis: int, size: int, fill: int = 0) -> Array:
    """Cuts ``axis`` into blocks of ``size``, filled up at the end, and puts the blocks first."""
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, -x.shape[axis] % size)
    x = jnp.pad(x, padding, constant_values=fill)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :]), axis, 0)


def _join(x: Array, axis: int, size: int) -> Array:
    """Undoes :func:`_split`; ``axis`` and ``size`` are those of the whole array."""
    x = jnp.moveaxis(x, 0, axis)
    x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return jax.lax.slice_in_dim(x, 0, size, axis=axis)


def _group_queries(case: Case, x: Array) -> Array:
    """[B,T,H,...] -> [B,K,G,T,...]."""
    return jnp.moveaxis(x.reshape(x.shape[0], case.T, case.K, case.H // case.K, *x.shape[3:]), 1, 3)


def _query_blocks(case: Case, operands: Operands) -> tuple[Array, Array | None]:
    """Per block of queries: their indices [blocks,BLOCK] and segments [blocks,B,BLOCK]."""
    indices = _split(jnp.arange(case.U - case.T, case.U, dtype=jnp.int32), 0, BLOCK, fill=case.U - 1)
    segments = operands.segment_ids
    return indices, None if segments is None else _split(segments[:, case.U - case.T :], 1, BLOCK)


def _sources(case: Case, operands: Operands) -> tuple[_Source, ...]:
    segments = operands.segment_ids
    near = _Source(
        _split(jnp.swapaxes(operands.k, 1, 2), 2, BLOCK),
        _split(jnp.swapaxes(operands.v, 1, 2), 2, BLOCK),
        _split(jnp.arange(case.U, dtype=jnp.int32)[None, None], 2, BLOCK, fill=NEVER),
        None if segments is None else _split(segments[:, None], 2, BLOCK),
    )
    if not case.expiry and not case.C:
        return (near,)
    k, v, position, segment, expiry = _retainable(case, operands)
    order, position = _order(case, position, expiry)
    k, v = (jnp.take_along_axis(x, order[..., None], axis=2) for x in (k, v))
    expiry = jnp.take_along_axis(expiry, order, axis=2)
    segment = None if segment is None else _split(jnp.take_along_axis(segment, order, axis=2), 2, BLOCK)
    position = _split(position, 2, BLOCK, fill=NEVER)
    nearest = jnp.min(position[..., 0], axis=(1, 2))
    return near, _Source(_split(k, 2, BLOCK), _split(v, 2, BLOCK), position, segment, _split(expiry, 2, BLOCK), nearest)


def _retainable(case: Case, operands: Operands) -> tuple[Any, Any, Any, Any, Any]:
    """k, v, position, segment, expiry [B,K,S,...] of all that may outlive the window: the keys, then the columns."""
    parts, shape = [], (case.B, case.K)
    segments, columns = operands.segment_ids, operands.columns
    if operands.expiry is not None:
        position = jnp.broadcast_to(jnp.arange(case.U, dtype=jnp.int32), (*shape, case.U))
        segment = None if segments is None else jnp.broadcast_to(segments[:, None], (*shape, case.U))
        parts.append((operands.k, operands.v, position, segment, operands.expiry))
    if columns is not None:
        segment = None
        if segments is not None:
            segment = jnp.broadcast_to(_column_segment(segments)[:, None], (*shape, case.C))
        parts.append((columns.k, columns.v, jnp.swapaxes(columns.position, 1, 2), segment, columns.expiry))
    parts = [(*(jnp.swapaxes(x, 1, 2) for x in part[:2]), *part[2:4], jnp.swapaxes(part[4], 1, 2)) for part in parts]
    return tuple(None if x[0] is None else jnp.concatenate(x, axis=2) for x in zip(*parts, strict=True))  # type: ignore


def _order(case: Case, position: Array, expiry: Array) -> tuple[Int32[Array, "B K S"], Int32[Array, "B K S"]]:
    """Per KV head, the permutation that puts first, by position, what some query of this call sees as retained.

    With it the positions in that order, NEVER for the rest.
    """
    assert case.window is not None
    seen = (expiry > case.U - case.T) & (position < case.U - case.window) & (expiry - case.window > position)
    position = jnp.where(seen, position, NEVER)
    order = jnp.argsort(position, axis=2, stable=True)
    return order, jnp.take_along_axis(position, order, axis=2)


def _range(case: Case, source: _Source, i: Array) -> tuple[Array, Array]:
    """The first block of the source that queries ``i`` (ascending) need, and the one after the last."""
    if source.nearest is None:
        low = jnp.zeros_like(i[0]) if case.window is None else jnp.maximum(i[0] - (case.window - 1), 0) // BLOCK
        return low, i[-1] // BLOCK + 1
    assert case.window is not None
    return jnp.zeros_like(i[0]), jnp.sum(source.nearest <= i[-1] - case.window, dtype=i.dtype)


def _block(case: Case, source: _Source, n: Array, i: Array, own: Array | None) -> tuple[Array, Array, Array]:
    """k, v and mask of block n for the queries of index ``i`` and segment ``own`` [B,BLOCK]."""
    block = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, n, 0, keepdims=False), source)
    position, i = block.position[:, :, None], i[:, None]
    if block.expiry is None:
        mask = _near(case.window, i, position)
    else:
        mask = _retained(case.window, i, position, block.expiry[:, :, None])
    if own is not None:
        own = own[:, None, :, None]
        mask = mask & (own == block.segment[:, :, None]) & (own != 0)
    return block.k, block.v, mask


def _forward_block(case: Case, sources: tuple[_Source, ...], q: Array, i: Array, own: Array | None) -> Any:
    state = _start(q, case.V)
    for source in sources:

        def visit(n, state, source=source):
            return _visit_forward(case, state, q, *_block(case, source, n, i, own))

        state = jax.lax.fori_loop(*_range(case, source, i), visit, state)
    return _finish(state)


def _backward_blocks(case: Case, operands: Operands, rows: tuple[Array, ...]) -> tuple[Array, Array, Array, Any]:
    """dq [B,K,G,T,N], dk [B,U,K,N], dv [B,U,K,V], and the pair of the columns or None."""
    sources = _sources(case, operands)

    def query_block(sums, x):
        rows, i, own = x
        dq = jnp.zeros(rows[0].shape, jnp.float32)
        done = []
        for source, sums_of_source in zip(sources, sums, strict=True):

            def visit(n, state, source=source):
                dq, dk, dv = state
                share = _visit_backward(case, rows, *_block(case, source, n, i, own))
                return dq + share[0], dk.at[n].add(share[1]), dv.at[n].add(share[2])

            dq, *rest = jax.lax.fori_loop(*_range(case, source, i), visit, (dq, *sums_of_source))
            done.append(tuple(rest))
        return tuple(done), dq

    zeros = tuple(tuple(jnp.zeros(x.shape, jnp.float32) for x in (source.k, source.v)) for source in sources)
    blocks = tuple(_split(x, 3, BLOCK) for x in rows)
    sums, dq = jax.lax.scan(query_block, zeros, (blocks, *_query_blocks(case, operands)))
    dk, dv = (jnp.swapaxes(_join(x, 2, case.U), 1, 2) for x in sums[0])
    dq = _join(dq, 3, case.T)
    if len(sources) == 1:
        return dq, dk, dv, None
    # The transpose of the gather into order is a gather by the inverse permutation.
    _, _, position, _, expiry = _retainable(case, operands)
    back = jnp.argsort(_order(case, position, expiry)[0], axis=2)[..., None]
    size = back.shape[2]
    kept = [jnp.swapaxes(jnp.take_along_axis(_join(x, 2, size), back, axis=2), 1, 2) for x in sums[1]]
    if case.expiry:
        dk, dv = dk + kept[0][:, : case.U], dv + kept[1][:, : case.U]
    return dq, dk, dv, tuple(x[:, size - case.C :] for x in kept) if case.C else None
