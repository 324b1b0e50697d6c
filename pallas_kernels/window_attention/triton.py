"""Window attention with retained columns in triton.language, through jax-triton: the forward pass.

A program owns a tile of queries of one head and streams keys past it with an online softmax: first the key tiles of the
window, then the keys that are retained beyond it, gathered through the list that ``columns.retained`` makes, then the
columns of a cache. Every key carries the interval of query indices that sees it,

    key of the window: [j, j + window)        retained key or column: [position + window, expiry)

and a query carries the first index of its document (``begin``), so one mask serves all three. Tiles in which every query
sees every key skip the mask. The bounds are data, so the time follows the number of keys that are seen.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import UnsupportedCase
from pallas_kernels.triton_call import check_installed, jit, tl, triton_call
from pallas_kernels.window_attention.api import Case, Operands
from pallas_kernels.window_attention.columns import Retained, document_bounds, retained, survey

FOLD_VMAP = True
LOG2_E = 1.4426950408889634


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
def window_tiles(i_first, i_last, begin_low, begin_high, window, TILE: tl.constexpr):
    """(first, whole, whole_end, end): key tiles for the queries [i_first, i_last], wholly visible from whole to whole_end.

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
    return first, whole_end, tl.where(begin_low < 2**30, end, first)


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
        begins = tl.load(begin + i, mask=i < U, other=2**30)
        low = tl.min(begins, 0)
        return begins, low, tl.max(tl.where(begins < 2**30, begins, 0), 0)
    else:
        return tl.zeros_like(i), 0, 0


@jit
def visible(i, begins, position, low, high, SEGMENTS: tl.constexpr):
    """Which of the queries i (rows) see which keys (columns): low <= i < high, and the key lies in the document."""
    mask = (i[:, None] >= low[None, :]) & (i[:, None] < high[None, :])
    if SEGMENTS:
        mask = mask & (begins[:, None] <= position[None, :])
    return mask


