"""Which tokens stay beyond the window: the rules that rank them, and the store of M slots that they compete for.

Everything here follows one order and one rule, per document and KV head:

* order: score descending, then position ascending; a score of 0 or less is no candidate, sinks have the score +inf;
* a token that leaves the window takes a free slot, or the slot of the last in that order if its own score is strictly
  greater, or is dropped. So the store holds the best M of all candidates that have left the window.

``enter_store`` in ``pallas_kernels.window_attention.xla_update`` is that rule for one token.
:func:`best_of_document` is its outcome at the end of each document, and :func:`successors` its whole history at once:
for every token the one that takes its slot. The latter needs no loop over tokens. With rho_s the rank of token s, the
worst rank in the store after token p is a running order statistic,

    theta_p = the M-th smallest of { rho_s : s <= p, same document },

it only falls along a document, and s stays while rho_s <= theta_p. All theta come out of one wavelet matrix
(log2(U) rounds over the bits of the ranks), and a binary search over p finds where each token goes.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from lte_jax.dims import Keys, Scores, Values
from pallas_kernels.window_attention.api import NEVER

RULES = ("learned", "recency", "random", "write_strength")


class Store(NamedTuple):
    """The retained tokens of B documents: slots fill in order, empty ones have position -1 and score -inf."""

    k: Float[Array, "B M K N"]
    v: Float[Array, "B M K N"]
    position: Int32[Array, "B M K"]
    score: Float32[Array, "B M K"]


def empty_store(batch: int, budget: int, heads: int, size: int, dtype) -> Store:
    slots = (batch, budget, heads)
    return Store(
        k=jnp.zeros((*slots, size), dtype),
        v=jnp.zeros((*slots, size), dtype),
        position=jnp.full(slots, -1, jnp.int32),
        score=jnp.full(slots, -jnp.inf, jnp.float32),
    )


def recency_scores(positions: Int32[Array, "B T"], heads: int) -> Scores:
    """Position + 1: the latest stay. Exact below 2^24 tokens."""
    return jnp.broadcast_to((positions + 1).astype(jnp.float32)[..., None], (*positions.shape, heads))


def random_scores(positions: Int32[Array, "B T"], heads: int, seed: int) -> Scores:
    """A hash of (seed, head, position), uniform in (0, 1]: the best M are a uniform sample, the same in every run."""
    head = jnp.arange(heads, dtype=jnp.uint32)
    x = positions.astype(jnp.uint32)[..., None] * jnp.uint32(0x9E3779B1) + _mix(
        head * jnp.uint32(0x85EBCA77) + jnp.uint32(seed % 2**32)
    )
    return ((_mix(x) >> 8) + 1).astype(jnp.float32) * jnp.float32(2.0**-24)


def _mix(x: Array) -> Array:
    """The finaliser of MurmurHash3: every input bit changes every output bit with probability near 1/2."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def ranked(
    scores: Scores, positions: Int32[Array, "B T"], sinks: int, real: Bool[Array, "B T"] | None = None
) -> Float32[Array, "B T K"]:
    """Scores as the order reads them: +inf for sinks, -inf for padding and for tokens that are no candidates."""
    sink = positions < sinks
    if real is not None:
        sink &= real
        scores = jnp.where(real[..., None], scores, -jnp.inf)
    return jnp.where(sink[..., None], jnp.inf, jnp.where(scores > 0, scores, -jnp.inf))


def best_of_document(
    scores: Float32[Array, "B T K"], budget: int, bounds: tuple[Array, Array] | None = None
) -> Bool[Array, "B T K"]:
    """The best M candidates of each document: what the store holds once they have all gone through it.

    Args:
      scores: as :func:`ranked` gives them; -inf for what is no candidate (or has not left the window).
      bounds: of the documents, from ``document_bounds``; None for one document.
    """
    scores = scores.swapaxes(1, 2)
    batch, heads, tokens = scores.shape
    if bounds is None:
        return _best_of_row(scores, budget).swapaxes(1, 2)
    start = jnp.broadcast_to(bounds[0][:, None], scores.shape)
    own = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), scores.shape)
    start, negative, index = jax.lax.sort((start, -scores, own), dimension=-1, num_keys=2, is_stable=True)
    # Documents are contiguous, so sorting by their starts leaves each one in its own stretch of the row.
    keep = (jnp.arange(tokens, dtype=jnp.int32) - start < budget) & (negative < jnp.inf)
    rows, columns = _grid(batch, heads)
    kept = jnp.zeros(scores.shape, bool).at[rows, columns, index].set(keep, unique_indices=True)
    return kept.swapaxes(1, 2)


