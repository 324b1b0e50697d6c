"""Parts that the router's Triton kernels share: how a program walks along the tokens, dropout's words, sizes of tiles.

A tap of a convolution reads a token some places before or after. In registers no row of a tile can reach another one,
so a program does not hold a stretch of tokens. It walks along many stretches at once: lane r, of stretch r // d and
remainder r % d, stands at step n on token

    first + (r // d) STEPS d + n d + r % d            d the dilation

so that what lies one tap away is what the same lane had, or will have, one step before or after. Each input is read
once, and each word of dropout drawn once. A lane begins some steps before its stretch and ends some after it.
"""

from __future__ import annotations

import dataclasses

from pallas_kernels.router.api import Case
from pallas_kernels.router.dropout import FIRST as _FIRST
from pallas_kernels.router.dropout import SECOND as _SECOND
from pallas_kernels.router.dropout import STEP as _STEP
from pallas_kernels.tiles import ceil_div
from pallas_kernels.triton_call import jit, tl

if tl is not None:
    FIRST, SECOND, STEP = tl.constexpr(_FIRST), tl.constexpr(_SECOND), tl.constexpr(_STEP)

LANES = 64  # rows of the tensor cores' smallest product
PROGRAMS = 256  # that fill the GPU: two on each multiprocessor
LONGEST = 64  # steps


@dataclasses.dataclass(frozen=True)
class Walk:
    """How tokens are shared out: ``steps`` of each lane, ``chunks`` of a row, each a program's."""

    steps: int
    chunks: int


def walk(case: Case, blocks: int = 1) -> Walk:
    """The longest walks that still fill the GPU: the steps beyond a stretch's ends are fewer for each token then.

    ``blocks``: programs that share a chunk's tokens.
    """
    dilation = case.dilations[0]
    lanes = LANES // dilation * dilation
    steps = LONGEST
    while steps > 1 and case.B * case.K * blocks * ceil_div(case.T, lanes * steps) < PROGRAMS:
        steps //= 2
    return Walk(steps, ceil_div(case.T, lanes * steps))


@jit
def lane_tokens(chunk, STEPS: tl.constexpr, DILATION: tl.constexpr, LANES: tl.constexpr):
    """The token of each lane at step 0; far beyond any row for lanes that the dilation leaves over."""
    stretches: tl.constexpr = LANES // DILATION
    lane = tl.arange(0, LANES)
    stretch = lane // DILATION
    t = (chunk * stretches + stretch) * STEPS * DILATION + lane % DILATION
    return tl.where(stretch < stretches, t, 2**30)


@jit
def documents(segments, t, T, SEGMENTS: tl.constexpr):
    """The document of each token, 0 for padding and outside of the row."""
    inside = (t >= 0) & (t < T)
    if SEGMENTS:
        return tl.load(segments + t, mask=inside, other=0)
    return inside.to(tl.int32)


@jit
def dropout_words(
    seeds, LAYER: tl.constexpr, b, t, h, c, tokens, heads, HALF: tl.constexpr,
):  # fmt: skip
    """[tokens, c] words of ``dropout.py``."""
    row = ((b * tokens + t) * heads + h).to(tl.uint32)
    start = row * ((HALF * STEP) & 0xFFFFFFFF) + tl.load(seeds + 2 * LAYER)
    x = start[:, None] + (c.to(tl.uint32) * STEP)[None, :]
    x = (x ^ (x >> 16)) * FIRST
    x = (x ^ (x >> 13) ^ tl.load(seeds + 2 * LAYER + 1)) * SECOND
    return x ^ (x >> 16)


@jit
def kept(
    seeds, LAYER: tl.constexpr, b, t, h, c, tokens, heads, THRESHOLD: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """[tokens, c]: which of a convolution's CHANNELS of input stay."""
    half: tl.constexpr = CHANNELS // 2
    words = dropout_words(seeds, LAYER, b, t, h, c % half, tokens, heads, half)
    return ((words >> (c // half * 16).to(tl.uint32)[None, :]) & 0xFFFF) >= THRESHOLD


@jit
def load_tile(base, rows, stride, c, real):
    return tl.load(base + rows[:, None] * stride + c[None, :], mask=real[:, None], other=0.0)


@jit
def load_taps(weight, rows, columns, stride, TAP: tl.constexpr):
    """The [rows, columns] block of each of three taps, ``TAP`` elements apart."""
    block = weight + rows[:, None] * stride + columns[None, :]
    return tl.load(block), tl.load(block + TAP), tl.load(block + 2 * TAP)


@jit
def fresh(x, new, SEGMENTS: tl.constexpr):
    """Zeros in the lanes where a document ended between two steps."""
    if SEGMENTS:
        return tl.where(new[:, None], 0.0, x)
    return x


def options(case: Case) -> dict[str, object]:
    """Constexprs that all kernels take."""
    return {
        "K": case.K,
        "LANES": LANES,
        "DILATION": case.dilations[0],
        "SHARED": case.heads == 1,
        "THRESHOLD": case.threshold,
        "SCALE": case.scale,
        "SEGMENTS": case.segment_ids,
        "PRECISION": "tf32x3" if case.dtype == "float32" else "tf32",
    }
