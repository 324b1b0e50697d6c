"""Does a decode step attend over the slots that hold something, and take its token in by the rule?"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dispatch import UnsupportedCase
from pallas_kernels.window_attention import DecodeCache, window_attention_step, window_attention_update_step
from tests.tolerances import assert_close

# The backends that have a decode form; a GPU's run under ``pytest -m gpu``.
backends = pytest.mark.parametrize("backend", ["xla", pytest.param("triton", marks=pytest.mark.gpu)])


def attention(q, keys, values, scale):
    """One query of one head in float64."""
    if not len(keys):
        return np.zeros(values.shape[-1])
    logits = scale * np.asarray(keys, np.float64) @ np.asarray(q, np.float64)
    p = np.exp(logits - logits.max())
    return p @ np.asarray(values, np.float64) / p.sum()


@backends
@pytest.mark.parametrize("G", [1, 2])
def test_step(backend, G):
    """Groups of slots under one softmax; flags per head, flags per slot, lengths; a head with nothing valid gives 0."""
    rng = np.random.default_rng(3)
    B, K, N, V, sizes = 2, 3, 8, 5, (7, 4, 11)
    q = rng.normal(size=(B, K * G, N)).astype(np.float32)
    k, v = ([rng.normal(size=(B, S, K, n)).astype(np.float32) for S in sizes] for n in (N, V))
    valid = [rng.random((B, 7, K)) < 0.5, rng.random((B, 4)) < 0.5, rng.integers(0, 12, (B, K)).astype(np.int32)]
    valid[0][1, :, 2], valid[1][1], valid[2][1, 2] = False, False, 0
    full = [valid[0], np.repeat(valid[1][:, :, None], K, 2), np.arange(11)[None, :, None] < valid[2][:, None]]
    expected = np.zeros((B, K * G, V))
    for b, n in np.ndindex(B, K * G):
        at = np.concatenate([x[b, :, n // G] for x in full])
        keys, values = (np.concatenate([x[b, :, n // G] for x in y])[at] for y in (k, v))
        expected[b, n] = attention(q[b, n], keys, values, 0.6)
    step = jax.jit(functools.partial(window_attention_step, scale=0.6, implementation=backend))
    groups = jax.tree.map(jnp.asarray, (k, v, valid))
    actual = step(jnp.asarray(q), *groups)
    assert_close(actual, expected, "window_attention")
    assert (actual[1, 2 * G :] == 0).all()
    joined = (jnp.concatenate(groups[0], 1), jnp.concatenate(groups[1], 1), jnp.asarray(np.concatenate(full, 1)))
    assert_close(step(jnp.asarray(q), *joined), expected, "window_attention")


class Rule:
    """One head's window and store, token by token, from the definition: the best M by score, then by position."""

    def __init__(self, R, M, sinks):
        self.R, self.M, self.sinks, self.scores, self.tokens = R, M, sinks, {}, 0

    def held(self):
        window = range(max(0, self.tokens - self.R), self.tokens)
        gone = [p for p in range(self.tokens - self.R) if p < self.sinks or self.scores[p] > 0]
        best = sorted(gone, key=lambda p: (p >= self.sinks, -self.scores[p] if p >= self.sinks else 0, p))[: self.M]
        return list(window), sorted(best)


