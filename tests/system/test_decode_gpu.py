"""Do a decode step's kernels, in place and after one another, say what the model says of the whole sequence?

The heads are of the kernels' sizes (those of ``test_generate`` are smaller, and fall to XLA). The token drawn must be
the full pass's best, or as good as that but for rounding.
"""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lte_jax import LTE, NSA, FullAttention, GatedDeltaNet, LanguageModel, ModelConfig, WindowAttention
from lte_jax.decode import decode_step, decode_weights, layer_caches
from lte_jax.generate import generate
from pallas_kernels.triton_launch import TARGET

pytestmark = pytest.mark.gpu

GDN = GatedDeltaNet(num_heads=2, head_dim=64)
RETAINING = LTE(num_heads=2, window=29, budget=10, sinks=2)
PATTERNS = {
    "lalte": (GDN, RETAINING),
    "lalte with groups": (GDN, dataclasses.replace(RETAINING, num_kv_heads=1)),
    "lansa": (GDN, NSA(num_heads=4, num_kv_heads=2, head_dim=64, block_size=16, block_counts=3, window=16)),
    "windows": (GDN, WindowAttention(num_heads=2, num_kv_heads=1, window=33), FullAttention(num_heads=2)),
}
NEW, LENGTH = 40, 160
LENGTHS = (1, 2, 13, 31, 67, 97, 5)
# Differences of log-probabilities between the two ways: in float32 the order of sums, in 16 bits roundings of states.
BOUNDS = {"float32": 2e-3, "bfloat16": 0.25}


@functools.cache
def build(name: str, dtype: str) -> LanguageModel:
    pattern = PATTERNS[name]
    config = ModelConfig(
        vocab_size=257,
        width=128,
        num_layers=2 * len(pattern),
        pattern=pattern,
        init_std=0.08,
        max_length=LENGTH,
        tie_embeddings=False,  # a tied head repeats the last token
    )
    model = LanguageModel(config, rngs=nnx.Rngs(1), dtype=dtype, param_dtype=dtype)
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        if "router" in path and "bias" in path:  # a router that has not learned keeps all: let slots be fought for
            leaf.set_value(jnp.zeros_like(leaf.get_value()))
    return model


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("name", PATTERNS)
def test_greedy_is_the_best_of_a_full_pass(name, rows, dtype):
    model, random = build(name, dtype), np.random.default_rng(0)
    prompts = [random.integers(0, 257, size).tolist() for size in (LENGTHS if rows > 1 else LENGTHS[5:6])]
    found = generate(model, prompts, max_new_tokens=NEW, reading="streaming", steps_per_call=8)
    ids, segments = np.zeros((rows, LENGTH), np.int32), np.zeros((rows, LENGTH), np.int32)
    for row, (prompt, one) in enumerate(zip(prompts, found, strict=True)):
        tokens = prompt + one.tokens
        ids[row, : len(tokens)], segments[row, : len(tokens)] = tokens, 1
    log_probs = np.asarray(jax.nn.log_softmax(model(ids, segment_ids=segments, reading="streaming").logits))
    for row, (prompt, one) in enumerate(zip(prompts, found, strict=True)):
        asked = log_probs[row, len(prompt) - 1 : len(prompt) - 1 + NEW]
        drawn = asked[np.arange(NEW), one.tokens]
        assert np.max(asked.max(-1) - drawn) <= BOUNDS[dtype]
        np.testing.assert_allclose(drawn, one.log_probs, atol=BOUNDS[dtype], rtol=0)
    assert len({token for one in found for token in one.tokens}) > rows, "the model says one thing only"


@pytest.mark.parametrize("name", PATTERNS)
def test_a_step_is_one_graph(name):
    """Its kernels are all of the kind that XLA takes into command buffers: a launch of each would cost more than it."""
    model = build(name, "bfloat16")
    tokens, caches = jnp.zeros(1, jnp.int32), layer_caches(model.init_cache(1, LENGTH))
    step = jax.jit(lambda weights, tokens, caches: decode_step(model, weights, tokens, caches))
    lowered = step.lower(decode_weights(model), tokens, caches).as_text()
    assert set(re.findall(r"custom_call @(\w+)\(", lowered)) == {TARGET}
    assert lowered.count(f"custom_call @{TARGET}(") > 4 * len(PATTERNS[name])
