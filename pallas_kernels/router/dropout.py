"""Dropout from a counter: which channels of which token are dropped is a hash of where they stand, and of two seeds.

No mask is stored, and forward pass, backward pass and every implementation find the same one, however the tokens are
tiled or spread over devices. With C channels, the two seeds (s, s') of a convolution and its token at row b, position t
and head h of T tokens and K heads, channels c and c + ceil(C/2) share one word,

    i = ((b T + t) K + h) ceil(C/2) + c mod ceil(C/2)
    x = i 0x9E3779B1 + s
    x = (x ^ x >> 16) 0x85EBCA6B,   x = (x ^ x >> 13 ^ s') 0xC2B2AE35,   word = x ^ x >> 16        (all modulo 2^32)

the first its lower, the second its upper 16 bits; a channel is kept where these are at least the threshold. The steps
are those of MurmurHash3's finaliser (public domain); the second seed inside keeps two draws from being one sequence at
two offsets, which they would be if seeds only moved the counter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, UInt32

STEP, FIRST, SECOND = 0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35


@dataclasses.dataclass(frozen=True)
class Dropout:
    """Dropout before each convolution.

    Attributes:
      rate: in [0, 1), rounded to a multiple of 2^-16; what is kept is divided by 1 - rate.
      seeds: two words for each convolution, :func:`draw_seeds`.
      extent: (T, K) of the whole array, where k and v are a part of it that begins elsewhere; ``seeds`` then come from
        :meth:`at`. None: they are the whole.
    """

    rate: float
    seeds: UInt32[Array, "convolutions 2"]
    extent: tuple[int, int] | None = None

    def at(self, row: Array, token: Array, head: Array, extent: tuple[int, int], channels: Sequence[int]) -> Dropout:
        """For a part of an array of ``extent`` whose first element stands there; ``channels`` of each convolution."""
        place = [x.astype(jnp.uint32) for x in (row, token, head)]
        first = (place[0] * jnp.uint32(extent[0]) + place[1]) * jnp.uint32(extent[1]) + place[2]
        steps = jnp.asarray([pairs(count) * STEP % 2**32 for count in channels], jnp.uint32)
        return Dropout(self.rate, self.seeds.at[:, 0].add(first * steps), extent)


def draw_seeds(key: Array, convolutions: int) -> UInt32[Array, "convolutions 2"]:
    return jax.random.bits(key, (convolutions, 2), jnp.uint32)


def pairs(channels: int) -> int:
    """Words per token and head."""
    return (channels + 1) // 2


def threshold(rate: float) -> int:
    return round(rate * 2**16)


def scale(threshold: int) -> float:
    """What kept channels are multiplied by."""
    return 1.0 / (1.0 - threshold / 2**16)


def keep(
    seeds: UInt32[Array, "2"], shape: tuple[int, int, int], channels: int, threshold: int, extent: tuple[int, int]
) -> Bool[Array, "B T K C"]:
    """Which channels stay."""
    place = [jax.lax.broadcasted_iota(jnp.uint32, shape, axis) for axis in range(3)]
    row = (place[0] * jnp.uint32(extent[0]) + place[1]) * jnp.uint32(extent[1]) + place[2]
    half = pairs(channels)
    x = row[..., None] * jnp.uint32(half) + jnp.arange(half, dtype=jnp.uint32)
    x = x * jnp.uint32(STEP) + seeds[0]
    x = (x ^ (x >> 16)) * jnp.uint32(FIRST)
    x = (x ^ (x >> 13) ^ seeds[1]) * jnp.uint32(SECOND)
    x = x ^ (x >> 16)
    bits = jnp.concatenate([x & jnp.uint32(0xFFFF), (x >> 16)[..., : channels - half]], axis=-1)
    return bits >= jnp.uint32(threshold)
