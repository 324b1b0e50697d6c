"""What sliding-window and full attention share: projections, rotary positions, and a ring of recent keys and values.

    q, k, v = x Wq, x Wk, x Wv;    q, k rotated by their position in the document;    y = attention(q, k, v) Wo

With ``qk_norm``, each head of q and of k goes through an RMSNorm before the rotation.

The cache of a row is a ring of S slots: token p of the document is in slot p mod S, already rotated, and ``length``
counts the tokens seen. It takes batch * (2 S K N * itemsize + 4) bytes.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from lte_jax.dims import Hidden, Positions, SegmentIds
from lte_jax.inputs import check_room
from lte_jax.layers import Linear, Recipe, RMSNorm, rotary
from lte_jax.mixers.base import Aux, Mixer, MixerConfig, Reading
from lte_jax.partition import window_attention
from pallas_kernels.window_attention import NEVER, Columns, window_attention_step

QK_NORM_EPS = 1e-5  # the authors' layer leaves its norms' default, whatever norm_eps says
BEFORE = -(2**29)  # stands for the position of a key that every query of a call has beyond its window


class RingCache(NamedTuple):
    """The last S tokens of each row's document. Rows count for themselves."""

    k: Float[Array, "B S K N"]
    v: Float[Array, "B S K N"]
    length: Int32[Array, "B"]


@dataclasses.dataclass(frozen=True)
class SoftmaxConfig(MixerConfig):
    """Settings of full attention, and of a window but for its width.

    Attributes:
      num_kv_heads: as many as heads by default.
      head_dim: width / num_heads by default.
      rope_theta: base of the rotary positions.
      qkv_bias: biases on the three input projections.
      qk_norm: an RMSNorm over each head of q and of k, before the rotation.
    """

    num_heads: int = 16
    num_kv_heads: int | None = None
    head_dim: int | None = None
    rope_theta: float = 10000.0
    qkv_bias: bool = False
    qk_norm: bool = False

    name: ClassVar[str]

    @property
    def window(self) -> int | None:
        """The keys that a token sees, itself included; None for all before it."""
        return None

    def validate(self, width: int) -> None:
        name, num_heads, head_dim = self.name, self.num_heads, self.head_dim
        if num_heads < 1:
            raise ValueError(f"{name}: num_heads={num_heads} must be at least 1")
        kv_heads = num_heads if self.num_kv_heads is None else self.num_kv_heads
        if kv_heads < 1 or num_heads % kv_heads:
            raise ValueError(f"{name}: num_kv_heads={kv_heads} must divide num_heads={num_heads}")
        if head_dim is None and width % num_heads:
            raise ValueError(f"{name}: num_heads={num_heads} must divide the width {width}, or head_dim must be given")
        size = width // num_heads if head_dim is None else head_dim
        if size < 2 or size % 2:
            raise ValueError(f"{name}: head_dim={size} must be even and at least 2, for rotary positions on halves")
        if self.rope_theta <= 0:
            raise ValueError(f"{name}: rope_theta={self.rope_theta} must be above 0")


