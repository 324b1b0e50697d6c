"""Does the store keep what a plain ring buffer would, token by token, however it is computed?"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lte_jax.mixers import lte_store
from pallas_kernels import documents
from pallas_kernels.window_attention.xla_update import enter_store

BATCH, HEADS, SIZE = 2, 3, 2
# Whole functions, as compiling their operations one by one takes longer.
successors = jax.jit(lte_store.successors, static_argnums=2)
slots_after = jax.jit(lte_store.slots_after, static_argnums=2)
best_of_document = jax.jit(lte_store.best_of_document, static_argnums=1)
slots_of_best = jax.jit(lte_store.slots_of_best, static_argnums=1)
document_bounds = jax.jit(documents.document_bounds)
ranked = jax.jit(lte_store.ranked, static_argnums=2)


class PlainStore:
    """One document and head in plain Python: append, or replace the last in order if strictly greater.

    ``slots`` holds (score, index) in the order of the slots; ``replaced[index]`` is the index that took its slot.
    """

    def __init__(self, budget):
        self.budget, self.slots, self.replaced = budget, [], {}

    def offer(self, score, index):
        self.replaced[index] = index
        if score == -np.inf:
            return
        if len(self.slots) < self.budget:
            self.slots.append((score, index))
        else:
            last = min(range(self.budget), key=lambda m: (self.slots[m][0], -self.slots[m][1]))
            if not score > self.slots[last][0]:
                return
            self.replaced[self.slots[last][1]] = index
            self.slots[last] = (score, index)
        self.replaced[index] = None


def draw(seed, tokens, ties):
    """Scores as ``ranked`` gives them: some no candidates, two sinks per row, and with ``ties`` few distinct values."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(-2, 4, (BATCH, tokens, HEADS)) if ties else rng.normal(size=(BATCH, tokens, HEADS)) + 0.3
    positions = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), (BATCH, tokens))
    return ranked(jnp.asarray(raw, jnp.float32), positions, 2), positions


def spread(positions):
    return jnp.broadcast_to(positions[..., None], (*positions.shape, HEADS))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("budget", [3, 7, 40])
def test_successors_are_the_plain_store_s_history(budget, ties):
    scores, positions = map(np.asarray, draw(budget, 37, ties))
    successor = np.asarray(successors(scores, spread(positions), budget))
    for b in range(BATCH):
        for h in range(HEADS):
            plain = PlainStore(budget)
            for t in range(37):
                plain.offer(float(scores[b, t, h]), t)
            expected = [37 if plain.replaced[t] is None else plain.replaced[t] for t in range(37)]
            np.testing.assert_array_equal(successor[b, :, h], expected)


@functools.cache
def one_step():
    return jax.jit(lambda store, *token: lte_store.Store(*enter_store(tuple(store), *token)))


@pytest.mark.parametrize("ties", [False, True])
def test_one_step_fills_the_plain_store_s_slots(ties):
    tokens, budget = 41, 5
    scores, positions = map(np.asarray, draw(3, tokens, ties))
    content = np.asarray(jax.random.normal(jax.random.key(0), (BATCH, tokens, HEADS, SIZE)))
    step = one_step()
    store = lte_store.empty_store(BATCH, budget, HEADS, SIZE, jnp.float32)
    plain = [[PlainStore(budget) for _ in range(HEADS)] for _ in range(BATCH)]
    for t in range(tokens):
        store = step(store, content[:, t], -content[:, t], positions[:, t], scores[:, t])
        for b in range(BATCH):
            for h in range(HEADS):
                plain[b][h].offer(float(scores[b, t, h]), t)
                expected = [index for _, index in plain[b][h].slots] + [-1] * (budget - len(plain[b][h].slots))
                np.testing.assert_array_equal(store.position[b, :, h], expected)
    held = np.asarray(store.position)
    assert (held >= 0).all()
    expected = np.take_along_axis(np.asarray(content), held[..., None], axis=1)
    np.testing.assert_array_equal(store.k, expected)
    np.testing.assert_array_equal(store.v, -expected)
    np.testing.assert_array_equal(store.score, np.take_along_axis(np.asarray(scores), held, axis=1))


