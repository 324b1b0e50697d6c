"""Does block attention equal its definition, token by token, for every size, packing, padding and split into pieces?

The expected values come from a float64 loop over single tokens, written from the definition: it shares no code and no
idea of tiles, tables or layouts with the implementations. Expected gradients are central differences of that loop along
random directions, with the selected blocks held fixed.
"""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import lte_jax
from lte_jax.mixers.nsa import NSA
from pallas_kernels.block_attention import (
    block_attention,
    block_attention_extend,
    init_block_cache,
    pallas,
    triton_select,
    triton_tiles,
)
from pallas_kernels.block_attention import xla as xla_backend
from pallas_kernels.block_attention.api import Case
from pallas_kernels.block_attention.blocks import Layout, plain_layout, pool, row_layout
from tests.tolerances import assert_close

IMPLEMENTATIONS = ("triton", "xla")  # of float32; the Hopper kernel takes 16 bits alone
NAMES = ("q", "k", "v", "gates")
REFERENCE = Path(__file__).parents[1] / "data" / "reference"


def draw(seed, B, T, H, K, N, V):
    rng = np.random.default_rng(seed)
    shapes = ((B, T, H, N), (B, T, K, N), (B, T, K, V), (B, T, H, 3))
    q, k, v, gates = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    return tuple(jnp.asarray(x) for x in (q * np.float32(1.5), k, v, 1 / (1 + np.exp(-gates))))


def softmax(logits):
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def one_document(q, k, v, gates, options, chosen=None):
    """o [T,H,V] of one document and the chosen blocks, {(t, head of k): [numbers, best first]}."""
    S, M, W = options["block_size"], options["block_counts"], options["window"]
    T, H, N = q.shape
    K = k.shape[1]
    G = H // K
    o = np.zeros((T, H, v.shape[2]))
    choice = {} if chosen is None else chosen
    for t in range(T):
        whole, current = (t + 1) // S, t // S
        for kv in range(K):
            heads = range(kv * G, kv * G + G)
            importance = np.zeros(current + 1)
            for h in heads:
                if whole == 0:
                    break
                mean_k = np.stack([k[c * S : c * S + S, kv].mean(0) for c in range(whole)])
                mean_v = np.stack([v[c * S : c * S + S, kv].mean(0) for c in range(whole)])
                p = softmax(mean_k @ q[t, h] / np.sqrt(N))
                o[t, h] += gates[t, h, 0] * (p @ mean_v)
                importance[: min(whole, current)] += p[: min(whole, current)]
            for forced in {0, max(current - 1, 0), current}:
                importance[forced] = G
            if chosen is None:
                choice[t, kv] = sorted(range(current + 1), key=lambda c: (-importance[c], c))[:M]
            tokens = [j for c in choice[t, kv] for j in range(c * S, min(c * S + S, t + 1))]
            recent = list(range(max(0, t - W + 1), t + 1))
            for h in heads:
                for gate, seen in ((1, tokens), (2, recent)):
                    p = softmax(k[seen, kv] @ q[t, h] / np.sqrt(N))
                    o[t, h] += gates[t, h, gate] * (p @ v[seen, kv])
    return o, choice


def expected(arrays, segment_ids, options, chosen=None):
    """o [B,T,H,V] and the chosen blocks of every document, by running each document alone."""
    q, k, v, gates = (np.asarray(x, np.float64) for x in arrays)
    B, T, H, _ = q.shape
    segments = np.ones((B, T), int) if segment_ids is None else np.asarray(segment_ids)
    o = np.zeros((B, T, H, v.shape[3]))
    choices = {}
    for b in range(B):
        for document in sorted(set(segments[b]) - {0}):
            at = np.flatnonzero(segments[b] == document)
            past = None if chosen is None else chosen[b, document]
            o[b, at], choices[b, document] = one_document(q[b, at], k[b, at], v[b, at], gates[b, at], options, past)
    return o, choices


def packed_segments(B, T, lengths, gaps):
    """Rows of documents of the given lengths, padding of the given lengths before each and what is left behind."""
    row = []
    for number, (length, gap) in enumerate(zip(lengths, gaps, strict=True), start=1):
        row += [0] * gap + [number] * length
    row = (row + [0] * T)[:T]
    return jnp.asarray([row, row[::-1], *[[1] * T] * (B - 2)][:B], jnp.int32)