class SoftmaxAttention(Mixer):
    """Causal attention over the last ``config.window`` tokens, or over all of them for None."""

    inputs = ("q_proj", "k_proj", "v_proj")

    def __init__(self, config: SoftmaxConfig, width: int, recipe: Recipe):
        config.validate(width)
        self.H = config.num_heads
        self.K = self.H if config.num_kv_heads is None else config.num_kv_heads
        self.N = width // self.H if config.head_dim is None else config.head_dim
        self.window = config.window
        self.rope_theta = config.rope_theta
        self.max_length = recipe.max_length
        self.implementation = recipe.implementation

        inner, kv = self.H * self.N, self.K * self.N
        self.q_proj = Linear(width, inner, recipe, axes=("embed", "heads"), use_bias=config.qkv_bias)
        self.k_proj = Linear(width, kv, recipe, axes=("embed", "kv_heads"), use_bias=config.qkv_bias)
        self.v_proj = Linear(width, kv, recipe, axes=("embed", "kv_heads"), use_bias=config.qkv_bias)
        self.o_proj = Linear(inner, width, recipe, axes=("heads", "embed"), residual=True)
        self.q_norm = RMSNorm(self.N, recipe, eps=QK_NORM_EPS) if config.qk_norm else None
        self.k_norm = RMSNorm(self.N, recipe, eps=QK_NORM_EPS) if config.qk_norm else None

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
        q, k, v = self._project(x, positions)
        o = window_attention(q, k, v, window=self.window, segment_ids=segment_ids, implementation=self.implementation)
        return self.o_proj(o.reshape(*x.shape[:2], -1)), {}

    def init_cache(self, batch: int, max_length: int | None, dtype: DTypeLike) -> RingCache:
        slots = (batch, self._slots(max_length), self.K, self.N)
        return RingCache(jnp.zeros(slots, dtype), jnp.zeros(slots, dtype), jnp.zeros((batch,), jnp.int32))

    def cache_bytes(self, batch: int, max_length: int | None, dtype: DTypeLike) -> int:
        return batch * (2 * self._slots(max_length) * self.K * self.N * jnp.dtype(dtype).itemsize + 4)

    def extend(
        self,
        x: Hidden,
        cache: RingCache,
        *,
        segment_ids: SegmentIds | None = None,
        reading: Reading = "streaming",
        context: Aux | None = None,
        wants_aux: bool = True,
    ) -> tuple[Hidden, RingCache, Aux]:
        B, T = x.shape[:2]
        if segment_ids is None:
            index = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
            real = jnp.ones((B, T), bool)
        else:
            real = segment_ids != 0
            index = jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1  # of a token among the chunk's tokens
        count = jnp.sum(real, axis=1, dtype=jnp.int32)
        if self.window is None:  # a full ring would lose tokens
            check_room(cache.length, count, cache.k.shape[1])
        q, k, v = self._project(x, jnp.maximum(cache.length[:, None] + index, 0))
        updated = _write(cache, k, v, index, real, count)
        if T == 1:
            filled = jnp.broadcast_to(updated.length[:, None], (B, self.K))
            keys, values = updated.k.astype(q.dtype), updated.v.astype(v.dtype)
            o = window_attention_step(q[:, 0], keys, values, filled, implementation=self.implementation)[:, None]
        else:
            o = self._extend_chunk(q, k, v, cache, segment_ids, real)
        return self.o_proj(o.reshape(B, T, -1)), updated, {}

    def _extend_chunk(
        self, q: Array, k: Array, v: Array, cache: RingCache, segment_ids: Array | None, real: Array
    ) -> Float[Array, "B T H N"]:
        """Attention of a chunk's tokens over the chunk, and over the ring as columns of the operation.

        A ring slot's token is beyond every chunk token's own window of T keys, and gone ``window`` tokens after it.
        """
        T, S = q.shape[1], cache.k.shape[1]
        slot = jnp.arange(S, dtype=jnp.int32)
        length = cache.length[:, None]
        back = (length - 1 - slot) % S + 1  # how long before the chunk's first token the slot's token came
        expiry = NEVER if self.window is None else self.window - back
        if segment_ids is not None and self.window is not None:
            # On the axis of the chunk's indices, where padding may stand before the first token.
            expiry = expiry + jnp.argmax(real, axis=1).astype(jnp.int32)[:, None]
        expiry = jnp.where(slot < length, expiry, 0)
        position = jnp.full(expiry.shape, BEFORE, jnp.int32)
        position, expiry = (jnp.broadcast_to(x[:, :, None], cache.k.shape[:3]) for x in (position, expiry))
        columns = Columns(cache.k.astype(k.dtype), cache.v.astype(v.dtype), position, expiry)
        return window_attention(
            q,
            k,
            v,
            window=T if self.window is None else min(self.window, T),
            columns=columns,
            segment_ids=None if segment_ids is None else real.astype(jnp.int32),
            implementation=self.implementation,
        )

    def _project(self, x: Hidden, positions: Positions) -> tuple[Array, Array, Array]:
        B, T = x.shape[:2]
        q, k, v = (
            linear(x).reshape(B, T, heads, self.N)
            for linear, heads in ((self.q_proj, self.H), (self.k_proj, self.K), (self.v_proj, self.K))
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotary(q, positions, self.rope_theta), rotary(k, positions, self.rope_theta), v

    def _slots(self, max_length: int | None) -> int:
        if self.window is not None:
            return self.window
        return self.max_length if max_length is None else max_length


def _write(cache: RingCache, k: Array, v: Array, index: Array, real: Array, count: Array) -> RingCache:
    """The cache after the chunk's tokens; of more than S tokens, the last S."""
    S = cache.k.shape[1]
    stays = real & (index >= count[:, None] - S)
    slot = jnp.where(stays, (cache.length[:, None] + index) % S, S)  # S is out of bounds: dropped
    row = jnp.arange(slot.shape[0])[:, None]
    return RingCache(
        cache.k.at[row, slot].set(k.astype(cache.k.dtype), mode="drop"),
        cache.v.at[row, slot].set(v.astype(cache.v.dtype), mode="drop"),
        cache.length + count,
    )
