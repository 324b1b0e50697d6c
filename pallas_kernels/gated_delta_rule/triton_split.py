"""Passes the states of a split sequence from segment to segment (``segments`` says what that is) in Triton."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.triton_call import jit, tl, triton_call


@jit
def _dot_in_float32(left, right, into):
    """into + left right to 16 bits, as three products of bfloat16 parts: their range is that of float32."""
    left_high, right_high = left.to(tl.bfloat16), right.to(tl.bfloat16)
    left_low = (left - left_high.to(tl.float32)).to(tl.bfloat16)
    right_low = (right - right_high.to(tl.float32)).to(tl.bfloat16)
    into = tl.dot(left_low, right_high, into)
    into = tl.dot(left_high, right_low, into)
    return tl.dot(left_high, right_high, into)


@jit
def _join(
    first_ptr, ends_ptr, transitions_ptr, starts_ptr,
    SEGMENTS: tl.constexpr, N: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr,
    BACKWARDS: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(1).to(tl.int64)
    n, part = tl.arange(0, N), tl.arange(0, BN)
    columns = tl.program_id(0) * BV + tl.arange(0, BV)
    block = columns[:, None] * N
    state = tl.load(first_ptr + bh * V * N + block + n[None, :])
    for step in range(SEGMENTS):
        segment = SEGMENTS - 1 - step if BACKWARDS else step
        here = starts_ptr + (bh * SEGMENTS + segment) * V * N + block
        tl.store(here + n[None, :], state)
        if step < SEGMENTS - 1:
            tl.debug_barrier()  # the state is read again by other threads than wrote it
            # The arrays of SEGMENTS - 1 leave out the last segment; those of ends backwards, the first.
            end = bh * (SEGMENTS - 1) + segment - (1 if BACKWARDS else 0)
            state = tl.load(ends_ptr + end * V * N + block + n[None, :])
            if not BACKWARDS or step > 0:  # the last segment's end starts from the given state already
                transition = transitions_ptr + (bh * (SEGMENTS - 1) + segment) * N * N
                for at in range(0, N, BN):
                    before = tl.load(here + at + part[None, :])
                    if BACKWARDS:
                        f = tl.load(transition + n[None, :] * N + at + part[:, None])
                    else:
                        f = tl.load(transition + (at + part[:, None]) * N + n[None, :])
                    state = _dot_in_float32(before, f, state)


def join(first: jax.Array | None, ends: jax.Array, transitions: jax.Array, *, backwards: bool) -> jax.Array:
    """The transposed state [B,H,segments,V,N] that each segment starts from: before it, or backwards after it.

    Args:
      first: [B,H,N,V] float32, the state that the first segment (backwards: the last) starts from; None for zeros.
      ends: [B,H,segments-1,V,N] float32. Forward, of all segments but the last from zeros; backwards, of all but the
        first, the last segment's from ``first`` itself.
      transitions: [B,H,segments-1,N,N] float32, of all segments but the last.
    """
    B, H, links, V, N = ends.shape
    first = jnp.zeros((B, H, V, N), jnp.float32) if first is None else first.swapaxes(2, 3)
    return triton_call(
        _join, first, ends, transitions,
        out_shape=jax.ShapeDtypeStruct((B, H, links + 1, V, N), jnp.float32),
        grid=(V // 16, B * H), num_warps=4, num_stages=2,
        SEGMENTS=links + 1, N=N, V=V, BV=16, BN=32, BACKWARDS=backwards,
    )  # fmt: skip
