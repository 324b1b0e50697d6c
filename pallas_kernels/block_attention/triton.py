"""Block attention in triton.language: the forward pass and the cached form.

Two kernels: ``triton_select`` has the first one. The second reads, for a tile of query tokens with all heads of one KV
head, each block that any of its tokens selected once, and masks the tokens that did not; where few heads read a KV
head, ``triton_gather`` does it block by block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from pallas_kernels.arguments import Arguments
from pallas_kernels.batching import fold_batch
from pallas_kernels.block_attention.api import Case
from pallas_kernels.block_attention.blocks import Layout, plain_layout, pool
from pallas_kernels.block_attention.plan import Readers, Union, readers, union
from pallas_kernels.block_attention.triton_gather import gathered
from pallas_kernels.block_attention.triton_select import finish, online, select
from pallas_kernels.block_attention.triton_tiles import (
    gathers_forward,
    load_heads,
    load_keys,
    piece_size,
    shared_constants,
    slots,
    tile_rows,
)
from pallas_kernels.triton_call import check_installed, jit, tl, triton_call

# The compressed branch, its logsumexp and the selected blocks: ``triton_select.select``, or another form of it.
Select = Callable[[Any, Array, Array, Array, Layout], tuple[Array, Float32[Array, "B T H"], Int32[Array, "B T K M"]]]


class Residuals(NamedTuple):
    """lse: base 2, 0 where nothing is seen."""

    indices: Int32[Array, "B T K M"]
    lse_compressed: Float32[Array, "B T H"]
    lse_selected: Float32[Array, "B T H"]
    together: Union | None
    """None where the forward pass had no need of it."""
    lists: Readers | None
    """None where the forward pass had no need of them."""


@jit
def _selected_kernel(
    q, k, v, start, position, first, bits, count, T, U, L, o, lse, H: tl.constexpr, K: tl.constexpr, G: tl.constexpr,
    N: tl.constexpr, V: tl.constexpr, S: tl.constexpr, SCALE: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
    N_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    # The last tiles first: they have the most blocks to read.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    entry = (batch * K + head) * tl.num_programs(0) + tile
    first += entry * L
    bits += entry * L
    q += batch * T * (H * N)
    o += batch * T * (H * V)
    lse += batch * T * H
    k += (batch * U * K + head) * N
    v += (batch * U * K + head) * V

    token, query_head, exists = tile_rows(tile * TOKENS, T, head, TOKENS, HEADS, G)
    index = tl.load(start + batch * T + token, mask=token < T, other=0)
    index += tl.load(position + batch * T + token, mask=token < T, other=-1)
    queries = load_heads(q, token, query_head, exists, H, N, N_BLOCK)
    bit = token - tile * TOKENS

    acc = tl.zeros([TOKENS * HEADS, V_BLOCK], tl.float32)
    m = tl.full([TOKENS * HEADS], -1e30, tl.float32)
    l = tl.zeros([TOKENS * HEADS], tl.float32)
    for i in range(tl.load(count + entry)):
        key = tl.load(first + i) + tl.arange(0, S)
        member = (tl.load(bits + i) >> bit) & 1
        keys = load_keys(k, key, U, K, N, N_BLOCK)
        values = load_keys(v, key, U, K, V, V_BLOCK)
        mask = (member != 0)[:, None] & (key[None, :] <= index[:, None])
        acc, m, l = online(queries, keys, values, mask, acc, m, l, SCALE, PRECISION)
    finish(o, lse, acc, m, l, token, query_head, exists, H, V, V_BLOCK)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Warps and stages."""

    warps: int = 4
    stages: int = 3


TILES = Tiles()


def check(case: Case) -> None:
    """Raises UnsupportedCase where these kernels do not run the case."""
    check_installed("block_attention")
    fix = "use implementation='xla'"
    check = Arguments("block_attention: triton")
    require = check.require
    check.choice("block_size", case.block_size, (16, 32, 64), fix)
    group = case.H // case.K
    require(group <= 64, f"{group} query heads per KV head; there must be at most 64: {fix}")
    require(max(case.N, case.V) <= 128, f"head sizes N={case.N}, V={case.V}; both must be at most 128: {fix}")
    require(slots(case) <= 32, f"block_counts={case.block_counts}; it must be at most 32: {fix}")
    numbers = max(case.T * case.H, case.U * case.K) * max(case.N, case.V)
    require(numbers < 2**31, f"one row of the batch holds {numbers} numbers, which are counted in 32 bits: {fix}")