OPTIONS = dict(block_size=4, block_counts=3, window=5)
# name: (shape B, T, H, K, N, V), options, document lengths and gaps or None
CASES = {
    "odd": ((2, 37, 6, 2, 8, 5), OPTIONS, None),
    "group of 1, prime block": ((1, 29, 3, 3, 7, 7), dict(block_size=5, block_counts=2, window=1), None),
    "group of 5": ((1, 61, 5, 1, 8, 8), dict(block_size=3, block_counts=4, window=70), None),
    "shorter than a block": ((2, 6, 4, 2, 8, 8), dict(block_size=8, block_counts=2, window=3), None),
    "one whole block": ((1, 8, 2, 1, 4, 4), dict(block_size=8, block_counts=16, window=3), None),
    "fewer blocks than counts": ((1, 31, 10, 2, 8, 8), dict(block_size=4, block_counts=16, window=4), None),
    "one block each": ((1, 23, 6, 1, 8, 8), dict(block_size=4, block_counts=1, window=4), None),
    "packed": ((3, 43, 10, 2, 8, 6), OPTIONS, ((9, 1, 4, 17), (2, 0, 3, 0))),
    "packed, group of 2": ((2, 67, 4, 2, 8, 8), dict(block_size=3, block_counts=3, window=6), ((22, 2, 31), (0, 3, 1))),
    "all padding": ((1, 12, 2, 1, 4, 4), OPTIONS, ((0,), (12,))),
}