@pytest.mark.rotating
@pytest.mark.parametrize("ties", [False, True])
def test_pieces_of_any_length_fill_the_same_slots_as_steps(ties):
    tokens, budget = 41, 5
    scores, positions = map(np.asarray, draw(4, tokens, ties))
    content = np.asarray(jax.random.normal(jax.random.key(1), (BATCH, tokens, HEADS, SIZE)))

    @jax.jit
    def piece(store, k, v, positions, scores):
        ranks = jnp.concatenate([store.score, scores], axis=1)
        where = jnp.concatenate([store.position, spread(positions)], axis=1)
        successor = lte_store.successors(ranks, where, budget)
        slots = lte_store.slots_after(ranks, successor, budget, jnp.full(BATCH, ranks.shape[1], jnp.int32))
        return lte_store.refill(store, slots, k, v, positions, scores)

    one = whole = lte_store.empty_store(BATCH, budget, HEADS, SIZE, jnp.float32)
    step = one_step()
    for t in range(tokens):
        one = step(one, content[:, t], -content[:, t], positions[:, t], scores[:, t])
    at = 0
    for size in (2, 1, 18, 2, 18):  # of few lengths, each a program
        part = slice(at, at + size)
        whole = piece(whole, content[:, part], -content[:, part], positions[:, part], scores[:, part])
        at += size
    assert at == tokens
    jax.tree.map(np.testing.assert_array_equal, whole, one)


def test_a_piece_is_followed_only_until_its_mark():
    tokens, budget = 20, 4
    scores, positions = map(np.asarray, draw(5, tokens, True))
    empty = lte_store.empty_store(BATCH, budget, HEADS, SIZE, jnp.float32)
    ranks = jnp.concatenate([empty.score, scores], axis=1)
    where = jnp.concatenate([empty.position, spread(positions)], axis=1)
    successor = successors(ranks, where, budget)
    slots = np.asarray(slots_after(ranks, successor, budget, jnp.asarray([budget + 9, budget - 3], jnp.int32)))
    for h in range(HEADS):
        plain = PlainStore(budget)
        for t in range(9):
            plain.offer(float(scores[0, t, h]), t)
        expected = [index + budget for _, index in plain.slots]
        np.testing.assert_array_equal(slots[0, :, h], expected + [-1] * (budget - len(expected)))
    assert (slots[1] == -1).all(), "a mark before the first token leaves every slot empty"


def test_documents_have_stores_of_their_own():
    budget, lengths = 3, (5, 1, 13, 2, 9)
    tokens = sum(lengths)
    segment_ids = jnp.asarray([np.repeat([7, 0, 3, 4, 9], lengths), np.repeat([1, 2, 5, 0, 4], lengths)], jnp.int32)
    start, end = document_bounds(segment_ids)
    edges = np.cumsum((0, *lengths))
    np.testing.assert_array_equal(start[0], np.repeat(edges[:-1], lengths))
    np.testing.assert_array_equal(end[1], np.repeat(edges[1:], lengths))
    raw, _ = draw(6, tokens, True)
    positions = np.arange(tokens, dtype=np.int32) - np.asarray(start)
    scores = np.asarray(ranked(raw, positions, 1, np.asarray(segment_ids) != 0))
    successor = np.asarray(successors(scores, spread(positions), budget, (start, end)))
    best = np.asarray(best_of_document(scores, budget, (start, end)))
    for b in range(BATCH):
        for h in range(HEADS):
            for low, high in itertools.pairwise(edges):
                plain = PlainStore(budget)
                for t in range(low, high):
                    plain.offer(float(scores[b, t, h]), t)
                expected = [tokens if plain.replaced[t] is None else plain.replaced[t] for t in range(low, high)]
                np.testing.assert_array_equal(successor[b, low:high, h], expected)
                kept = sorted(index for _, index in plain.slots)
                np.testing.assert_array_equal(low + np.flatnonzero(best[b, low:high, h]), kept)
    assert not best[np.asarray(segment_ids) == 0].any()


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("budget", [4, 50])
def test_best_of_one_document_equals_the_plain_store_s_end(budget, ties):
    scores = np.asarray(draw(8, 33, ties)[0])
    best = best_of_document(scores, budget)
    best, slots = np.asarray(best), np.asarray(slots_of_best(best, budget))
    for b in range(BATCH):
        for h in range(HEADS):
            plain = PlainStore(budget)
            for t in range(33):
                plain.offer(float(scores[b, t, h]), t)
            kept = sorted(index for _, index in plain.slots)
            np.testing.assert_array_equal(np.flatnonzero(best[b, :, h]), kept)
            np.testing.assert_array_equal(slots[b, :, h], kept + [-1] * (budget - len(kept)))


