"""Native sparse attention: compressed blocks, selected blocks and a window, weighted by gates of each query head.

    q, k, v = x Wq, x Wk, x Wv;    q, k rotated by their position in the document;    gates = sigmoid(x Wg) [H, 3]
    y = block_attention(q, k, v, gates) Wo        (pallas_kernels/block_attention has the equation)

One k and v serve the three branches; keys are rotated before blocks are pooled. H N may differ from the width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from lte_jax.dims import Hidden, Positions, SegmentIds
from lte_jax.inputs import check_room
from lte_jax.layers import Linear, Recipe, rotary
from lte_jax.mixers.base import Aux, Mixer, MixerConfig, Reading
from lte_jax.partition import block_attention
from pallas_kernels.block_attention import BlockCache, block_attention_extend, init_block_cache


@dataclasses.dataclass(frozen=True)
class Config(MixerConfig):
    """Settings of native sparse attention.

    Attributes:
      num_kv_heads: must divide num_heads; any group size works.
      head_dim: of queries, keys and values.
      block_size: tokens per block.
      block_counts: blocks that each token reads in full, the forced ones (first, previous, own) included.
      window: tokens of the window branch, the query's own included.
      rope_theta: base of the rotary positions.
      qkv_bias: biases on the three input projections.
    """

    num_heads: int = 32
    num_kv_heads: int = 2
    head_dim: int = 64
    block_size: int = 64
    block_counts: int = 16
    window: int = 512
    rope_theta: float = 10000.0
    qkv_bias: bool = False

    def validate(self, width: int) -> None:
        for name in ("num_heads", "num_kv_heads", "block_size", "block_counts", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"nsa: {name}={getattr(self, name)} must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"nsa: num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}")
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(
                f"nsa: head_dim={self.head_dim} must be even and at least 2, for rotary positions on halves"
            )
        if self.rope_theta <= 0:
            raise ValueError(f"nsa: rope_theta={self.rope_theta} must be above 0")


class NSA(Mixer):
    """The mixer. Its cache keeps all tokens and the means of their complete blocks.

    With C = max(1, max_length // block_size) it takes batch * (2 (max_length + C) K N * itemsize + 4) bytes. A token
    beyond ``max_length`` is a ValueError where the cache's counter is concrete; under ``jit`` the caller has to check,
    as such a token is dropped there.
    """

    inputs = ("q_proj", "k_proj", "v_proj", "g_proj")
    needs_max_length = True

    def __init__(self, config: Config, width: int, recipe: Recipe):
        config.validate(width)
        self.config = config
        self.max_length = recipe.max_length
        self.implementation = recipe.implementation
        inner, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = Linear(width, inner, recipe, axes=("embed", "heads"), use_bias=config.qkv_bias)
        self.k_proj = Linear(width, kv, recipe, axes=("embed", "kv_heads"), use_bias=config.qkv_bias)
        self.v_proj = Linear(width, kv, recipe, axes=("embed", "kv_heads"), use_bias=config.qkv_bias)
        self.g_proj = Linear(width, 3 * config.num_heads, recipe, axes=("embed", "heads"))
        self.o_proj = Linear(inner, width, recipe, axes=("heads", "embed"), residual=True)

    def __call__(
        self,
        x: Hidden,
        *,
        positions: Positions,
        segment_ids: SegmentIds | None = None,
        reading: Reading = "train",
        key: jax.Array | None = None,
        context: Aux | None = None,
    ) -> tuple[Hidden, Aux]:
        q, k, v, gates = self._project(x, positions)
        o = block_attention(q, k, v, gates, segment_ids=segment_ids, **self._options())
        return self.o_proj(o.reshape(*x.shape[:2], -1)), {}

    def init_cache(self, batch: int, max_length: int | None, dtype: DTypeLike) -> BlockCache:
        length = self.max_length if max_length is None else max_length
        K, N = self.config.num_kv_heads, self.config.head_dim
        return init_block_cache(batch, length, K, N, N, self.config.block_size, dtype)

    def cache_bytes(self, batch: int, max_length: int | None, dtype: DTypeLike) -> int:
        length = self.max_length if max_length is None else max_length
        slots = length + max(1, length // self.config.block_size)
        per_slot = 2 * self.config.num_kv_heads * self.config.head_dim * jnp.dtype(dtype).itemsize
        return batch * (slots * per_slot + 4)

    def extend(
        self,
        x: Hidden,
        cache: BlockCache,
        *,
        segment_ids: SegmentIds | None = None,
        reading: Reading = "streaming",
        context: Aux | None = None,
        wants_aux: bool = True,
    ) -> tuple[Hidden, BlockCache, Aux]:
        B, T = x.shape[:2]
        real = jnp.ones((B, T), bool) if segment_ids is None else segment_ids != 0
        rank = jnp.cumsum(real, axis=1, dtype=jnp.int32)
        check_room(cache.length, rank[:, -1], cache.k.shape[1])
        q, k, v, gates = self._project(x, jnp.maximum(cache.length[:, None] + rank - 1, 0))
        segments = None if segment_ids is None else real.astype(jnp.int32)
        o, cache = block_attention_extend(q, k, v, gates, cache, segment_ids=segments, **self._options())
        return self.o_proj(o.reshape(B, T, -1)), cache, {}

    def _options(self) -> dict[str, Any]:
        names = ("block_size", "block_counts", "window")
        return {**{name: getattr(self.config, name) for name in names}, "implementation": self.implementation}

    def _project(self, x: Hidden, positions: Positions) -> tuple[Array, Array, Array, Array]:
        B, T = x.shape[:2]
        H, K, N = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        q = rotary(self.q_proj(x).reshape(B, T, H, N), positions, self.config.rope_theta)
        k = rotary(self.k_proj(x).reshape(B, T, K, N), positions, self.config.rope_theta)
        v = self.v_proj(x).reshape(B, T, K, N)
        gates = jax.nn.sigmoid(self.g_proj(x).astype(jnp.float32)).reshape(B, T, H, 3)
        return q, k, v, gates