def build(name, implementation="xla"):
    """The case's arrays; where blocks of fewer than 16 tokens are not supported, the same case in blocks of 16."""
    shape, options, packing = CASES[name]
    if implementation != "xla":
        block_size = options["block_size"]
        options = {**options, "block_size": 16}
        B, T, *heads = shape
        shape = (B, T * 16 // block_size, *heads)
        packing = packing and tuple(tuple(n * 16 // block_size for n in lengths) for lengths in packing)
    arrays = draw(sorted(CASES).index(name), *shape)
    segments = None if packing is None else packed_segments(shape[0], shape[1], *packing)
    return arrays, segments, options


@functools.cache
def compiled(options, implementation, tile_elements=xla_backend._TILE_ELEMENTS):
    """Value and gradients; compiled anew for another size of the XLA form's tiles, which is set while it is traced."""
    run = functools.partial(block_attention, **dict(options), implementation=implementation)

    @jax.jit
    def value_and_gradients(arrays, segment_ids, cotangent):
        o, pull = jax.vjp(lambda *a: run(*a, segment_ids=segment_ids), *arrays)
        return o, pull(cotangent.astype(o.dtype))

    return value_and_gradients


@pytest.mark.rotating(5)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_definition(name, implementation):
    arrays, segments, options = build(name, implementation)
    rng = np.random.default_rng(7)
    cotangent = jnp.asarray(rng.normal(size=(*arrays[0].shape[:3], arrays[2].shape[3])), jnp.float32)
    o, gradients = compiled(tuple(options.items()), implementation)(arrays, segments, cotangent)
    truth, chosen = expected(arrays, segments, options)
    assert_close(o, truth, "block attention")
    if name == "all padding":
        assert not np.any(o) and not any(np.any(g) for g in gradients)
        return
    step = 1e-5
    for n, gradient in enumerate(gradients):
        direction = rng.normal(size=arrays[n].shape)
        moved = [
            expected(
                [x + s * step * direction if i == n else x for i, x in enumerate(map(np.float64, arrays))],
                segments,
                options,
                chosen,
            )[0]
            for s in (1, -1)
        ]
        wanted = np.sum((moved[0] - moved[1]) / (2 * step) * np.asarray(cotangent, np.float64))
        got = np.sum(np.asarray(gradient, np.float64) * direction)
        scale = np.linalg.norm(np.asarray(gradient, np.float64))
        assert abs(got - wanted) <= 2e-5 * scale, f"d{NAMES[n]}: {got} where {wanted} was expected (norm {scale})"


def test_walking_over_small_tiles_changes_nothing(monkeypatch):
    """Tiles whose number does not divide the tokens, with all keys under a mask and with gathered blocks."""
    for name in ("packed", "packed, group of 2"):
        arrays, segments, options = build(name)
        cotangent = jnp.cos(7.0 * arrays[0][..., :1] + arrays[0][..., : arrays[2].shape[3]])
        whole = compiled(tuple(options.items()), "xla")(arrays, segments, cotangent)
        monkeypatch.setattr(xla_backend, "_TILE_ELEMENTS", 2**14)
        tiled = compiled(tuple(options.items()), "xla", 2**14)(arrays, segments, cotangent)
        monkeypatch.undo()
        for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(tiled), strict=True):
            assert_close(other, one, "block attention")


def test_ties_go_to_the_smaller_number():
    """With equal keys all blocks weigh the same: those chosen are 0, c0 - 1, c0, then 1, 2, ..."""
    T, S, M = 40, 4, 5
    q, k = draw(3, 1, T, 4, 2, 8, 8)[:2]
    k = jnp.ones_like(k)
    case = Case(1, T, T, 4, 2, 8, 8, "float32", S, M, 8**-0.5, False, False)
    chosen = np.asarray(jax.jit(lambda q, k: xla_backend.select(case, q, k, None))(q, k))
    for t in range(T):
        current = t // S
        forced = sorted({0, max(current - 1, 0), current})
        wanted = (forced + [c for c in range(current + 1) if c not in forced])[:M]
        wanted += [-1] * (M - len(wanted))
        np.testing.assert_array_equal(chosen[0, t], [wanted, wanted])


@functools.cache
def extender(options, implementation):
    return jax.jit(functools.partial(block_attention_extend, **dict(options), implementation=implementation))


@pytest.mark.rotating
@pytest.mark.parametrize("pieces", [(1,) * 9, (5, 1, 17, 1, 13), (37,)], ids=str)
def test_any_split_gives_the_whole(pieces, implementation):
    """Rows at different lengths, with padding left of one row's tokens and right of the other's."""
    S = 4 if implementation == "xla" else 16
    options = dict(block_size=S, block_counts=3, window=6)
    pieces = tuple(p * S // 4 if p > 1 else 1 for p in pieces)
    T = sum(pieces)
    arrays = draw(11, 2, T, 6, 2, 8, 5)
    whole, _ = expected(arrays, None, options)
    extend = extender(tuple(options.items()), implementation)
    cache = init_block_cache(2, 10 * S - 1, 2, 8, 5, S, jnp.float32)
    start, parts = 0, []
    for number, size in enumerate(pieces):
        piece = tuple(x[:, start : start + size] for x in arrays)
        pad = 3 if number % 2 == 0 and 1 < size < T else 0
        real = np.stack([np.pad(np.ones(size, int), side) for side in ((pad, 0), (0, pad))])
        padded = []
        for x in map(np.asarray, piece):
            filled = np.full((2, size + pad, *x.shape[2:]), 9.0, np.float32)
            filled[real > 0] = x.reshape(-1, *x.shape[2:])
            padded.append(jnp.asarray(filled))
        o, cache = extend(*padded, cache, segment_ids=None if size == T else jnp.asarray(real, jnp.int32))
        assert not np.any(np.asarray(o)[real == 0])
        parts.append(np.asarray(o)[real > 0].reshape(2, size, *o.shape[2:]))
        start += size
    assert_close(np.concatenate(parts, axis=1), whole, "block attention")
    assert np.all(np.asarray(cache.length) == T)


def test_single_tokens_complete_blocks(implementation):
    """Steps behind two prompts of which one ends just before a block does: its mean counts at once."""
    S = 4 if implementation == "xla" else 16
    options = dict(block_size=S, block_counts=4, window=7)
    lengths = (5 * S - 2, 3 * S + 1)
    T = max(lengths) + 4
    arrays = draw(13, 2, T, 6, 2, 8, 5)
    whole, _ = expected(arrays, None, options)
    extend = extender(tuple(options.items()), implementation)
    cache = init_block_cache(2, 6 * S - 1, 2, 8, 5, S, jnp.float32)
    real = np.arange(max(lengths)) < np.array(lengths)[:, None]
    _, cache = extend(*(x[:, : max(lengths)] for x in arrays), cache, segment_ids=jnp.asarray(real, jnp.int32))
    for _ in range(4):
        at = np.asarray(cache.length)
        o, cache = extend(*(x[np.arange(2), at][:, None] for x in arrays), cache)
        assert_close(o[:, 0], whole[np.arange(2), at], "block attention")
    k = np.asarray(arrays[1], np.float64)
    for b, blocks in enumerate(np.asarray(cache.length) // S):
        means = k[b, : blocks * S].reshape(blocks, S, 2, 8).mean(1)
        assert_close(cache.pooled_k[b, :blocks], means, "block attention")


def test_rows_that_are_all_padding_leave_the_cache_alone(implementation):
    S = 4 if implementation == "xla" else 16
    options = dict(block_size=S, block_counts=3, window=6)
    arrays = draw(5, 2, 8, 6, 2, 8, 5)
    extend = extender(tuple(options.items()), implementation)
    cache = init_block_cache(2, 10 * S - 1, 2, 8, 5, S, jnp.float32)
    for size, row in ((8, [1, 1]), (8, [0, 1]), (1, [0, 1])):
        before = cache
        segments = jnp.asarray(row, jnp.int32)[:, None] * jnp.ones((1, size), jnp.int32)
        o, cache = extend(*(x[:, :size] for x in arrays), before, segment_ids=segments)
        assert np.any(o[1])
    assert not np.any(o[0])
    for old, new in zip(before, cache, strict=True):
        np.testing.assert_array_equal(old[0], new[0])
    assert list(cache.length) == [8, 17]


def test_under_vmap_scan_and_remat(implementation):
    arrays, segments, options = build("packed", implementation)
    run = functools.partial(block_attention, **options, implementation=implementation)
    policy = jax.checkpoint_policies.save_only_these_names("block_attention_out", "block_attention_residual")

    def layer(total, arrays):
        one = jax.checkpoint(lambda a: jnp.sum(jnp.sin(run(*a, segment_ids=segments))), policy=policy)
        return total + one(arrays), None

    def stacked(arrays):
        return jax.lax.scan(layer, 0.0, jax.tree.map(lambda x: x[None], arrays))[0]

    two = jax.tree.map(lambda x: jnp.stack([x[:, ::-1], x]), arrays)
    mapped = jax.jit(jax.vmap(jax.grad(stacked)))(two)
    plain = compiled(tuple(options.items()), implementation)
    o, _ = plain(arrays, segments, jnp.zeros((*arrays[0].shape[:3], arrays[2].shape[3])))
    for one, other in zip(plain(arrays, segments, jnp.cos(o))[1], mapped, strict=True):
        assert_close(other[1], one, "block attention")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["odd", "packed", "packed, group of 2", "group of 1, prime block"])
def test_gathering_tokens_by_block_changes_nothing(name, monkeypatch):
    """In each pass blocks gather their tokens, or tiles of tokens read their blocks: the three ways agree."""
    arrays, segments, options = build(name, "triton")
    cotangent = jnp.cos(7.0 * arrays[0][..., :1] + arrays[0][..., : arrays[2].shape[3]])
    results = []
    for forward, backward in ((0, 0), (0, 64), (64, 64)):
        monkeypatch.setattr(triton_tiles, "GATHERED_FORWARD", forward)
        monkeypatch.setattr(triton_tiles, "GATHERED_BACKWARD", backward)
        results.append(compiled.__wrapped__(tuple(options.items()), "triton")(arrays, segments, cotangent))
    for other in results[1:]:
        for one, two in zip(jax.tree.leaves(results[0]), jax.tree.leaves(other), strict=True):
            assert_close(two, one, "block attention")


@pytest.mark.gpu
@pytest.mark.parametrize("name, group", [*(("triton", group) for group in (1, 2, 4, 8, 16, 32)), ("pallas", 16)])
def test_sixteen_bits_on_tensor_cores(name, group):
    """The tiles that 16 bits have, for each way that blocks and tokens meet.

    Against XLA in the same 16 bits: block means rounded to them make another block the last of those selected for some
    tokens, which float32 would count as error.
    """
    arrays = draw(23, 1, 1021, max(16, group), max(16, group) // group, 64, 64)
    options = (("block_size", 64), ("block_counts", 8), ("window", 100))
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), arrays)
    cotangent = jnp.cos(7.0 * arrays[0]).astype(jnp.bfloat16)
    both = (jax.tree.leaves(compiled(options, side)(low, None, cotangent)) for side in ("xla", name))
    for one, other in zip(*both, strict=True):
        assert_close(other, one, "block attention", "bfloat16")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name, T, U, N, S",
    [
        ("documents", 1531, 1531, 128, 16),
        ("all columns", 2053, 2053, 64, 16),
        ("documents in parts", 4507, 4507, 64, 16),
        ("cached", 70, 1531, 40, 32),
        ("cached in parts", 200, 4507, 64, 16),
    ],
)
def test_pallas_selects_as_triton_does(name, T, U, N, S):
    """Packed rows; as many blocks as a program holds and one more under way; more of them; queries behind a cache."""
    q, k, v = (x.astype(jnp.bfloat16) for x in draw(29, 2, U, 8, 2, N, N)[:3])
    layout = plain_layout(2, U, S)
    if "documents" in name:
        layout = row_layout(packed_segments(2, U, (700, 1, 300, 413), (3, 0, 8, 1)), S)
    means = pool(k, layout, S), pool(v, layout, S)
    if "cached" in name:
        zero, index = jnp.zeros((2, T), jnp.int32), jnp.arange(U - T, U, dtype=jnp.int32)
        position = jnp.stack([index, jnp.where(index < U - T + 9, -1, index - 99)])
        layout = Layout(zero, position, zero, jnp.zeros((2, 1), jnp.int32))
    case = Case(2, T, U, 8, 2, N, N, "bfloat16", S, 5, N**-0.5, "documents" in name, "cached" in name)
    truth, run = (jax.jit(functools.partial(form.select, case)) for form in (triton_select, pallas))
    (true_o, true_lse, true_blocks), (o, lse, blocks), again = (f(q[:, :T], *means, layout) for f in (truth, run, run))
    np.testing.assert_array_equal(blocks, true_blocks)
    assert_close(o, true_o, "block attention", "bfloat16")
    assert_close(lse, true_lse, "block attention", "bfloat16")
    for one, other in zip((o, lse, blocks), again, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.gpu
@pytest.mark.parametrize("folder", ["nsa", "gdn_nsa"])
def test_gives_the_logits_of_the_authors_models(folder, implementation):
    """On a GPU; ``tests/system/test_reference.py`` does it without one."""
    model = lte_jax.from_pretrained(REFERENCE / folder)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, NSA):
            module.implementation = implementation
    golden = load_file(REFERENCE / folder / "golden.safetensors")
    logits = nnx.jit(lambda model, ids: model(ids).logits)(model, golden["input_ids"])
    np.testing.assert_allclose(logits, golden["logits"], atol=2e-4, rtol=0)


def test_bits_repeat(implementation):
    arrays, segments, options = build("packed", implementation)
    cotangent = jnp.ones((*arrays[0].shape[:3], arrays[2].shape[3]))
    run = compiled(tuple(options.items()), implementation)
    for one, other in zip(*(jax.tree.leaves(run(arrays, segments, cotangent)) for _ in range(2)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_no_array_of_tokens_by_tokens():
    """At 32,768 tokens the compiled forward and backward pass needs a small part of one [T, T] array."""
    T = 32768
    arrays = [jax.ShapeDtypeStruct((1, T, *s), jnp.float32) for s in ((2, 16), (1, 16), (1, 16), (2, 3))]
    run = functools.partial(block_attention, block_size=32, block_counts=4, window=64, implementation="xla")
    step = jax.jit(jax.grad(lambda *a: jnp.sum(run(*a)), argnums=(0, 1, 2, 3)))
    needed = step.lower(*arrays).compile().memory_analysis().temp_size_in_bytes
    assert needed < T * T * 4 / 20, needed
