"""Which tiles of keys does a tile of queries meet, and which without a mask? Worked out in XLA, before a launch.

Beside the keys of the call, the kernels stream one list per KV head: first the columns of a cache, then the keys that
are retained beyond the window, compacted in the order of their positions, so that every tile is one rectangular copy.
Every slot of the list has the interval [low, high) of the query indices that see it, already cut to its document.
The numbers and places of a tile's steps are one row of int32, so the time of a kernel follows the number of keys seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from pallas_kernels.tiles import ceil_div
from pallas_kernels.window_attention.api import Case, Operands
from pallas_kernels.window_attention.cases import FAR
from pallas_kernels.window_attention.columns import DocumentBounds, Retained, query_bounds, retained, survey
from pallas_kernels.window_attention.pallas_gather import gather_rows

ROWS = 64  # queries, or keys, of a warpgroup
EDGE = 256  # slots beyond the list that a masked tile may ask about
ROUND = 128  # sections of the list are multiples of this


class KeyList(NamedTuple):
    """Per KV head: keys and values in order, and the queries that see them; ``cached`` slots come from a cache."""

    k: Array  # [B,K,S,N]
    v: Array  # [B,K,S,V]
    low: Int32[Array, "B K S+EDGE"]
    high: Int32[Array, "B K S+EDGE"]


class Known(NamedTuple):
    """What all kernels of a call must know of the data; None where it has no use."""

    bounds: DocumentBounds | None
    kept: Retained | None
    cache: Int32[Array, "B K 3"] | None
    list: KeyList | None


def round_up(n: int, multiple: int) -> int:
    return ceil_div(n, multiple) * multiple


def cached_slots(case: Case) -> int:
    return round_up(case.C, ROUND)


def pad_rows(x: Array) -> Array:
    """[B,T,...] with T a whole number of 8 rows, as swizzled copies want, and not below a tile's height."""
    return jnp.pad(x, ((0, 0), (0, max(-x.shape[1] % 8, 128 - x.shape[1])), (0, 0), (0, 0)))


def survey_data(
    case: Case, operands: Operands, kept: Retained | None = None, *, gather: Callable[..., Any] = gather_rows
) -> Known:
    """The document bounds, the list and what is known of it; ``kept`` is given if it is known."""
    W = case.width
    bounds = query_bounds(operands.segment_ids) if operands.segment_ids is not None else None
    begin = None if bounds is None else bounds.begin
    if kept is None and operands.expiry is not None and W < case.U:
        kept = retained(operands.expiry, W, begin)
    columns = operands.columns
    cache = None if columns is None else survey(columns, W, case.U, begin)
    parts = []
    if columns is not None:
        assert cache is not None
        parts.append(_cache_part(case, columns, W, bounds, cache[:, :, 2]))
    if kept is not None:
        parts.append(_retained_part(case, operands, kept, W, bounds, gather))
    if not parts:
        return Known(bounds, None, None, None)
    k, v, low, high = (jnp.concatenate(x, axis=2) if len(x) > 1 else x[0] for x in zip(*parts, strict=True))
    low, high = (jnp.pad(x, ((0, 0), (0, 0), (0, EDGE))) for x in (low, high))
    return Known(bounds, kept, cache, KeyList(k, v, low, high))


def _pad_slots(x: Array, slots: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, 0), (0, slots - x.shape[2])) + ((0, 0),) * (x.ndim - 3))


def _cache_part(case: Case, columns: Any, W: int, bounds: DocumentBounds | None, document: Array) -> list[Array]:
    k, v, position, expiry = (x.swapaxes(1, 2) for x in columns)
    low, high = position + W, expiry
    if bounds is not None:
        end = jnp.take_along_axis(bounds.end, jnp.minimum(document, case.U - 1), axis=1)
        end = jnp.where(document < FAR, end, 0)
        low, high = jnp.maximum(low, document[..., None]), jnp.minimum(high, end[..., None])
    return [_pad_slots(x, cached_slots(case)) for x in (k, v, low, high)]


def _retained_part(
    case: Case, operands: Operands, kept: Retained, W: int, bounds: DocumentBounds | None, gather: Callable[..., Any]
) -> list[Array]:
    slots = round_up(case.U, ROUND)
    position, expiry = (_pad_slots(x, slots) for x in (kept.position, kept.expiry))
    count = kept.counts[:, :, -1]
    there = jnp.arange(slots, dtype=jnp.int32) < count[..., None]
    position = jnp.where(there, position, 0)
    low, high = position + W, jnp.where(there, expiry, 0)
    if bounds is not None:
        end = jnp.take_along_axis(bounds.end, position.reshape(case.B, -1), axis=1).reshape(position.shape)
        high = jnp.minimum(high, end)
    return [*gather(operands.k, operands.v, position, count), low, high]