def _best_of_row(scores: Float32[Array, "B K T"], budget: int) -> Bool[Array, "B K T"]:
    """The best M candidates of each row, by counting instead of sorting (measured: experiments/results/router.md).

    Positive floats are ordered as their bits are. From the highest bits down, a few at a time, the M-th best is found
    as the largest number that at least M candidates reach; equals of it are taken in the order of their positions.
    """
    key = jnp.where(scores > 0, jax.lax.bitcast_convert_type(scores, jnp.int32), 0)
    width = 4 if scores.size <= 2**20 else 2  # bits at a time: fewer passes over little, less arithmetic over much
    lowest, bit = jnp.zeros_like(key, shape=key.shape[:2]), 31
    while bit:
        taken = min(width, bit)
        bit -= taken
        digits = lowest[..., None] + (jnp.arange(1, 2**taken, dtype=jnp.int32) << bit)
        reached = jnp.sum(key[..., None, :] >= digits[..., None], axis=-1, dtype=jnp.int32) >= budget
        lowest += jnp.sum(reached, axis=-1, dtype=jnp.int32) << bit
    above, equal = key > lowest[..., None], (key == lowest[..., None]) & (key > 0)
    room = budget - jnp.sum(above, axis=-1, keepdims=True, dtype=jnp.int32)
    # Without the barrier XLA's simplifier aborts the process where a row is constant, as in a prompt within the window.
    among = jnp.cumsum(jax.lax.optimization_barrier(equal), axis=-1, dtype=jnp.int32)
    return above | (equal & (among <= room))


def successors(
    scores: Float32[Array, "B U K"],
    positions: Int32[Array, "B U K"],
    budget: int,
    bounds: tuple[Array, Array] | None = None,
) -> Int32[Array, "B U K"]:
    """For every token of a sequence that passes through the store, the index of the token that takes its slot.

    Its own index where it never gets a slot, and U where none takes it away.

    Args:
      scores: as :func:`ranked` gives them, in the order in which the tokens leave the window. The sequence may begin
        with what a store already holds, in any order.
      positions: break ties.
      bounds: [B,U] each, of documents that have a store of their own; None for one document.
    """
    scores, positions = scores.swapaxes(1, 2), positions.swapaxes(1, 2)
    batch, heads, count = scores.shape
    rows, columns = _grid(batch, heads)
    index = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), scores.shape)
    start = jnp.zeros_like(index) if bounds is None else jnp.broadcast_to(bounds[0][:, None], scores.shape)
    end = jnp.full_like(index, count) if bounds is None else jnp.broadcast_to(bounds[1][:, None], scores.shape)

    order = jax.lax.sort((-scores, positions, index), dimension=-1, num_keys=2, is_stable=True)[2]
    rank = jnp.zeros_like(index).at[rows, columns, order].set(index, unique_indices=True)
    worst = _order_statistics(rank, start, index + 1, budget - 1)

    # The first p in [own index, end) with worst[p] < rank: worst only falls along a document.
    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) // 2
        gone = jnp.take_along_axis(worst, jnp.minimum(middle, count - 1), axis=-1) < rank
        inside = low < high
        return jnp.where(inside & ~gone, middle + 1, low), jnp.where(inside & gone, middle, high)

    low, _ = jax.lax.fori_loop(0, count.bit_length(), halve, (index, end))
    taken = jnp.where(low < end, low, count)
    return jnp.where(scores > -jnp.inf, taken, index).swapaxes(1, 2)