def forward(
    case: Case, q: Array, k: Array, v: Array, layout: Layout | None, select: Select = select
) -> tuple[tuple[Array, Array], Residuals]:
    """See ``api``."""
    return fold_batch(_forward, ("case", "select"))(q, k, v, layout, case=case, select=select)


def attend(
    case: Case,
    q: Array,
    k: Array,
    v: Array,
    pooled_k: Array,
    pooled_v: Array,
    position: Int32[Array, "B T"],
    select: Select = select,
) -> tuple[Array, Array]:
    """See ``api``."""
    return fold_batch(_attend, ("case", "select"))(q, k, v, pooled_k, pooled_v, position, case=case, select=select)


def backward(*arguments: Any) -> Any:
    """See ``triton_bwd.backward``."""
    from pallas_kernels.block_attention.triton_bwd import backward as run

    return run(*arguments)


def step(*arguments: Any) -> Any:
    """See ``triton_step.step``."""
    from pallas_kernels.block_attention.triton_step import step as run

    return run(*arguments)


def _forward(q: Array, k: Array, v: Array, layout: Layout | None, *, case: Case, select: Select) -> Any:
    case = dataclasses.replace(case, B=q.shape[0])
    pooled_k, pooled_v = pool(k, layout, case.block_size), pool(v, layout, case.block_size)
    return _both(case, q, k, v, pooled_k, pooled_v, layout or plain_layout(case.B, case.T, case.block_size), select)


def _attend(
    q: Array, k: Array, v: Array, pooled_k: Array, pooled_v: Array, position: Array, *, case: Case, select: Select
) -> tuple[Array, Array]:
    case = dataclasses.replace(case, B=q.shape[0])
    zero = jnp.zeros_like(position)
    layout = Layout(zero, position, zero, jnp.zeros((case.B, 1), jnp.int32))
    return _both(case, q, k, v, pooled_k, pooled_v, layout, select)[0]


def _both(
    case: Case, q: Array, k: Array, v: Array, pooled_k: Array, pooled_v: Array, layout: Layout, select: Select
) -> tuple[tuple[Array, Array], Residuals]:
    o_c, lse_c, indices = select(case, q, pooled_k, pooled_v, layout)
    if gathers_forward(case):
        lists = readers(indices, layout, case.block_size, case.segment_ids, piece_size(case))
        o_s, lse_s = gathered(case, q, k, v, indices, lists)
        return (o_c, o_s), Residuals(indices, lse_c, lse_s, None, lists)
    together = plan_union(case, indices, layout)
    o_s, lse_s = selected(case, q, k, v, layout, together)
    return (o_c, o_s), Residuals(indices, lse_c, lse_s, together, None)


def plan_union(case: Case, indices: Array, layout: Layout) -> Union:
    return union(indices, layout, case.block_size, shared_constants(case, together=True)["TOKENS"])


def selected(
    case: Case, q: Array, k: Array, v: Array, layout: Layout, together: Union
) -> tuple[Array, Float32[Array, "B T H"]]:
    """The selected branch and its logsumexp."""
    return triton_call(
        _selected_kernel,
        *(q, k, v, layout.start, layout.position, together.first, together.bits, together.size),
        *(case.T, case.U, together.first.shape[-1]),
        out_shape=(
            jax.ShapeDtypeStruct((case.B, case.T, case.H, case.V), q.dtype),
            jax.ShapeDtypeStruct((case.B, case.T, case.H), jnp.float32),
        ),
        grid=(together.size.shape[-1], case.K, case.B),
        num_warps=TILES.warps,
        num_stages=TILES.stages,
        **shared_constants(case, together=True),
    )