def test_sinks_never_leave_and_padding_never_enters():
    tokens, budget, sinks = 30, 4, 3
    positions = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32) - 5, (BATCH, tokens))
    real = positions >= 0
    raw = jnp.linspace(-1.0, 9.0, tokens)[None, :, None] * jnp.ones((BATCH, 1, HEADS))
    scores = ranked(raw, positions, sinks, real)
    assert (np.asarray(scores[:, 5:8]) == np.inf).all() and (np.asarray(scores[:, :5]) == -np.inf).all()
    best = np.asarray(best_of_document(scores, budget))
    np.testing.assert_array_equal(np.flatnonzero(best[0, :, 0]), [5, 6, 7, tokens - 1])


def test_random_scores_are_a_uniform_reproducible_sample():
    positions = jnp.arange(20000, dtype=jnp.int32)[None]
    scores = np.asarray(lte_store.random_scores(positions, 4, seed=1))
    np.testing.assert_array_equal(scores[:, 1000:], lte_store.random_scores(positions[:, 1000:], 4, seed=1))
    assert scores.min() > 0 and scores.max() <= 1
    # 20,000 uniform numbers: standard error of the mean 0.002, of a correlation 0.007.
    assert np.abs(scores.mean(axis=(0, 1)) - 0.5).max() < 0.01
    other = np.asarray(lte_store.random_scores(positions, 4, seed=2))
    columns = np.concatenate([scores[0, :-1], other[0, :-1], scores[0, 1:, :1]], axis=1)
    off_diagonal = np.corrcoef(columns.T) - np.eye(columns.shape[1])
    assert np.abs(off_diagonal).max() < 0.035, "heads, seeds and neighbouring positions are independent"


def test_recency_ranks_the_latest_first():
    scores = np.asarray(lte_store.recency_scores(jnp.asarray([[0, 1, 2**24 - 2]], jnp.int32), 2))
    assert (np.diff(scores, axis=1) > 0).all() and (scores > 0).all()


@pytest.mark.parametrize(("tokens", "heads"), [(1, 2), (97, 3), (5000, 3), (2**18 + 7, 5)])
def test_the_best_of_a_row_are_those_of_a_sort(tokens, heads):
    """Equal scores across the last place, sinks, tiny and huge scores, heads with too few candidates and with none."""
    budget, rng = 61, np.random.default_rng(tokens)
    scores = np.round(rng.normal(size=(1, tokens, heads)) * 30).astype(np.float32) / 60
    scores[0, :: max(tokens // 50, 1), 0] *= np.float32(1e-30)
    scores[0, :: max(tokens // 40, 1), 0] *= np.float32(1e30)
    scores = np.where(scores > 0, scores, -np.inf).astype(np.float32)
    scores[:, 13:, 1] = -np.inf
    scores[:, :, heads - 1] = -np.inf if heads > 3 else scores[:, :, heads - 1]
    scores[:, :4, 0] = np.inf
    kept = np.asarray(best_of_document(scores, budget))
    for h in range(heads):
        order = np.argsort(-scores[0, :, h], kind="stable")[:budget]
        expected = np.zeros(tokens, bool)
        expected[order] = scores[0, order, h] > -np.inf
        np.testing.assert_array_equal(kept[0, :, h], expected)
