"""Window attention with retained columns in triton.language: the forward pass.

A program owns a tile of queries of one head and streams its keys (``triton_tiles``) past it with an online softmax.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.arguments import Arguments
from pallas_kernels.tiles import capability
from pallas_kernels.triton_call import check_installed, jit, tl, triton_call
from pallas_kernels.window_attention import triton_bwd, triton_step, triton_update
from pallas_kernels.window_attention.api import Case, Operands
from pallas_kernels.window_attention.triton_plan import make_plan, plan_arguments
from pallas_kernels.window_attention.triton_tiles import (
    FAR,
    LANES,
    LN_2,
    launch,
    load_rows,
    own_tile,
    query_begins,
    spacious,
    stream,
)

FOLD_VMAP = True
backward = triton_bwd.backward
step = triton_step.step
update_step = triton_update.update_step


@jit
def _forward_kernel(
    q, k, v,
    begin, counts, index, expiry, never, cache_k, cache_v, cache_position, cache_expiry, cache_survey,
    T, U, window, together, o, lse,
    H: tl.constexpr, K: tl.constexpr, N: tl.constexpr, V: tl.constexpr, C: tl.constexpr, SCALE: tl.constexpr,
    SEGMENTS: tl.constexpr, RETAINED: tl.constexpr, EVEN: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    N_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Programs with the most keys first: the first queries see the fewest.
    tile, row = own_tile(together)
    tile = tl.cdiv(T, QUERIES) - 1 - tile
    b = (row // H).to(tl.int64)
    head = row % H
    h = head // (H // K)
    t = tile * QUERIES + tl.arange(0, QUERIES)
    i = U - T + t
    i_first = U - T + tile * QUERIES
    i_last = tl.minimum(i_first + QUERIES, U) - 1
    q_tile = load_rows(q + b * T * H * N + head * N, t, H * N, t < T, N, N_BLOCK, True)
    begins, begin_low, begin_high = query_begins(begin + b * U, i, U, SEGMENTS)
    acc = tl.zeros((QUERIES, V_BLOCK), tl.float32)
    m = tl.full((QUERIES,), -1e30, tl.float32)
    l = tl.zeros((QUERIES, LANES), tl.float32)
    acc, m, l = stream(
        q_tile, q_tile, acc, m, l, i, begins, begin_low, begin_high, i_first, i_last, b, h,
        k, v, counts, index, expiry, never, cache_k, cache_v, cache_position, cache_expiry, cache_survey, U, window,
        K, N, V, C, SCALE, SEGMENTS, RETAINED, EVEN, KEYS, N_BLOCK, V_BLOCK, PRECISION, False,
    )  # fmt: skip
    l = tl.sum(l, 1)
    if SEGMENTS:
        l = tl.where(begins < FAR, l, 0.0)
    seen = l > 0
    divisor = tl.where(seen, l, 1.0)
    result = tl.where(seen[:, None], acc / divisor[:, None], 0.0)
    n = tl.arange(0, V_BLOCK)
    o_rows = o + b * T * H * V + head * V + t[:, None] * (H * V) + n[None, :]
    tl.store(o_rows, result.to(o.dtype.element_ty), mask=(t < T)[:, None] & (n < V)[None, :])
    # The natural logarithm: m and log2 are in powers of two.
    log_sum = tl.where(seen, (m + tl.log2(divisor)) * LN_2, float("-inf"))
    tl.store(lse + (b * T + t) * H + head, log_sum, mask=t < T)


def forward(case: Case, operands: Operands) -> Any:
    """((o, lse), plan): plan holds the document bounds, the list of retained keys and the survey of the cache."""
    plan = make_plan(case, operands)
    together, launched = launch(case, "forward", case.T)
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
        case.width,
        together,
        out_shape=outputs,
        **launched,
    )
    return result, plan


def check(case: Any) -> None:
    """Raises UnsupportedCase where these kernels do not run the case."""
    check_installed("window_attention")
    require = Arguments("window_attention: triton").require
    require(capability() >= 80, f"compute capability {capability() / 10}; it must be 8.0 at least: use 'xla'")
    require(max(case.N, case.V) <= 256, f"head sizes N={case.N}, V={case.V}; both must be at most 256: use 'xla'")
    require(case.scale > 0, f"scale={case.scale}; it must be positive: negate q instead")
    if isinstance(case, Case):
        require(
            case.dtype != "float32" or (max(case.N, case.V) <= 64 and (capability() == 80 or spacious())),
            f"float32 with head sizes N={case.N}, V={case.V} on {capability() / 10}; its products fit into the shared "
            "memory of capability 8.0 and 9.0 to 11 up to 64: use bfloat16, float16 or 'xla'",
        )
        rows = max(case.T * case.H, case.U * case.K, case.C * case.K) * max(case.N, case.V)
        require(
            rows < 2**31,
            f"one row of the batch holds {rows} numbers, which are counted in 32 bits: shard the heads or take the "
            "sequence in chunks",
        )
    else:
        triton_step.check_step(case)