class QueryPlan(NamedTuple):
    """For tiles of queries: ``rows`` [B,K,tiles,fields], and per query (padded to whole tiles) its document's begin.

    Fields: steps in the cache's part of the list, steps in its retained part and the first slot of those, steps in the
    window and the first key of those, the highest begin of a query; then per warpgroup the ends of the slots that all
    its queries see, of the cache and of the retained keys.
    """

    rows: Int32[Array, "B K tiles fields"]
    begin: Int32[Array, "B T"] | None


def plan_queries(case: Case, known: Known, keys: int, warpgroups: int) -> QueryPlan:
    """The plan for tiles of ``warpgroups`` x 64 queries that meet tiles of ``keys`` keys."""
    # What depends on no data is worked out before the program runs, not by small kernels within it.
    xp: Any = jnp if any(x is not None for x in known) else np
    W, size = case.width, warpgroups * ROWS
    tiles = ceil_div(case.T, size)
    i_first = case.U - case.T + xp.arange(tiles, dtype=xp.int32) * size
    i_last = xp.minimum(i_first + size, case.U) - 1
    unit_first = i_first[:, None] + xp.arange(warpgroups, dtype=xp.int32) * ROWS
    low = high = xp.zeros((case.B, tiles), xp.int32)
    begin = None
    if known.bounds is not None:
        edge = ((0, 0), (0, tiles * size - case.T))
        begin = jnp.pad(known.bounds.begin[:, case.U - case.T :], edge, constant_values=FAR)
        each = begin.reshape(case.B, tiles, size)
        low, high = each.min(2), jnp.where(each < FAR, each, 0).max(2)
    empty = low == FAR
    low = xp.where(empty, 0, low)
    first = xp.maximum(xp.maximum(i_first - W + 1, low), 0) // 8 * 8
    window_n = -(-(i_last + 1 - first) // keys)
    shape = (case.B, case.K, tiles)
    none = xp.zeros(shape, xp.int32)
    cache_n, list_n, list_first = none, none, none
    cache_whole = list_whole = xp.zeros((*shape, warpgroups), xp.int32)
    if known.cache is not None:
        used, seen_by_all, document = (known.cache[:, :, None, n] for n in range(3))
        cache_n = jnp.where(low[:, None] == document, -(-used // keys), 0)
        of_document = (low[:, None] == document) & (high[:, None] == document)
        all_see = of_document[..., None] & (unit_first >= seen_by_all[..., None])
        cache_whole = jnp.where(all_see, used[..., None], 0)
    if known.kept is not None:
        counts = known.kept.counts

        def count(j: Array) -> Array:  # retained keys among 0..j
            j = jnp.broadcast_to(j, (case.B, case.K, *j.shape[2:]))
            flat = jnp.clip(j, 0, case.U - 1).reshape(case.B, case.K, -1)
            return jnp.where(j >= 0, jnp.take_along_axis(counts, flat, axis=2).reshape(j.shape), 0)

        start, start_high = (none, none) if begin is None else (count(x[:, None] - 1) for x in (low, high))
        end = jnp.maximum(count((i_last - W)[None, None]), start)
        # Copies begin at multiples of 8; a list that begins elsewhere is masked.
        whole = (known.kept.never[..., None] != 0) & (start == start_high) & (start % 8 == 0)
        start = start // 8 * 8
        list_n = jnp.where(end > start, -(-(end - start) // keys), 0)
        list_whole = jnp.where(whole[..., None], count((unit_first - W)[None, None]), 0) + cached_slots(case)
        list_first = start + cached_slots(case)
    numbers = [xp.where(empty[:, None], 0, xp.broadcast_to(x, shape)) for x in (cache_n, list_n, window_n[:, None])]
    places = [xp.broadcast_to(x, shape) for x in (list_first, first[:, None], high[:, None])]
    columns = [numbers[0], numbers[1], places[0], numbers[2], places[1], places[2]]
    rows = xp.concatenate([xp.stack(columns, axis=-1), cache_whole, list_whole], axis=-1)
    return QueryPlan(jnp.asarray(rows, jnp.int32), begin)