def _order_statistics(
    values: Int32[Array, "B K U"], begin: Int32[Array, "B K U"], end: Int32[Array, "B K U"], nth: int
) -> Int32[Array, "B K U"]:
    """The nth smallest (from 0) of values[begin:end], for U ranges at once; U where the range is shorter.

    ``values`` are a permutation of 0 .. U-1. A wavelet matrix: bit by bit from the top, the sequence is split stably
    into those with a 0 and those with a 1, and each range is followed into the half that holds its nth smallest.
    """
    batch, heads, count = values.shape
    rows, columns = _grid(batch, heads)
    enough = end - begin > nth
    index = jnp.arange(count, dtype=jnp.int32)
    bits = max(count - 1, 1).bit_length()

    def descend(level: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        values, begin, end, remaining, found = state
        bit = bits - 1 - level
        zero = (values >> bit) & 1 == 0
        inclusive = jnp.cumsum(zero, axis=-1, dtype=jnp.int32)
        zeros_before = jnp.pad(inclusive, ((0, 0), (0, 0), (1, 0)))
        total = inclusive[..., -1:]
        begin_zero = jnp.take_along_axis(zeros_before, begin, axis=-1)
        end_zero = jnp.take_along_axis(zeros_before, end, axis=-1)
        zeros = end_zero - begin_zero
        left = remaining < zeros
        begin = jnp.where(left, begin_zero, total + begin - begin_zero)
        end = jnp.where(left, end_zero, total + end - end_zero)
        remaining = jnp.where(left, remaining, remaining - zeros)
        found = jnp.where(left, found, found | (1 << bit))
        place = jnp.where(zero, inclusive - 1, total + index - inclusive)
        values = jnp.zeros_like(values).at[rows, columns, place].set(values, unique_indices=True)
        return values, begin, end, remaining, found

    start = (values, begin, end, jnp.full_like(values, nth), jnp.zeros_like(values))
    found = jax.lax.fori_loop(0, bits, descend, start)[-1]
    return jnp.where(enough, found, count)


def expiries(successor: Int32[Array, "B U K"], offset: int, ring: int) -> Int32[Array, "B U K"]:
    """From successors to query indices: the successor's own index plus W+1 is when it leaves the window.

    ``offset``: how many entries of the sequence come before index 0 of the keys (the store's slots).
    """
    count = successor.shape[1]
    own = jnp.arange(count, dtype=jnp.int32)[None, :, None]
    leaves = jnp.where(successor == own, 0, successor - offset + ring)
    return jnp.where(successor == count, NEVER, leaves)


def slots_after(
    scores: Float32[Array, "B U K"], successor: Int32[Array, "B U K"], budget: int, until: Int32[Array, "B"]
) -> Int32[Array, "B M K"]:
    """Which token of the sequence each slot holds after those of index < until went through; -1 for an empty slot.

    The sequence begins with the M slots themselves (``successors``), so that slot m unchanged is m. Tokens lie where
    the rule for one token would have put them: an appended token in the next free slot, any other in that of
    its predecessor.
    """
    scores, successor = scores.swapaxes(1, 2), successor.swapaxes(1, 2)
    batch, heads, count = scores.shape
    rows, columns = _grid(batch, heads)
    index = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), scores.shape)
    until = until[:, None, None]
    candidate = scores > -jnp.inf

    replaced = (successor > index) & (successor < count)
    first = index.at[rows, columns, jnp.where(replaced, successor, count)].set(index, mode="drop")
    first = jax.lax.fori_loop(0, count.bit_length(), lambda _, first: jnp.take_along_axis(first, first, axis=-1), first)
    # Where a chain of replacements began: in a slot of the store, or as the n-th candidate, appended to slot n.
    before = jnp.cumsum(candidate, axis=-1, dtype=jnp.int32) - candidate.astype(jnp.int32)
    slot = jnp.where(first < budget, first, jnp.take_along_axis(before, first, axis=-1))

    held = candidate & (index < until) & (successor != index) & (successor >= until)
    slots = jnp.full((batch, heads, budget), -1, jnp.int32)
    return slots.at[rows, columns, jnp.where(held, slot, budget)].set(index, mode="drop").swapaxes(1, 2)


def slots_of_best(kept: Bool[Array, "B T K"], budget: int) -> Int32[Array, "B M K"]:
    """The indices of the kept tokens (at most M per head) in ascending order; -1 for an empty slot."""
    kept = kept.swapaxes(1, 2)
    batch, heads, tokens = kept.shape
    rows, columns = _grid(batch, heads)
    slot = jnp.where(kept, jnp.cumsum(kept, axis=-1, dtype=jnp.int32) - 1, budget)
    slots = jnp.full((batch, heads, budget), -1, jnp.int32)
    index = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), kept.shape)
    return slots.at[rows, columns, slot].set(index, mode="drop").swapaxes(1, 2)


def refill(
    store: Store,
    slots: Int32[Array, "B M K"],
    k: Keys,
    v: Values,
    position: Int32[Array, "B U"],
    score: Float32[Array, "B U K"],
) -> Store:
    """The store whose slot m holds token slots[m] - M of k, v [B,U,K,N], or what it held where slots[m] = m."""
    budget = store.position.shape[1]
    fresh = slots >= budget
    index = jnp.maximum(slots - budget, 0)

    def take(old: Array, new: Array) -> Array:
        if new.ndim == 4:
            return jnp.where(fresh[..., None], jnp.take_along_axis(new, index[..., None], axis=1), old)
        return jnp.where(fresh, jnp.take_along_axis(new, index, axis=1), old)

    position = jnp.broadcast_to(position[..., None], score.shape)
    return Store(take(store.k, k), take(store.v, v), take(store.position, position), take(store.score, score))


def _grid(batch: int, heads: int) -> tuple[Array, Array]:
    return jnp.arange(batch)[:, None, None], jnp.arange(heads)[None, :, None]
