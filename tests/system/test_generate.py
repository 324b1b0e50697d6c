"""Does generation give what the model itself says, for every mixer family, batch and prompt length?"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.generate import Settings, load_speaker
from lte_jax import (
    LTE,
    NSA,
    FullAttention,
    GatedDeltaNet,
    LanguageModel,
    ModelConfig,
    WindowAttention,
)
from lte_jax.continuations import Generation
from lte_jax.convert import abstract_model
from lte_jax.generate import decode_steps, generate, read_chunk
from lte_jax.lengths import LengthWarning
from lte_jax.sampling import Sampling, draw
from lte_jax.sharding import MeshConfig, make_mesh

GDN = GatedDeltaNet(num_heads=2, head_dim=8, expand_v=1)
RETAINING = LTE(num_heads=2, num_kv_heads=1, window=13, budget=6, sinks=2)
PATTERNS = {
    "lalte": (GDN, RETAINING),
    "all others": (
        GDN,
        dataclasses.replace(RETAINING, retention="write_strength"),
        NSA(num_heads=4, num_kv_heads=2, head_dim=8, block_size=4, block_counts=3, window=5),
        WindowAttention(num_heads=2, num_kv_heads=1, window=9),
        FullAttention(num_heads=2),
    ),
}
VOCABULARY = 259
NEW = 18  # more than every ring, and not a multiple of the steps between two looks
LENGTHS = (1, 2, 9, 23, 37, 41, 5)  # one token up to several windows


@functools.cache
def build(name: str = "lalte") -> LanguageModel:
    pattern = PATTERNS[name]
    config = ModelConfig(
        vocab_size=VOCABULARY, width=16, num_layers=len(pattern), pattern=pattern, init_std=0.3, max_length=128
    )
    model = LanguageModel(config, rngs=nnx.Rngs(1))
    # A router that has not learned keeps everything or nothing: drop its bias so that slots are fought for.
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        if "router" in path and "bias" in path:
            leaf.set_value(jnp.zeros_like(leaf.get_value()))
    return model


@functools.cache
def prompts(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, size).tolist() for size in lengths]


def run(model: LanguageModel, which=None, **options) -> list[Generation]:
    options = {"max_new_tokens": NEW, "reading": "streaming", "steps_per_call": 7, **options}
    return generate(model, prompts() if which is None else which, **options)


@functools.cache
def greedy(name: str = "lalte") -> list[Generation]:
    return run(build(name))


@pytest.mark.rotating
@pytest.mark.parametrize("name", PATTERNS)
def test_greedy_is_the_argmax_of_a_full_pass_over_the_grown_sequence(name):
    model = build(name)
    # The text's end is padded with a document of its own: one shape for all lengths, and causality keeps it apart.
    grown = [prompt + found.tokens for prompt, found in zip(prompts(), greedy(name), strict=True)]
    ids, segments = np.zeros((7, 64), np.int32), np.zeros((7, 64), np.int32)
    for row, tokens in enumerate(grown):
        ids[row, : len(tokens)], segments[row, : len(tokens)] = tokens, 1
    log_probs = np.asarray(jax.nn.log_softmax(model(ids, segment_ids=segments, reading="streaming").logits))
    for row, (prompt, found) in enumerate(zip(prompts(), greedy(name), strict=True)):
        assert len(found.tokens) == NEW and found.finish_reason == "length" and found.text is None
        asked = log_probs[row, len(prompt) - 1 : len(prompt) - 1 + NEW]
        np.testing.assert_array_equal(asked.argmax(-1), found.tokens)
        np.testing.assert_allclose(asked.max(-1), found.log_probs, atol=1e-4, rtol=0)
    assert len({token for found in greedy(name) for token in found.tokens}) > 5, "the model says one thing only"


@pytest.mark.rotating
@pytest.mark.parametrize("name", PATTERNS)
def test_a_batch_of_one_says_the_same(name):
    for row in (0, 5):
        (alone,) = run(build(name), prompts()[row : row + 1])
        assert alone.tokens == greedy(name)[row].tokens
        np.testing.assert_allclose(alone.log_probs, greedy(name)[row].log_probs, atol=1e-4)


@pytest.mark.rotating
@pytest.mark.parametrize("chunk", [1, 16, 24])  # 64 = 16 + 24 + 24: few shapes
def test_chunked_prompts_equal_whole_ones(chunk):
    chunked = run(build(), chunk=chunk)
    assert [found.tokens for found in chunked] == [found.tokens for found in greedy()]


def test_the_prompt_reading_equals_the_models_first_extend():
    model = build()
    for prompt in prompts((1, 37)):
        (found,) = run(model, [prompt], reading="prompt")
        logits, cache = model.extend(np.array([prompt]), model.init_cache(1))
        for token in found.tokens:
            assert int(logits[0, -1].argmax()) == token
            logits, cache = model.extend(np.array([[token]]), cache)


def test_sampling_depends_on_seed_and_prompt_alone():
    sampling, model = Sampling(temperature=1.0, top_k=50, top_p=0.9), build()
    seeds = [3, 1, 4, 1, 5, 9, 2]
    first = run(model, sampling=sampling, seeds=seeds)
    assert run(model, sampling=sampling, seeds=seeds) == first
    others = [[7], prompts()[3], prompts()[1], [8] * 30, [1], [2], [3]]
    moved = run(model, others, sampling=sampling, seeds=[0, 1, 1, 0, 0, 0, 0])
    assert moved[1].tokens == first[3].tokens and moved[2].tokens == first[1].tokens
    reseeded = run(model, sampling=sampling, seeds=99)
    assert all(a.tokens != b.tokens for a, b in zip(reseeded, first, strict=True))
    looked = run(model, sampling=sampling, seeds=seeds, steps_per_call=5)
    assert [found.tokens for found in looked] == [found.tokens for found in first]


def test_the_end_token_ends_a_row_and_only_that():
    longest = greedy()[4].tokens
    eos = longest[NEW // 2]
    for found, whole in zip(run(build(), eos_id=eos), greedy(), strict=True):
        if eos in whole.tokens:
            assert found.tokens == whole.tokens[: whole.tokens.index(eos)] and found.finish_reason == "eos"
            assert len(found.log_probs) == len(found.tokens)
        else:
            assert found == whole


def decode(tokens) -> str:
    return "".join(chr(0x100 + token) for token in tokens)


def test_a_stop_string_ends_a_row_before_it():
    whole = decode(greedy()[3].tokens)
    stop = whole[6:9]
    for found, plain in zip(run(build(), stop=(stop, "never"), decode=decode), greedy(), strict=True):
        text = decode(plain.tokens)
        if stop in text:
            assert found.finish_reason == "stop" and found.text == text[: text.index(stop)]
            assert decode(found.tokens) == text[: text.index(stop) + len(stop)]
        else:
            assert found.finish_reason == "length" and found.text == text


def test_stop_strings_cost_as_much_at_the_end_of_a_text_as_at_its_start():
    asked: list[int] = []

    def counted(tokens) -> str:
        asked.append(len(tokens))
        return decode(tokens)

    assert [found.text for found in run(build(), stop=("never",), decode=counted)] == [
        decode(plain.tokens) for plain in greedy()
    ]
    assert sorted(asked)[-len(LENGTHS) :] == [NEW] * len(LENGTHS), "each whole text is decoded once"
    assert sorted(asked)[-len(LENGTHS) - 1] <= 2, "at each token, two tokens are"


@pytest.mark.rotating
@pytest.mark.parametrize("devices", [1, 2])
def test_the_loop_is_compiled_once(devices):
    """Of a model that is bound to a device, as after a restore, and of a mesh."""
    graph, state = nnx.split(build())
    model = nnx.merge(graph, jax.device_put(state, jax.devices()[0]))
    mesh = make_mesh(MeshConfig(), jax.devices()[:2]) if devices == 2 else None
    known = decode_steps._cache_size()
    generate(model, prompts((3, 9)), max_new_tokens=9, steps_per_call=3, mesh=mesh)
    assert decode_steps._cache_size() == known + 1


def test_tokens_stream_to_the_caller_as_they_come():
    pieces: list[tuple[int, list[int]]] = []
    found = run(build(), on_tokens=lambda row, tokens: pieces.append((row, tokens)))
    assert max(len(tokens) for _, tokens in pieces) <= 7 and len(pieces) == 3 * 7
    for row, generation in enumerate(found):
        assert [token for owner, tokens in pieces if owner == row for token in tokens] == generation.tokens


def test_a_strong_repetition_penalty_says_nothing_twice():
    penalised = run(build(), sampling=Sampling(repetition_penalty=1e9))
    for prompt, found in zip(prompts(), penalised, strict=True):
        assert len(set(found.tokens)) == NEW and not set(found.tokens) & set(prompt)
    assert run(build(), sampling=Sampling(repetition_penalty=1.0)) == greedy()


def test_the_rule_of_drawing():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    keys = jax.random.split(jax.random.key(0), 4000)
    many = jnp.broadcast_to(logits, (4000, 4))

    def shares(seen=None, **rule) -> np.ndarray:
        tokens, log_probs = draw(many, seen, keys, Sampling(**rule))
        np.testing.assert_allclose(log_probs, logits[0, tokens], atol=1e-5)  # of the model, not of the rule
        return np.bincount(np.asarray(tokens), minlength=4) / 4000

    np.testing.assert_allclose(shares(temperature=1.0), [0.5, 0.3, 0.15, 0.05], atol=0.03)
    np.testing.assert_allclose(shares(temperature=1.0, top_k=2), [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_allclose(shares(temperature=1.0, top_p=0.6), [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_allclose(shares(temperature=1.0, top_p=0.4), [1, 0, 0, 0])
    squares = np.array([0.25, 0.09, 0.0225, 0.0025])
    np.testing.assert_allclose(shares(temperature=0.5), squares / squares.sum(), atol=0.03)
    seen = jnp.zeros((4000, 4), bool).at[:, 0].set(True)
    np.testing.assert_allclose(shares(seen, repetition_penalty=2.0), [0, 1, 0, 0])  # log .5 * 2 = log .25


def test_nothing_to_say_and_too_long_a_text():
    assert run(build(), max_new_tokens=0)[0] == Generation([], [], "length")
    with pytest.warns(LengthWarning, match="longer than the 128 tokens that the model was made for"):
        run(build(), [[5] * 129], max_new_tokens=0)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(which=[]), "no prompts"),
        (dict(which=[[1], []]), "prompt 1 is empty"),
        (dict(which=[[VOCABULARY]]), "token id 259 is outside the vocabulary"),
        (dict(max_new_tokens=-1), "max_new_tokens=-1"),
        (dict(seeds=[1, 2]), "2 seeds for 7 prompts"),
        (dict(seeds=-1), "seed -1 must lie"),
        (dict(stop=("x",)), "stop strings need decode="),
        (dict(stop="xy", decode=decode), "must be a sequence of strings"),
        (dict(stop=("",), decode=decode), "not empty"),
        (dict(chunk=4, reading="prompt"), "need reading='streaming'"),
        (dict(chunk=0), "chunk=0"),
        (dict(steps_per_call=0), "steps_per_call=0"),
    ],
)
def test_bad_requests_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        run(build(), **options)


@pytest.mark.parametrize(
    "rule", [dict(temperature=-1.0), dict(top_k=-1), dict(top_p=0.0), dict(top_p=1.5), dict(repetition_penalty=0.0)]
)
def test_impossible_rules_are_refused(rule):
    with pytest.raises(ValueError, match=f"{next(iter(rule))}={next(iter(rule.values()))}"):
        Sampling(**rule)


def test_a_chunk_changes_its_cache_in_place():
    """What a chunk's program needs beside its arguments does not grow with the number of layers, whose caches do."""
    beside = []
    for layers in (2, 8):
        config = ModelConfig(
            vocab_size=64, width=16, num_layers=layers, pattern=(FullAttention(num_heads=2),), max_length=64
        )
        graph, state = nnx.split(abstract_model(config, dtype=jnp.float32, param_dtype=jnp.float32))
        cache = jax.eval_shape(lambda state, graph=graph: nnx.merge(graph, state).init_cache(1, 4096), state)
        ids = jax.ShapeDtypeStruct((1, 64), jnp.int32)
        plan = read_chunk.lower(graph, state, ids, ids, cache, reading="streaming").compile().memory_analysis()
        beside.append(plan.temp_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes)
    layer = 2 * 4096 * 16 * 4
    assert beside[1] - beside[0] < layer / 4, (beside, layer)


def test_rows_over_a_mesh_say_the_same():
    mesh = make_mesh(MeshConfig(), jax.devices()[:3])  # 7 rows: two are spare
    found = run(build(), mesh=mesh)
    assert [one.tokens for one in found] == [one.tokens for one in greedy()]
    for one, other in zip(found, greedy(), strict=True):
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-5)
    with pytest.raises(ValueError, match=r"--devices=99: it must lie in \[1, 8\]"):
        load_speaker("anywhere", Settings(), devices=99)