@jit
def _attend(q, keys, values, mask, acc, m, l, SCALE: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    logits = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
    if MASKED:
        logits = tl.where(mask, logits, float("-inf"))
    # m starts at a finite number, so a row that has seen nothing gives exp2(-inf) = 0 and not NaN.
    m_new = tl.maximum(m, tl.max(logits, 1) * SCALE)
    p = tl.exp2(logits * SCALE - m_new[:, None])
    fade = tl.exp2(m - m_new)
    l = l * fade + tl.sum(p, 1)
    acc = tl.dot(p.to(values.dtype), values, acc * fade[:, None], input_precision=PRECISION)
    return acc, m_new, l


@jit
def _forward_kernel(
    q,
    k,
    v,
    begin,
    counts,
    index,
    expiry,
    never,
    cache_k,
    cache_v,
    cache_position,
    cache_expiry,
    cache_survey,
    T,
    U,
    window,
    o,
    lse,
    H: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    SCALE: tl.constexpr,
    SEGMENTS: tl.constexpr,
    RETAINED: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    N_BLOCK: tl.constexpr,
    V_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Programs with the most keys first: without a window the last queries see the most.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    row = tl.program_id(1)
    b = (row // H).to(tl.int64)
    head = row % H
    h = head // (H // K)
    group = b * K + h
    t = tile * QUERIES + tl.arange(0, QUERIES)
    i = U - T + t
    i_first = U - T + tile * QUERIES
    i_last = tl.minimum(i_first + QUERIES, U) - 1
    q_tile = load_rows(q + b * T * H * N + head * N, t, H * N, t < T, N, N_BLOCK, True)
    begins, begin_low, begin_high = query_begins(begin + b * U, i, U, SEGMENTS)
    acc = tl.zeros((QUERIES, V_BLOCK), tl.float32)
    m = tl.full((QUERIES,), -1e30, tl.float32)
    l = tl.zeros((QUERIES,), tl.float32)
    lane = tl.arange(0, KEYS)
    k_head = k + b * U * K * N + h * N
    v_head = v + b * U * K * V + h * V

    first, whole, whole_end, end = window_tiles(i_first, i_last, begin_low, begin_high, window, KEYS)
    for j_first in range(whole, whole_end, KEYS):
        j = j_first + lane
        keys = load_rows(k_head, j, K * N, j < U, N, N_BLOCK, False)
        values = load_rows(v_head, j, K * V, j < U, V, V_BLOCK, False)
        acc, m, l = _attend(q_tile, keys, values, None, acc, m, l, SCALE, False, PRECISION)
    before = (whole - first) // KEYS
    for n in range(0, before + tl.cdiv(end - whole_end, KEYS)):
        j = tl.where(n < before, first + n * KEYS, whole_end + (n - before) * KEYS) + lane
        keys = load_rows(k_head, j, K * N, j < U, N, N_BLOCK, True)
        values = load_rows(v_head, j, K * V, j < U, V, V_BLOCK, True)
        mask = visible(i, begins, j, j, j + window, SEGMENTS)
        acc, m, l = _attend(q_tile, keys, values, mask, acc, m, l, SCALE, True, PRECISION)

    if RETAINED:
        first, whole_end, end = retained_tiles(
            counts + group * U, never + group, U, i_first, i_last, begin_low, begin_high, window, KEYS
        )
        for c_first in range(first, whole_end, KEYS):
            j = tl.load(index + group * U + c_first + lane)
            keys = load_rows(k_head, j, K * N, j < U, N, N_BLOCK, False)
            values = load_rows(v_head, j, K * V, j < U, V, V_BLOCK, False)
            acc, m, l = _attend(q_tile, keys, values, None, acc, m, l, SCALE, False, PRECISION)
        for c_first in range(whole_end, end, KEYS):
            c = c_first + lane
            j = tl.load(index + group * U + c, mask=c < end, other=0)
            high = tl.load(expiry + group * U + c, mask=c < end, other=0)
            keys = load_rows(k_head, j, K * N, c < end, N, N_BLOCK, True)
            values = load_rows(v_head, j, K * V, c < end, V, V_BLOCK, True)
            mask = visible(i, begins, j, j + window, high, SEGMENTS)
            acc, m, l = _attend(q_tile, keys, values, mask, acc, m, l, SCALE, True, PRECISION)

    if C > 0:
        whole_end, end, document = cache_tiles(cache_survey + group * 3, i_first, begin_low, begin_high, KEYS)
        k_head = cache_k + b * C * K * N + h * N
        v_head = cache_v + b * C * K * V + h * V
        for c_first in range(0, whole_end, KEYS):
            c = c_first + lane
            keys = load_rows(k_head, c, K * N, c < C, N, N_BLOCK, False)
            values = load_rows(v_head, c, K * V, c < C, V, V_BLOCK, False)
            acc, m, l = _attend(q_tile, keys, values, None, acc, m, l, SCALE, False, PRECISION)
        for c_first in range(whole_end, end, KEYS):
            c = c_first + lane
            low = tl.load(cache_position + (b * C + c) * K + h, mask=c < end, other=0) + window
            high = tl.load(cache_expiry + (b * C + c) * K + h, mask=c < end, other=0)
            keys = load_rows(k_head, c, K * N, c < end, N, N_BLOCK, True)
            values = load_rows(v_head, c, K * V, c < end, V, V_BLOCK, True)
            mask = visible(i, begins, tl.zeros_like(low) + document, low, high, SEGMENTS)
            acc, m, l = _attend(q_tile, keys, values, mask, acc, m, l, SCALE, True, PRECISION)

    if SEGMENTS:
        l = tl.where(begins < 2**30, l, 0.0)
    seen = l > 0
    divisor = tl.where(seen, l, 1.0)
    result = tl.where(seen[:, None], acc / divisor[:, None], 0.0)
    n = tl.arange(0, V_BLOCK)
    o_rows = o + b * T * H * V + head * V + t[:, None] * (H * V) + n[None, :]
    tl.store(o_rows, result.to(o.dtype.element_ty), mask=(t < T)[:, None] & (n < V)[None, :])
    # The natural logarithm: m and log2 are in powers of two.
    log_sum = tl.where(seen, (m + tl.log2(divisor)) * 0.6931471805599453, float("-inf"))
    tl.store(lse + (b * T + t) * H + head, log_sum, mask=t < T)


def forward(case: Case, operands: Operands) -> Any:
    """((o, lse), plan): plan holds the document bounds, the list of retained keys and the survey of the cache."""
    plan = make_plan(case, operands)
    tiles = tiles_for(case, "forward")
    outputs = (
        jax.ShapeDtypeStruct((case.B, case.T, case.H, case.V), operands.v.dtype),
        jax.ShapeDtypeStruct((case.B, case.T, case.H), jnp.float32),
    )
    result = triton_call(
        _forward_kernel,
        operands.q,
        operands.k,
        operands.v,
        *plan_arguments(operands, plan),
        case.T,
        case.U,
        window_of(case),
        out_shape=outputs,
        grid=(-(-case.T // tiles.queries), case.B * case.H),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **options(case, tiles),
    )
    return result, plan


def make_plan(case: Case, operands: Operands) -> dict[str, Any]:
    """What the passes must know of the data: {"bounds", "retained", "survey"}, each None where it has no use."""
    bounds = document_bounds(operands.segment_ids) if case.segment_ids else None
    begin = bounds.begin if bounds is not None else None
    kept = retained(operands.expiry, window_of(case), begin) if case.expiry and window_of(case) < case.U else None
    cache = survey(operands.columns, window_of(case), case.U, begin) if operands.columns is not None else None
    return {"bounds": bounds, "retained": kept, "survey": cache}


def plan_arguments(operands: Operands, plan: dict[str, Any]) -> tuple[Any, ...]:
    """The kernels' arguments from begin to cache_survey, in their order."""
    kept = plan["retained"] or Retained(None, None, None, None)  # type: ignore[arg-type]
    columns = operands.columns if operands.columns is not None else (None,) * 4
    begin = plan["bounds"].begin if plan["bounds"] is not None else None
    return begin, *kept, *columns, plan["survey"]


def window_of(case: Case) -> int:
    """The window, or a number beyond every distance."""
    return 2**30 if case.window is None else min(case.window, 2**30)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tile sizes and launch options of one pass."""

    queries: int
    keys: int
    warps: int
    stages: int


# (pass, padded head size) -> tiles for 16-bit numbers; the rows were measured on an H200.
TILES = {
    ("forward", 64): Tiles(128, 64, 4, 3),
    ("forward", 128): Tiles(128, 64, 8, 3),
    ("forward", 256): Tiles(64, 64, 4, 2),
    ("dq", 64): Tiles(128, 64, 8, 3),
    ("dq", 128): Tiles(64, 64, 4, 2),
    ("dq", 256): Tiles(64, 32, 4, 1),
    ("dkv", 64): Tiles(64, 128, 8, 2),
    ("dkv", 128): Tiles(64, 64, 8, 2),
    ("dkv", 256): Tiles(32, 64, 8, 1),
}


def block(size: int) -> int:
    """A head size, padded to a tile: a power of two, at least 16."""
    return max(16, 1 << (size - 1).bit_length())


def tiles_for(case: Case, name: str) -> Tiles:
    """The tiles of a pass ("forward", "dq" or "dkv")."""
    size = max(64, block(case.N), block(case.V))
    tiles = TILES[name, size]
    if case.dtype != "float32":
        return tiles
    # Exact float32 products run on the plain multipliers, from registers: small tiles.
    return Tiles(32, 32, 4 if size < 256 else 8, 1)


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
        "RETAINED": case.expiry and window_of(case) < case.U,
        "QUERIES": tiles.queries,
        "KEYS": tiles.keys,
        "N_BLOCK": block(case.N),
        "V_BLOCK": block(case.V),
        "PRECISION": "ieee" if case.dtype == "float32" else "tf32",
    }


def check(case: Any) -> None:
    """Raises UnsupportedCase where these kernels do not run the case."""
    check_installed("window_attention")
    if max(case.N, case.V) > 256:
        raise UnsupportedCase(
            f"window_attention: head sizes N={case.N}, V={case.V}; implementation='triton' takes at most 256; use 'xla'"
        )
    if case.scale <= 0:
        raise UnsupportedCase(
            f"window_attention: scale={case.scale}; implementation='triton' needs a positive one; negate q instead"
        )
    if isinstance(case, Case):
        rows = max(case.T * case.H, case.U * case.K, case.C * case.K) * max(case.N, case.V)
        if rows >= 2**31:
            raise UnsupportedCase(
                f"window_attention: one row of the batch holds {rows} numbers; implementation='triton' counts them in "
                "32 bits; shard the heads or take the sequence in chunks"
            )
    else:
        from pallas_kernels.window_attention.triton_step import check_step

        check_step(case)


def backward(*arguments: Any) -> Any:
    """See ``triton_bwd.backward``."""
    from pallas_kernels.window_attention.triton_bwd import backward as run

    return run(*arguments)


def step(*arguments: Any) -> jax.Array:
    """See ``triton_step.step``."""
    from pallas_kernels.window_attention.triton_step import step as run

    return run(*arguments)
