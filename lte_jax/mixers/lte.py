"""Learned token eviction (LTE): window attention that keeps, per KV head, the M tokens a router finds worth keeping.

With W the window, r the router's score and Z sinks, query i sees key j <= i of its document if

    i - j <= W,   or   j is one of the first Z tokens,   or   j is retained:

* ``"train"``: r_j > 0, without a bound;
* ``"prompt"``: j is among the best M (sinks first) of all selected tokens that have left the window at the END of the
  document: the authors' evaluation mask and prompt call;
* ``"streaming"``: j is in the store of M slots at the time of query i: what step-by-step decoding sees.

The score learns from attention: v passes through it, and backward dr_j = sum_n dv_jn v_jn (paper 2510.20787, sec. 3),
beside the penalty that the training loss puts on it. Other rules rank tokens under the same budget and cache
(``Config.retention``); they select nothing by a threshold, so their ``"train"`` reads as ``"streaming"``.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int32

from lte_jax.dims import Hidden, Keys, Positions, Queries, Scores, SegmentIds, Values
from lte_jax.layers import Linear, Recipe, rotary, rotation
from lte_jax.mixers import lte_cache, lte_kept, lte_store
from lte_jax.mixers.base import Aux, Mixer, Reading
from lte_jax.mixers.lte_cache import LTECache
from lte_jax.mixers.lte_config import Config, check_reading, make_router, needs_shared_router, rule_scores
from lte_jax.mixers.lte_router import Router
from lte_jax.partition import window_attention
from pallas_kernels.lte_inputs import api as lte_inputs
from pallas_kernels.lte_inputs import lte_inputs_step
from pallas_kernels.window_attention.api import NEVER

READINGS = ("train", "prompt", "streaming")


class LTE(Mixer):
    """Window attention with retained tokens; ``aux`` is {"scores" [B,T,K] float32, "selected" [B,T,K] bool}.

    Beside the contract of ``Mixer``, both calls take

      router: the shared router, where ``needs_shared_router(config)``; otherwise None.

    and ``__call__`` takes

      select: a scalar bool for warm-up in training; False keeps every token and cuts the router's gradient into k and v
        (the router itself goes on learning). None means True. The other readings ignore it.

    ``aux["scores"]`` are the router's scores r (0 at padding, and everywhere for rules without a router). The last
    ``reach`` of a document, or of a call of ``extend``, are provisional: tokens to come may change them.
    ``aux["selected"]`` is, in training, r > 0 or sink; otherwise what of that is left under the budget at the end.

    The cache is ``LTECache``; its size is B (4 + K ((W+1) (2N s + 4) + M (2N s + 8) + 2 reach 2N s)) bytes.
    """

    inputs = ("q_proj", "k_proj", "v_proj")

    def __init__(self, config: Config, width: int, recipe: Recipe):
        config.validate(width)
        self.config = config
        self.dtype = jnp.dtype(recipe.dtype)
        self.implementation = recipe.implementation
        self.head_size = width // config.num_heads
        kv_width = config.kv_heads * self.head_size
        self.q_proj = Linear(width, width, recipe, axes=("embed", "heads"), use_bias=config.qkv_bias)
        self.k_proj = Linear(width, kv_width, recipe, axes=("embed", "kv_heads"), use_bias=config.qkv_bias)
        self.v_proj = Linear(width, kv_width, recipe, axes=("embed", "kv_heads"), use_bias=config.qkv_bias)
        self.o_proj = Linear(width, width, recipe, axes=("heads", "embed"), residual=True)
        own = config.retention == "learned" and config.routing_shared != "all"
        self.router = make_router(config, width, recipe) if own else None

    def __call__(
        self,
        x: Hidden,
        *,
        positions: Positions,
        segment_ids: SegmentIds | None = None,
        reading: Reading = "train",
        key: jax.Array | None = None,
        context: Aux | None = None,
        router: Router | None = None,
        select: jax.Array | None = None,
    ) -> tuple[Hidden, Aux]:
        check_reading(reading, READINGS)
        select = select if reading == "train" else None
        q, k, v = self._project(x)
        scores = None
        if self.config.retention == "learned":
            scores = self._router(router)(*self._router_input(k, v, select), segment_ids, key, self.implementation)
            ranks = scores
        else:
            ranks = rule_scores(self.config, positions, context)
        q, k = (rotary(part, positions, self.config.rope_theta) for part in (q, k))
        real = None if segment_ids is None else segment_ids != 0
        ranks = lte_store.ranked(jax.lax.stop_gradient(ranks), positions, self.config.sinks, real)
        expiry, selected = lte_kept.of_documents(self.config, ranks, positions, segment_ids, reading)
        if select is not None:
            everything = jnp.ones_like(selected) if real is None else jnp.broadcast_to(real[..., None], selected.shape)
            expiry = jnp.where(select, expiry, NEVER)
            selected = jnp.where(select, selected, everything)
        bound = None if reading == "train" else self.config.budget
        o = self._attend(q, k, v, scores, expiry=expiry, segment_ids=segment_ids, budget=bound)
        return self.o_proj(o), {"scores": jnp.zeros_like(ranks) if scores is None else scores, "selected": selected}

    def init_cache(self, batch: int, max_length: int | None, dtype: DTypeLike) -> LTECache:
        c = self.config
        return lte_cache.empty_cache(batch, c.window, c.budget, c.kv_heads, self.head_size, c.reach, dtype)

    def cache_bytes(self, batch: int, max_length: int | None, dtype: DTypeLike) -> int:
        c = self.config
        return lte_cache.cache_bytes(batch, c.window, c.budget, c.kv_heads, self.head_size, c.reach, dtype)

    def extend(
        self,
        x: Hidden,
        cache: LTECache,
        *,
        segment_ids: SegmentIds | None = None,
        reading: Reading = "streaming",
        context: Aux | None = None,
        wants_aux: bool = True,
        router: Router | None = None,
    ) -> tuple[Hidden, LTECache, Aux]:
        check_reading(reading, READINGS[1:])
        if x.shape[1] == 1:
            return self._extend_one(x, cache, segment_ids, context, router, wants_aux)
        return self._extend_chunk(x, cache, segment_ids, reading, context, router)

    def _extend_one(
        self,
        x: Hidden,
        cache: LTECache,
        segment_ids: SegmentIds | None,
        context: Aux | None,
        router: Router | None,
        wants_aux: bool,
    ) -> tuple[Hidden, LTECache, Aux]:
        """One token per row: one new score, one token into the ring, at most one slot of the store changed."""
        config, reach = self.config, self.config.reach
        active = None if segment_ids is None else segment_ids[:, 0] != 0
        position = cache.length[:, None]
        q, k, v = self._project(x)
        if config.retention == "learned":
            own = self._own_score(cache, k, v, position, router) if wants_aux else None
            q, k, score, recent = self._step_inputs(cache, q, k, v, active, router)
            cache = cache if cache.recent is None else cache._replace(recent=recent)
        else:
            score, own = rule_scores(self.config, position, context)[:, 0], None
            q, k = (rotary(part, position, config.rope_theta) for part in (q, k))
        o, cache = lte_cache.push(
            cache,
            q[:, 0],
            k[:, 0],
            v[:, 0],
            score,
            reach=reach,
            sinks=config.sinks,
            active=active,
            implementation=self.implementation,
        )
        y = self.o_proj(o.reshape(o.shape[0], 1, -1))
        return y, cache, self._step_aux(own, position, active) if wants_aux else {}

    def _step_inputs(
        self, cache: LTECache, q: Queries, k: Keys, v: Values, active: Bool[Array, "B"] | None, router: Router | None
    ) -> tuple[Queries, Keys, Float32[Array, "B K"], Array]:
        """q and k [B,1,..] rotated, the score that is final with this token, and the router's inputs to remember."""
        scorer, empty = self._router(router), (k.shape[0], 0, k.shape[2], 2 * k.shape[3])
        cos, sin = rotation(cache.length, self.head_size // 2, self.config.rope_theta)
        recent = jnp.zeros(empty, k.dtype) if cache.recent is None else cache.recent
        convolutions = tuple(lte_inputs.Convolution(c.weight[...], c.bias[...], c.dilation) for c in scorer.convs)
        scores = (scorer.proj.weight[...], scorer.proj.bias[...])
        operands = lte_inputs.Operands(q[:, 0], k[:, 0], v[:, 0], cache.length, cos, sin, recent, convolutions, *scores)
        named = lte_inputs.OPERATION.beside(self.implementation)
        q, k, score, recent = lte_inputs_step(operands, method=scorer.method, active=active, implementation=named)
        return q[:, None], k[:, None], score, recent

    def _own_score(self, cache: LTECache, k: Keys, v: Values, position: Positions, router: Router | None) -> Scores:
        """The new token's provisional score [B,1,K], of what is known so far."""
        reach = self.config.reach
        known = (position - 2 * reach + jnp.arange(2 * reach + 1, dtype=jnp.int32) >= 0).astype(jnp.int32)
        return self._router(router)(
            *lte_cache.join_inputs(cache.recent, k, v, self.dtype), known, None, self.implementation
        )[:, -1:]

    def _step_aux(self, own: Scores | None, position: Positions, active: Bool[Array, "B"] | None) -> Aux:
        shape = (*position.shape, self.config.kv_heads)
        scores = jnp.zeros(shape, jnp.float32) if own is None else own
        selected = jnp.ones(shape, bool) if own is None else (own > 0) | (position < self.config.sinks)[..., None]
        if active is not None:
            scores = jnp.where(active[:, None, None], scores, 0.0)
            selected &= active[:, None, None]
        return {"scores": scores, "selected": selected}

    def _extend_chunk(
        self,
        x: Hidden,
        cache: LTECache,
        segment_ids: SegmentIds | None,
        reading: Reading,
        context: Aux | None,
        router: Router | None,
    ) -> tuple[Hidden, LTECache, Aux]:
        """Several tokens: ring and tokens on one axis of keys, the store as columns, each with its expiry."""
        batch, tokens = x.shape[:2]
        new = jnp.full(batch, tokens, jnp.int32)
        shift, strengths = None, None if context is None else context.get("write_strength")
        if segment_ids is not None:
            real = segment_ids != 0
            new = jnp.sum(real, axis=1, dtype=jnp.int32)
            shift = jnp.argmax(real, axis=1).astype(jnp.int32)
            x, strengths = lte_cache.roll(x, shift), None if strengths is None else lte_cache.roll(strengths, shift)
        real = jnp.arange(tokens, dtype=jnp.int32) < new[:, None]
        past = None if reading == "prompt" else lte_cache.unroll(cache)
        position = cache.length[:, None] + jnp.arange(tokens, dtype=jnp.int32)
        q, k, v = self._project(x)
        scores, own, recent = self._chunk_scores(
            k,
            v,
            cache,
            past,
            position,
            real,
            {} if strengths is None else {"write_strength": strengths},
            router,
            None if segment_ids is None else new,
        )
        q, k = (rotary(part, position, self.config.rope_theta) for part in (q, k))
        k, v = (part.astype(cache.ring_k.dtype) for part in (k, v))
        before = 0
        if past is not None:
            before = past.position.shape[1]
            k, v = jnp.concatenate([past.k, k], axis=1), jnp.concatenate([past.v, v], axis=1)
            position = jnp.concatenate([past.position, position], axis=1)
            real = jnp.concatenate([past.position >= 0, real], axis=1)
        ranks = lte_store.ranked(scores, position, self.config.sinks, real)
        expiry, columns, store, selected = lte_kept.of_piece(
            self.config, ranks, position, k, v, cache, before, new, self.dtype
        )
        o = self._attend(
            q,
            k.astype(self.dtype),
            v.astype(self.dtype),
            None,
            expiry=expiry,
            columns=columns,
            segment_ids=None if past is None and segment_ids is None else real.astype(jnp.int32),
        )
        y, selected = self.o_proj(o), selected[:, before:]
        cache = lte_cache.roll_up(cache, k, v, scores, before, new, self.config.reach)
        cache = cache._replace(store=store, recent=recent)
        if shift is not None:
            y, own, selected = (lte_cache.roll(part, -shift) for part in (y, own, selected))
        return y, cache, {"scores": own, "selected": selected}

    def _chunk_scores(
        self,
        k: Keys,
        v: Values,
        cache: LTECache,
        past: lte_cache.Past | None,
        position: Positions,
        real: Bool[Array, "B T"],
        context: Aux,
        router: Router | None,
        new: Int32[Array, "B"] | None,
    ) -> tuple[Float32[Array, "B past_and_new K"], Scores, Array | None]:
        """Scores on the axis of keys, the router's of the new tokens alone, and its inputs to remember.

        ``new``: tokens per row; None where no token is padding.
        """
        if self.config.retention != "learned":
            scores = rule_scores(self.config, position, context)
            joined = scores if past is None else jnp.concatenate([past.score, scores], axis=1)
            return joined, jnp.zeros_like(scores), cache.recent
        reach = self.config.reach
        inputs = lte_cache.join_inputs(cache.recent, k, v, self.dtype)
        known = jnp.concatenate([position[:, :1] - 2 * reach + jnp.arange(2 * reach) >= 0, real], axis=1)
        if past is None and new is None:
            new_k, new_v = inputs[0][:, 2 * reach :], inputs[1][:, 2 * reach :]
            own = self._router(router)(new_k, new_v, None, None, self.implementation)
        else:
            scores = self._router(router)(*inputs, known.astype(jnp.int32), None, self.implementation)[:, reach:]
            own = scores[:, reach:]
        if past is not None:
            # The last ``reach`` tokens of the ring have their right context now.
            scores = jnp.concatenate([past.score[:, : past.score.shape[1] - reach], scores], axis=1)
        else:
            scores = own
        recent = None
        if cache.recent is not None:
            recent = lte_cache.last_inputs(inputs, 2 * reach, k.shape[1] if new is None else new)
            recent = recent.astype(cache.recent.dtype)
        return scores, own, recent

    def _project(self, x: Hidden) -> tuple[Queries, Keys, Values]:
        def split(y: Array) -> Array:
            return y.reshape(*y.shape[:2], -1, self.head_size)

        return split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x))

    def _attend(self, q: Queries, k: Keys, v: Values, scores: Scores | None, **retained: Any) -> Float[Array, "B T D"]:
        o = window_attention(
            q, k, v, scores, window=self.config.window + 1, implementation=self.implementation, **retained
        )
        return o.reshape(*o.shape[:2], -1)

    def _router(self, router: Router | None) -> Router:
        if (router is None) == needs_shared_router(self.config):
            wanted = "pass router=, the one that the model owns" if router is None else "pass no router"
            raise ValueError(f"lte: routing_shared={self.config.routing_shared!r}: {wanted}")
        return self.router if router is None else router  # type: ignore[return-value]

    def _router_input(self, k: Keys, v: Values, select: jax.Array | None) -> tuple[Keys, Values]:
        """k and v, cut from the gradient where the settings or the warm-up say so."""
        cut = jax.lax.stop_gradient((k, v))
        if not self.config.routing_grad:
            return cut
        return (k, v) if select is None else (jnp.where(select, k, cut[0]), jnp.where(select, v, cut[1]))
