"""What does an LTE model keep of a text: which tokens, how many per head, for how long, and what are they worth?

One row of tokens goes through the model by the streaming reading, layer by layer. Of every LTE layer the probe notes
the index at which each token is gone for good, and how the attention of each query splits into

* window: keys j with i - j <= W,
* sinks: the first Z tokens, where they lie beyond the window,
* retained: every other key beyond the window.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lte_jax.decode import take_apart
from lte_jax.inputs import check_tokens
from lte_jax.layers import rotary
from lte_jax.lengths import check_lengths
from lte_jax.mixers import lte, lte_store
from lte_jax.mixers.base import Aux
from lte_jax.mixers.lte_config import needs_shared_router, rule_scores
from lte_jax.model import LanguageModel

MASSES = ("window", "sinks", "retained")
_QUERIES = 256  # at a time, in the sums over attention


@dataclasses.dataclass(frozen=True)
class Found:
    """What was seen in one row of T tokens, for the LTE layers from the first up.

    Attributes:
      tokens: [T]. layers: the layers' indices in the model. window, budget, sinks: W, M, Z of each layer.
      scores: [layers, T, K] of the router; zeros for rules without one.
      gone: [layers, T, K], the first query that no longer sees the token; T for those still seen at the end.
      mass: [layers, H, 3], the share of attention on ``MASSES``, averaged over the queries that have a past beyond
        their window; NaN where the text is shorter than that.
    """

    tokens: np.ndarray
    layers: tuple[int, ...]
    window: tuple[int, ...]
    budget: tuple[int, ...]
    sinks: tuple[int, ...]
    scores: np.ndarray
    gone: np.ndarray
    mass: np.ndarray

    @property
    def lives(self) -> np.ndarray:
        """[layers, T, K]: for how many queries after its own a token is seen; at the end those still seen count on."""
        return self.gone - 1 - np.arange(len(self.tokens))[None, :, None]

    @property
    def held(self) -> np.ndarray:
        """[layers, T, K]: tokens in the store at the end."""
        beyond = np.arange(len(self.tokens)) < len(self.tokens) - 1 - np.asarray(self.window)[:, None]
        return (self.gone == len(self.tokens)) & beyond[..., None]

    @property
    def counts(self) -> np.ndarray:
        """[layers, K]: slots that are filled at the end."""
        return self.held.sum(1)

    def alive(self, layer: int) -> np.ndarray:
        """[T]: of the tokens that have a query d tokens after them, the share (over heads too) that it sees."""
        lives, tokens = self.lives[layer], len(self.tokens)
        return np.array([(lives[: tokens - d] >= d).mean() for d in range(tokens)])


def probe(model: LanguageModel, tokens: np.ndarray) -> Found:
    """Looks at one row of tokens, [T].

    Raises:
      ValueError: the model has no LTE layer, or the tokens are none of its own.
    """
    tokens = np.asarray(tokens, np.int32)
    names = model.config.layer_names()
    layers = tuple(index for index, name in enumerate(names) if name == "lte")
    if not layers:
        raise ValueError(f"the model has no lte layer to look into; its layers are {', '.join(dict.fromkeys(names))}")
    if tokens.ndim != 1 or not tokens.size:
        raise ValueError(f"tokens have the shape {tokens.shape}; they must be one row of at least 1 token")
    check_tokens(tokens[None], model.config.vocab_size)
    check_lengths(model, 1, tokens.size)
    graph, state = nnx.split(model)
    x = jax.jit(lambda state: nnx.merge(graph, state).embeddings(jnp.asarray(tokens[None])))(state)
    seen: list[dict[str, Any]] = []
    for weights in take_apart(nnx.state(model.units), model.config.num_layers // len(model.config.pattern)):
        x, notes = _unit(graph, state, weights, x)
        seen += jax.device_get(notes)
    configs = [config for config in model.config.pattern if isinstance(config, lte.Config)]
    configs *= len(layers) // len(configs)
    return Found(
        tokens=tokens,
        layers=layers,
        window=tuple(config.window for config in configs),
        budget=tuple(config.budget for config in configs),
        sinks=tuple(config.sinks for config in configs),
        **{name: np.stack([notes[name] for notes in seen]) for name in ("scores", "gone", "mass")},
    )


@functools.partial(jax.jit, static_argnums=0)
def _unit(graph: Any, state: Any, weights: Any, x: jax.Array) -> tuple[jax.Array, list[dict[str, jax.Array]]]:
    """One repeat of the pattern: the hidden states after it, and notes on its LTE layers."""
    model = nnx.merge(graph, state)
    unit = nnx.merge(nnx.graphdef(model.units), weights)
    positions = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
    notes: list[dict[str, jax.Array]] = []
    context: Aux = {}
    for block, config in zip(unit.blocks, model.config.pattern, strict=True):
        options = {"router": model.router} if needs_shared_router(config) else {}
        before, below = x, context
        x, context = block(
            x, positions=positions, segment_ids=None, reading="streaming", key=None, context=below, **options
        )
        if isinstance(config, lte.Config):
            notes.append(_look(block.mixer, block.mixer_norm(before), positions, context["scores"], below))
    return x, notes


def _look(mixer: Any, x: jax.Array, positions: jax.Array, scores: jax.Array, below: dict[str, Any]) -> dict[str, Any]:
    config, tokens = mixer.config, x.shape[1]
    ranks = scores if config.retention == "learned" else rule_scores(config, positions, below)
    ranks = lte_store.ranked(ranks, positions, config.sinks)
    successor = lte_store.successors(ranks, jnp.broadcast_to(positions[..., None], ranks.shape), config.budget)
    expiry = lte_store.expiries(successor, 0, config.window + 1)[0]
    index = jnp.arange(tokens, dtype=jnp.int32)
    gone = jnp.minimum(jnp.maximum(expiry, index[:, None] + config.window + 1), tokens)

    def split(y: jax.Array) -> jax.Array:
        return rotary(y.reshape(1, tokens, -1, mixer.head_size), positions, config.rope_theta)[0].astype(jnp.float32)

    mass = _mass(split(mixer.q_proj(x)), split(mixer.k_proj(x)), gone, config.window, config.sinks)
    return {"scores": scores[0], "gone": gone, "mass": mass}


def _mass(q: jax.Array, k: jax.Array, gone: jax.Array, window: int, sinks: int) -> jax.Array:
    """The shares [H, 3] of attention, from q [T,H,N], k [T,K,N] and ``gone`` [T,K]."""
    tokens, heads, size = q.shape
    group = heads // k.shape[1]
    key = jnp.arange(tokens, dtype=jnp.int32)
    blocks = -(-tokens // _QUERIES)
    q = jnp.pad(q, ((0, blocks * _QUERIES - tokens), (0, 0), (0, 0))).reshape(blocks, _QUERIES, -1, group, size)

    def one(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
        q, first = inputs
        query = first + jnp.arange(_QUERIES, dtype=jnp.int32)
        logits = jnp.einsum("qkgn,tkn->kgqt", q, k) / math.sqrt(size)
        seen = (key <= query[:, None]) & (query[:, None] < gone.T[:, None, :])
        weights = jax.nn.softmax(jnp.where(seen[:, None], logits, -jnp.inf), axis=-1)
        near = query[:, None] - key <= window
        parts = (near, ~near & (key < sinks), ~near & (key >= sinks))
        counts = (query > window) & (query < tokens)
        return jnp.stack(
            [jnp.sum(jnp.where(part & counts[:, None], weights, 0.0), axis=(-2, -1)) for part in parts], axis=-1
        )

    sums = jax.lax.map(one, (q, jnp.arange(blocks, dtype=jnp.int32) * _QUERIES)).sum(0)
    past = tokens - 1 - window
    return sums.reshape(heads, 3) / past if past > 0 else jnp.full((heads, 3), jnp.nan)
