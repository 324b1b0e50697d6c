"""What the passes of window attention in triton.language share: bounds and masks of tiles, and the streams of keys.

A tile of queries meets its keys in three streams: the tiles of its window, the keys retained beyond it, gathered
through the list of ``triton_plan``, and the columns of a cache. Every key has the interval of the query
indices that see it,

    key of the window: [j, j + window)        retained key or column: [position + window, expiry)

and a query has the first index of its document (``begin``), so one mask serves all three. Tiles in which every query
sees every key branch around it. The bounds are data, so the time follows the number of keys that are seen.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from pallas_kernels.tiles import capability, ceil_div, power_of_2
from pallas_kernels.triton_call import LONGEST_AXIS, constant, jit, tl
from pallas_kernels.window_attention import cases
from pallas_kernels.window_attention.cases import LOG2_E, Case

LANES = constant(8)
FAR = constant(cases.FAR)
LN_2 = constant(0.6931471805599453)


@jit
def load_rows(base, row, stride, exists, SIZE: tl.constexpr, BLOCK: tl.constexpr, CHECKED: tl.constexpr):
    """Rows of SIZE numbers, zero beyond them and (if CHECKED) where a row does not exist."""
    n = tl.arange(0, BLOCK)
    pointer = base + row[:, None] * stride + n[None, :]
    if CHECKED:
        return tl.load(pointer, mask=exists[:, None] & (n < SIZE)[None, :], other=0.0)
    elif SIZE < BLOCK:
        return tl.load(pointer, mask=(n < SIZE)[None, :], other=0.0)
    else:
        return tl.load(pointer)


@jit
def own_tile(together):
    """(tile, head of the batch) of a program, on the grid of ``grid_of``."""
    n = tl.program_id(0)
    return n // together, tl.program_id(1) * together + n % together


@jit
def window_tiles(i_first, i_last, begin_low, begin_high, window, TILE: tl.constexpr):
    """(first, whole, whole_end, end) of the keys for queries i_first to i_last; all see those of [whole, whole_end).

    All but ``end`` are multiples of TILE.
    """
    end = i_last + 1
    first = tl.maximum(tl.maximum(i_first - window + 1, begin_low), 0) // TILE * TILE
    whole = tl.cdiv(tl.maximum(tl.maximum(i_last - window + 1, begin_high), 0), TILE) * TILE
    whole_end = (i_first + 1) // TILE * TILE
    none = whole >= whole_end
    whole = tl.where(none, first, whole)
    whole_end = tl.where(none, first, whole_end)
    return first, whole, whole_end, end


@jit
def retained_tiles(counts, never, U, i_first, i_last, begin_low, begin_high, window, TILE: tl.constexpr):
    """(first, whole_end, end): places in the list of retained keys; [first, whole_end) are seen by all the queries.

    ``counts[j]`` is the number of retained keys among 0..j; ``never`` says that no retained key expires.
    """
    first = tl.load(counts + begin_low - 1, mask=(begin_low > 0) & (begin_low <= U), other=0)
    first_high = tl.load(counts + begin_high - 1, mask=begin_high > 0, other=0)
    end = tl.load(counts + i_last - window, mask=i_last >= window, other=0)
    whole = tl.load(counts + i_first - window, mask=i_first >= window, other=0)
    whole = tl.where((tl.load(never) != 0) & (first_high == first), whole, first)
    whole_end = first + tl.maximum(whole - first, 0) // TILE * TILE
    return first, whole_end, tl.where(begin_low < FAR, end, first)


@jit
def cache_tiles(survey_of_head, i_first, begin_low, begin_high, TILE: tl.constexpr):
    """(whole_end, end, document): slots of the cache; [0, whole_end) are seen by all; document owns the columns."""
    end = tl.load(survey_of_head)
    seen_by_all = tl.load(survey_of_head + 1)
    document = tl.load(survey_of_head + 2)
    end = tl.where(begin_low == document, end, 0)
    whole_end = tl.where((i_first >= seen_by_all) & (begin_high == document), end // TILE * TILE, 0)
    return whole_end, end, document


@jit
def query_begins(begin, i, U, SEGMENTS: tl.constexpr):
    """(first index of each query's document, the lowest, the highest of those that are not padding)."""
    if SEGMENTS:
        begins = tl.load(begin + i, mask=i < U, other=FAR)
        low = tl.min(begins, 0)
        return begins, low, tl.max(tl.where(begins < FAR, begins, 0), 0)
    else:
        return tl.zeros_like(i), 0, 0


@jit
def visible(i, begins, position, low, span, SEGMENTS: tl.constexpr):
    """Which of the queries i (rows) see which keys (columns): low <= i < low + span, and the key lies in the document.

    ``span`` is unsigned: one comparison serves both ends.
    """
    mask = (i[:, None] - low[None, :]).to(tl.uint32) < span[None, :]
    if SEGMENTS:
        mask = mask & (begins[:, None] <= position[None, :])
    return mask


@jit
def span_of(low, high):
    """high - low as an unsigned number, 0 where high is not above low."""
    return tl.where(high > low, (high - low).to(tl.uint32), 0)


@jit
def _row_max(x):
    """The maximum of each row, in four chains at a time within a thread where one would be four times as long."""
    return tl.max(tl.max(tl.reshape(x, (x.shape[0], x.shape[1] // 16, 16)), 1), 1)


@jit
def _attend(
    q, keys, values, i, begins, position, low, span, masked, acc, m, l,
    SCALE: tl.constexpr, SEGMENTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    logits = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
    if masked:
        logits = tl.where(visible(i, begins, position, low, span, SEGMENTS), logits, float("-inf"))
    # m starts at a finite number, so a row that has seen nothing gives exp2(-inf) = 0 and not NaN.
    m_new = tl.maximum(m, _row_max(logits) * SCALE)
    p = tl.exp2(logits * SCALE - m_new[:, None])
    fade = tl.exp2(m - m_new)
    # The denominator in LANES parts, which lie in one thread each: they are joined once, after the last tile.
    l = l * fade[:, None] + tl.sum(tl.reshape(p, (p.shape[0], p.shape[1] // LANES, LANES)), 1)
    acc = tl.dot(p.to(values.dtype), values, acc * fade[:, None], input_precision=PRECISION)
    return acc, m_new, l


@jit
def _differentiate(
    q, do, keys, values, i, begins, position, low, span, masked, dq, lse2, delta,
    SCALE: tl.constexpr, SEGMENTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    logits = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
    p = tl.exp2(logits * SCALE - lse2[:, None])
    if masked:
        p = tl.where(visible(i, begins, position, low, span, SEGMENTS), p, 0.0)
    dp = tl.dot(do, tl.trans(values), input_precision=PRECISION)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(keys.dtype), keys, dq, input_precision=PRECISION)


@jit
def _meet(
    q, do, k_head, v_head, row, i, begins, position, low, span, masked, acc, m, l,
    K: tl.constexpr, N: tl.constexpr, V: tl.constexpr, SCALE: tl.constexpr, SEGMENTS: tl.constexpr,
    N_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, PRECISION: tl.constexpr, DQ: tl.constexpr,
):  # fmt: skip
    """One tile of keys, in rows that exist, joins a pass: (acc, m, l) of the softmax, or if DQ (dq, lse2, delta)."""
    keys = load_rows(k_head, row, K * N, None, N, N_BLOCK, False)
    values = load_rows(v_head, row, K * V, None, V, V_BLOCK, False)
    if DQ:
        acc = _differentiate(
            q, do, keys, values, i, begins, position, low, span, masked, acc, m, l, SCALE, SEGMENTS, PRECISION
        )
        return acc, m, l
    else:
        return _attend(q, keys, values, i, begins, position, low, span, masked, acc, m, l, SCALE, SEGMENTS, PRECISION)


@jit
def stream(
    q_tile, do_tile, acc, m, l, i, begins, begin_low, begin_high, i_first, i_last, b, h,
    k, v, counts, index, expiry, never, cache_k, cache_v, cache_position, cache_expiry, cache_survey, U, window,
    K: tl.constexpr, N: tl.constexpr, V: tl.constexpr, C: tl.constexpr, SCALE: tl.constexpr, SEGMENTS: tl.constexpr,
    RETAINED: tl.constexpr, EVEN: tl.constexpr, KEYS: tl.constexpr, N_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, DQ: tl.constexpr,
):  # fmt: skip
    """All the keys that a tile of queries sees go through the pass.

    Forward, the window has one loop, which branches around the mask: a second one would begin with loads to wait for.
    Backward the branch costs registers, and retained keys without a mask need no expiry: two loops there. Rows beyond
    the end of a stream stand for some row that exists, and are masked.
    """
    group = b * K + h
    lane = tl.arange(0, KEYS)
    k_head = k + b * U * K * N + h * N
    v_head = v + b * U * K * V + h * V
    first, whole, whole_end, end = window_tiles(i_first, i_last, begin_low, begin_high, window, KEYS)
    span = tl.zeros_like(lane).to(tl.uint32) + window
    if DQ:
        for j_first in range(whole, whole_end, KEYS):
            acc, m, l = _meet(
                q_tile, do_tile, k_head, v_head, j_first + lane, None, None, None, None, None, False, acc, m, l,
                K, N, V, SCALE, SEGMENTS, N_BLOCK, V_BLOCK, PRECISION, DQ,
            )  # fmt: skip
        before = (whole - first) // KEYS
        for n in range(0, before + tl.cdiv(end - whole_end, KEYS)):
            j = tl.where(n < before, first + n * KEYS, whole_end + (n - before) * KEYS) + lane
            acc, m, l = _meet(
                q_tile, do_tile, k_head, v_head, tl.minimum(j, U - 1), i, begins, j, j, span, True, acc, m, l,
                K, N, V, SCALE, SEGMENTS, N_BLOCK, V_BLOCK, PRECISION, DQ,
            )  # fmt: skip
    else:
        for j_first in range(first, end, KEYS):
            j = j_first + lane
            row = j if EVEN else tl.minimum(j, U - 1)
            acc, m, l = _meet(
                q_tile, do_tile, k_head, v_head, row, i, begins, j, j, span, (j_first < whole) | (j_first >= whole_end),
                acc, m, l, K, N, V, SCALE, SEGMENTS, N_BLOCK, V_BLOCK, PRECISION, DQ,
            )  # fmt: skip

    if RETAINED:
        first, whole_end, end = retained_tiles(
            counts + group * U, never + group, U, i_first, i_last, begin_low, begin_high, window, KEYS
        )
        for c_first in range(first, whole_end, KEYS):
            j = tl.load(index + group * U + c_first + lane)
            acc, m, l = _meet(
                q_tile, do_tile, k_head, v_head, j, None, None, None, None, None, False, acc, m, l,
                K, N, V, SCALE, SEGMENTS, N_BLOCK, V_BLOCK, PRECISION, DQ,
            )  # fmt: skip
        # Half a tile at a time: the masks of a whole one would raise the registers of the entire kernel.
        for c_first in range(whole_end, end, KEYS // 2):
            c = c_first + tl.arange(0, KEYS // 2)
            j = tl.load(index + group * U + tl.minimum(c, end - 1))
            high = tl.where(c < end, tl.load(expiry + group * U + tl.minimum(c, end - 1)), 0)
            acc, m, l = _meet(
                q_tile, do_tile, k_head, v_head, j, i, begins, j, j + window, span_of(j + window, high), True,
                acc, m, l, K, N, V, SCALE, SEGMENTS, N_BLOCK, V_BLOCK, PRECISION, DQ,
            )  # fmt: skip

    if C > 0:
        whole_end, end, document = cache_tiles(cache_survey + group * 3, i_first, begin_low, begin_high, KEYS)
        k_head = cache_k + b * C * K * N + h * N
        v_head = cache_v + b * C * K * V + h * V
        for c_first in range(0, whole_end, KEYS):
            acc, m, l = _meet(
                q_tile, do_tile, k_head, v_head, c_first + lane, None, None, None, None, None, False, acc, m, l,
                K, N, V, SCALE, SEGMENTS, N_BLOCK, V_BLOCK, PRECISION, DQ,
            )  # fmt: skip
        for c_first in range(whole_end, end, KEYS):
            c = c_first + lane
            low = tl.load(cache_position + (b * C + c) * K + h, mask=c < end, other=0) + window
            high = tl.load(cache_expiry + (b * C + c) * K + h, mask=c < end, other=0)
            acc, m, l = _meet(
                q_tile, do_tile, k_head, v_head, tl.minimum(c, C - 1), i, begins, tl.zeros_like(low) + document, low,
                span_of(low, high), True, acc, m, l, K, N, V, SCALE, SEGMENTS, N_BLOCK, V_BLOCK, PRECISION, DQ,
            )  # fmt: skip
    return acc, m, l


def retains(case: Case) -> bool:
    """Whether keys of the call may be retained beyond the window."""
    return case.expiry and case.width < case.U


# How many of the batch's heads go on from tile to tile together, at most, as measured on an H200. With many, the tiles
# of one end, which have the least work, come last and fill the multiprocessors that have run out of others; with few,
# the keys of a head stay in the L2 cache. "window": a forward pass without retained keys (full attention, whose tiles
# are not alike, has not been measured).
TOGETHER = {"forward": 1, "window": 64, "dq": 8, "dkv": 64}


def heads_together(heads: int, name: str) -> int:
    """How many of ``heads`` a pass takes from tile to tile together: a divisor that leaves a grid no axis too long."""
    divisors = [n for n in range(1, heads + 1) if heads % n == 0 and heads // n <= LONGEST_AXIS]
    return max((n for n in divisors if n <= TOGETHER[name]), default=divisors[0])


def grid_of(heads: int, tiles: int, together: int) -> tuple[int, int]:
    """For every tile of every head of the batch, in the order of ``own_tile``."""
    return together * tiles, heads // together


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tile sizes and launch options of one pass."""

    queries: int
    keys: int
    warps: int
    stages: int


# (pass, padded head size) -> tiles for 16-bit numbers; the rows were measured on an H200.
TILES = {
    ("forward", 64): Tiles(64, 64, 4, 3),
    ("forward", 128): Tiles(64, 64, 4, 3),
    ("forward", 256): Tiles(128, 32, 8, 3),
    ("dq", 64): Tiles(64, 32, 4, 3),
    ("dq", 128): Tiles(64, 64, 4, 2),
    ("dq", 256): Tiles(64, 32, 8, 3),
    ("dkv", 64): Tiles(64, 64, 4, 3),
    ("dkv", 128): Tiles(64, 64, 8, 3),
    ("dkv", 256): Tiles(32, 64, 8, 3),
}


# The same for Ampere, Ada and consumer Blackwell, in the 99 KB of shared memory that most of them have: compiled for
# 8.0, 8.9 and 12.0 without a spilled byte, and never run.
SMALL_TILES = {
    ("forward", 64): Tiles(64, 64, 4, 3),
    ("forward", 128): Tiles(64, 32, 8, 2),
    ("forward", 256): Tiles(32, 32, 8, 2),
    ("dq", 64): Tiles(64, 32, 4, 2),
    ("dq", 128): Tiles(64, 32, 4, 2),
    ("dq", 256): Tiles(64, 32, 8, 1),
    ("dkv", 64): Tiles(32, 64, 8, 2),
    ("dkv", 128): Tiles(32, 64, 8, 2),
    ("dkv", 256): Tiles(32, 32, 8, 1),
}


def spacious() -> bool:
    """Whether a program may have the 227 KB of shared memory of Hopper, as on 10 and 11; on 12 there are 99 again."""
    return 90 <= capability() < 120


def block(size: int) -> int:
    """A head size, padded to a tile: a power of two, at least 16."""
    return power_of_2(size, 16)


def tiles_for(case: Case, name: str) -> Tiles:
    """The tiles of a pass ("forward", "dq" or "dkv")."""
    size = max(64, block(case.N), block(case.V))
    tiles = (TILES if spacious() else SMALL_TILES)[name, size]
    if case.dtype != "float32":
        return tiles
    # Products of float32, of heads up to 64, are three each, with operands in registers: small tiles.
    return Tiles(32, 32, 8 if name == "dq" else 4, 1)


def options(case: Case, tiles: Tiles) -> dict[str, Any]:
    """The constexprs that every kernel of this operation takes."""
    return {
        "H": case.H,
        "K": case.K,
        "N": case.N,
        "V": case.V,
        "C": case.C,
        "SCALE": case.scale * LOG2_E,
        "SEGMENTS": case.segment_ids,
        "RETAINED": retains(case),
        "EVEN": case.U % tiles.keys == 0,
        "QUERIES": tiles.queries,
        "KEYS": tiles.keys,
        "N_BLOCK": block(case.N),
        "V_BLOCK": block(case.V),
        "PRECISION": "tf32x3" if case.dtype == "float32" else "tf32",
    }


def launch(case: Case, name: str, length: int) -> tuple[int, dict[str, Any]]:
    """(heads that go together, how ``triton_call`` launches a pass) over ``length`` queries, or keys for "dkv"."""
    tiles = tiles_for(case, name)
    heads, size = (case.B * case.K, tiles.keys) if name == "dkv" else (case.B * case.H, tiles.queries)
    together = heads_together(heads, "window" if name == "forward" and not retains(case) else name)
    grid = grid_of(heads, ceil_div(length, size), together)
    return together, {"grid": grid, "num_warps": tiles.warps, "num_stages": tiles.stages, **options(case, tiles)}