@backends
@pytest.mark.parametrize("G, dtype", [(1, "float32"), (3, "float32"), (1, "bfloat16")])
def test_update_step(backend, G, dtype):
    """Forty tokens through a ring of 7 and a store of 5, in layer 1 of 2, with scores that tie and rows that pause."""
    rng = np.random.default_rng(5)
    B, K, N, V, R, M, sinks, reach, tokens = 2, 3, 16, 8, 7, 5, 2, 3, 40
    options = dict(sinks=sinks, reach=reach, scale=0.4, implementation=backend)

    @functools.partial(jax.jit, donate_argnums=4)
    def step(q, k, v, score, cache, length, active):
        o, cache = window_attention_update_step(
            q, k, v, score, cache, length, active=active, layer=jnp.asarray(1, jnp.int32), **options
        )
        return o, cache, length + active.astype(jnp.int32)

    def zeros(*shape, dtype=dtype, fill=0):
        return jnp.full((2, B, *shape), fill, dtype)

    cache = DecodeCache(
        zeros(R, K, N),
        zeros(R, K, V),
        zeros(R, K, dtype="float32"),
        zeros(M, K, N),
        zeros(M, K, V),
        zeros(M, K, dtype="int32", fill=-1),
        zeros(M, K, dtype="float32", fill=-np.inf),
    )
    untouched = jax.tree.map(lambda x: np.asarray(x[0]), cache)
    k, v = (np.array(jnp.asarray(rng.normal(size=(B, tokens, K, n)), dtype)) for n in (N, V))
    # A few values, so that many tie; a third of them 0, no candidates.
    scores = rng.choice(np.array([0, 0.125, 0.25, 0.375], np.float32), (B, tokens, K), p=[0.3, 0.3, 0.3, 0.1])
    rules = {(b, h): Rule(R, M, sinks) for b, h in np.ndindex(B, K)}
    length = jnp.zeros(B, jnp.int32)
    actual, expected = [], []
    for t in range(tokens):
        active = np.array([True, t % 4 != 1])
        q = np.array(jnp.asarray(rng.normal(size=(B, K * G, N)), dtype))
        at = np.asarray(length)
        rows = np.arange(B)
        final = scores[rows, np.maximum(at - reach, 0)]
        o, cache, length = step(q, k[rows, at], v[rows, at], final, cache, length, active)
        for (b, h), rule in rules.items():
            if not active[b]:
                assert int(length[b]) == rule.tokens
                continue
            rule.scores[rule.tokens] = scores[b, rule.tokens, h]
            rule.tokens += 1
            window, best = rule.held()
            stored = np.asarray(cache.store_position[1, b, :, h])
            assert sorted(stored[stored >= 0]) == best and (stored[len(best) :] == -1).all()
            seen = window + best
            for g in range(G):
                actual.append(np.asarray(o[b, h * G + g]))
                expected.append(attention(q[b, h * G + g], k[b, seen, h], v[b, seen, h], 0.4))
    assert_close(np.stack(actual), np.stack(expected), "window_attention", dtype)
    for (b, h), rule in rules.items():
        window, _ = rule.held()
        stored = np.asarray(cache.store_position[1, b, :, h])
        np.testing.assert_array_equal(cache.store_k[1, b, :, h], k[b, stored, h])
        np.testing.assert_array_equal(cache.store_v[1, b, :, h], v[b, stored, h])
        own = np.where(stored < sinks, np.inf, scores[b, stored, h])
        np.testing.assert_array_equal(cache.store_score[1, b, :, h], own)
        for p in window:
            np.testing.assert_array_equal(cache.ring_k[1, b, p % R, h], k[b, p, h])
            np.testing.assert_array_equal(cache.ring_v[1, b, p % R, h], v[b, p, h])
            known = scores[b, p, h] if p < rule.tokens - reach else 0
            assert cache.ring_score[1, b, p % R, h] == known
    jax.tree.map(np.testing.assert_array_equal, untouched, jax.tree.map(lambda x: x[0], cache))


def test_bad_arguments_of_the_update():
    shapes = dict(q=(2, 4, 6), k=(2, 2, 6), v=(2, 2, 3), score=(2, 2))
    cache = DecodeCache(
        *(np.zeros(s, np.float32) for s in ((2, 5, 2, 6), (2, 5, 2, 3), (2, 5, 2), (2, 3, 2, 6), (2, 3, 2, 3))),
        np.zeros((2, 3, 2), np.int32),
        np.zeros((2, 3, 2), np.float32),
    )
    good = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    good |= dict(cache=cache, length=np.zeros(2, np.int32))
    for message, wrong in {
        "q has shape": dict(q=np.zeros((2, 4), np.float32)),
        "k has dtype": dict(k=np.zeros((2, 2, 6), np.float16)),
        "v has shape": dict(v=np.zeros((2, 3, 3), np.float32)),
        "score has dtype": dict(score=np.zeros((2, 2), np.float16)),
        "length has dtype": dict(length=np.zeros(2, np.float32)),
        "active has dtype": dict(active=np.ones(2, np.int32)),
        "layer has shape": dict(layer=np.zeros(1, np.int32)),
        "cache.ring_k has shape": dict(layer=np.zeros((), np.int32)),
        "cache is tuple": dict(cache=tuple(cache)),
        "cache.ring_v has dtype": dict(cache=cache._replace(ring_v=cache.ring_v.astype(np.float16))),
        "cache.ring_score has shape": dict(cache=cache._replace(ring_score=cache.ring_score[:, 1:])),
        "cache.store_k has shape": dict(cache=cache._replace(store_k=cache.store_k[:, :, 1:])),
        "cache.store_v has shape": dict(cache=cache._replace(store_v=cache.store_v[:, 1:])),
        "cache.store_position has dtype": dict(cache=cache._replace(store_position=cache.store_score)),
        "cache.store_score has dtype": dict(cache=cache._replace(store_score=cache.store_position)),
        "sinks=-1": dict(sinks=-1),
        "reach=5": dict(reach=5),
    }.items():
        with pytest.raises(UnsupportedCase, match=message):
            window_attention_update_step(**(good | wrong))
