"""What the Triton kernels of block attention share: the rows of a tile, how rows are loaded, and their constants.

Rows of a tile are (token, query head of the group), so a tile fills the tensor cores for any group size.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from pallas_kernels.block_attention.api import Case
from pallas_kernels.block_attention.blocks import table_size
from pallas_kernels.tiles import power_of_2
from pallas_kernels.triton_call import jit, tl
from pallas_kernels.window_attention.cases import LOG2_E


@jit
def tile_rows(first_token, T, head, TOKENS: tl.constexpr, HEADS: tl.constexpr, G: tl.constexpr):
    """(token, query head, exists) of each row of a tile: HEADS rows per token, the group filled up to a power of 2."""
    row = tl.arange(0, TOKENS * HEADS)
    token = first_token + row // HEADS
    return token, head * G + row % HEADS, (token < T) & (row % HEADS < G)


@jit
def load_heads(base, token, head, exists, H: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    n = tl.arange(0, BLOCK)
    pointer = base + (token * H + head)[:, None] * SIZE + n[None, :]
    return tl.load(pointer, mask=exists[:, None] & (n < SIZE)[None, :], other=0.0)


@jit
def store_heads(base, value, token, head, exists, H: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    n = tl.arange(0, BLOCK)
    pointer = base + (token * H + head)[:, None] * SIZE + n[None, :]
    tl.store(pointer, value.to(base.dtype.element_ty), mask=exists[:, None] & (n < SIZE)[None, :])


@jit
def load_keys(base, token, end, K: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Rows ``token`` of one KV head, to which base points; zero from ``end`` on."""
    n = tl.arange(0, BLOCK)
    pointer = base + token[:, None] * (K * SIZE) + n[None, :]
    return tl.load(pointer, mask=(token < end)[:, None] & (n < SIZE)[None, :], other=0.0)


@jit
def load_gradients(
    q, do, lse, delta, token, head, exists, H: tl.constexpr, N: tl.constexpr, V: tl.constexpr, N_BLOCK: tl.constexpr,
    V_BLOCK: tl.constexpr,
):  # fmt: skip
    """What gradients of keys need of each row of a tile: (query, cotangent, logsumexp, delta)."""
    queries = load_heads(q, token, head, exists, H, N, N_BLOCK)
    cotangent = load_heads(do, token, head, exists, H, V, V_BLOCK)
    log_sum = tl.load(lse + token * H + head, mask=exists, other=0.0)
    return queries, cotangent, log_sum, tl.load(delta + token * H + head, mask=exists, other=0.0)


@jit
def load_piece(
    k, v, first, piece, batch, head, T, K: tl.constexpr, N: tl.constexpr, V: tl.constexpr, S: tl.constexpr,
    N_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr,
):  # fmt: skip
    """The block of a piece (``plan.Readers``): (index of each key, keys, values)."""
    key = tl.load(first + piece) + tl.arange(0, S)
    keys = load_keys(k + (batch * T * K + head) * N, key, T, K, N, N_BLOCK)
    return key, keys, load_keys(v + (batch * T * K + head) * V, key, T, K, V, V_BLOCK)


@jit
def visible_means(position, base, token, T, C, S: tl.constexpr, BLOCKS: tl.constexpr):
    """(first, end) of the table entries that each row sees, and (lowest, highest) for the tile, in steps of BLOCKS."""
    begin = tl.load(base + token, mask=token < T, other=0)
    end = begin + (tl.load(position + token, mask=token < T, other=-1) + 1) // S
    lowest = tl.min(tl.where(end > begin, begin, C), 0) // BLOCKS * BLOCKS
    return begin, end, lowest, tl.max(tl.where(end > begin, end, 0), 0)


def slots(case: Case) -> int:
    """Blocks kept per token: block_counts, or as many as there can be (the complete ones and one under way)."""
    return min(case.block_counts, table_size(case.U, case.block_size) + 1)


ROWS = 64  # of a tile: tokens times the padded group

PIECE_ROWS = 8192  # of a block's list that one program takes: tokens times the padded group
LEAST_PIECE = 512  # tokens

# Up to how many query heads to a KV head blocks gather their tokens in each pass; the most bytes of partial results.
GATHERED_FORWARD = 4
GATHERED_BACKWARD = 64
GATHERED_BYTES = 2**33


def gathers_forward(case: Case) -> bool:
    """Whether blocks gather the tokens that selected them in the forward pass (see ``triton_gather``)."""
    return case.H // case.K <= GATHERED_FORWARD and _parts_bytes(case) <= GATHERED_BYTES and not case.cached


def gathers_backward(case: Case) -> bool:
    """Whether they do in the backward pass."""
    return case.H // case.K <= GATHERED_BACKWARD and _parts_bytes(case) <= GATHERED_BYTES


def _parts_bytes(case: Case) -> int:
    return case.B * case.T * case.H * slots(case) * max(case.N, case.V) * jnp.dtype(case.dtype).itemsize


def piece_size(case: Case) -> int:
    """Tokens of a block's list that one program takes."""
    return max(LEAST_PIECE, PIECE_ROWS // power_of_2(case.H // case.K))


def shared_constants(case: Case, rows: int = ROWS, together: bool = False) -> dict[str, Any]:
    """What every kernel is compiled for; ``together``: for a tile of which each token is a bit (``plan.union``)."""
    group = case.H // case.K
    heads = power_of_2(group)
    # Exact products have no tensor cores: larger tiles spill registers and compile slowly.
    rows = 16 if case.dtype == "float32" else rows
    most = 16 if together else rows
    return dict(
        H=case.H,
        K=case.K,
        G=group,
        N=case.N,
        V=case.V,
        S=case.block_size,
        SCALE=case.scale * LOG2_E,
        TOKENS=max(1, min(most, rows // heads)),
        HEADS=heads,
        N_BLOCK=power_of_2(case.N, 16),
        V_BLOCK=power_of_2(case.V, 16),
        PRECISION="ieee" if case.dtype == "float32" else "tf32",
    )
