"""How does LTE's router run on a mesh? Inside shard_map, each device on its rows, its KV heads and its tokens.

As the operations of ``partition.py``. Where tokens are split over ``sequence``, a shard receives the last tokens of the
one before and the first of the one after, as many as a score reads on each side. Dropout counts from a token's place in
the whole array, so that no mesh changes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from lte_jax import sharding
from lte_jax.partition_plan import KEYS, SEQUENCE, current_mesh
from pallas_kernels import router
from pallas_kernels.router import Convolution, Dropout


def router_scores(
    k: Array,
    v: Array,
    convolutions: Sequence[Convolution],
    weight: Array,
    bias: Array,
    *,
    dilations: Sequence[int],
    segment_ids: Array | None = None,
    dropout: Dropout | None = None,
    **options: Any,
) -> Array:
    """``pallas_kernels.router`` on the current mesh."""
    mesh = current_mesh()
    if mesh is None:
        return router.router_scores(
            k, v, convolutions, weight, bias, dilations=dilations, segment_ids=segment_ids, dropout=dropout, **options
        )
    taps = [conv.weight.shape[1] for conv in convolutions]
    halo = sum((count - 1) * dilation for count, dilation in zip(taps, dilations, strict=True)) // 2
    extent = (k.shape[1], k.shape[2])
    split = k.shape[1] // mesh.shape[SEQUENCE] >= max(halo, 1)
    place = sharding.spec((KEYS[0], KEYS[1] if split else None, *KEYS[2:]), k.shape, mesh, every=True)
    shards = mesh.shape[SEQUENCE] if place[1] else 1
    channels = [conv.weight.shape[2] for conv in convolutions]
    arrays = {
        "k": k,
        "v": v,
        "weights": (tuple(convolutions), weight, bias),
        "segments": segment_ids,
        "seeds": None if dropout is None else dropout.seeds,
    }
    heads = place[2] if bias.shape[0] > 1 else None
    specs = {
        "k": place,
        "v": place,
        "weights": jax.tree.map(lambda _: PartitionSpec(heads), arrays["weights"]),
        "segments": PartitionSpec(*place[:2]),
        "seeds": PartitionSpec(),
    }

    def local(arrays: dict[str, Any]) -> Array:
        rows, tokens, own_heads, _ = arrays["k"].shape
        around = halo if shards > 1 else 0
        if around:
            segments = arrays["segments"]
            segments = jnp.ones((rows, tokens), jnp.int32) if segments is None else segments
            # Beyond the row's ends there is nothing to receive: zeros, which is padding.
            parts = {"k": arrays["k"], "v": arrays["v"], "segments": segments}
            arrays = arrays | {name: _with_neighbours(x, around, shards) for name, x in parts.items()}
        masks = None
        if dropout is not None:
            token = _index(place[1]) * tokens - around
            whole = Dropout(dropout.rate, arrays["seeds"])
            masks = whole.at(_index(place[0]) * rows, token, _index(place[2]) * own_heads, extent, channels)
        r = router.router_scores(
            arrays["k"],
            arrays["v"],
            *arrays["weights"],
            dilations=dilations,
            segment_ids=arrays["segments"],
            dropout=masks,
            **options,
        )
        return r[:, around : around + tokens]

    out = PartitionSpec(*place[:3])
    return jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=out, check_vma=False)(arrays)


def _index(axes: str | tuple[str, ...] | None) -> Array:
    """Which of the shards over these mesh axes this device has."""
    return jnp.zeros((), jnp.int32) if axes is None else jax.lax.axis_index(axes)


def _with_neighbours(x: Array, halo: int, shards: int) -> Array:
    """The last ``halo`` tokens of the shard before, the own ones, the first ``halo`` of the shard after."""
    before = jax.lax.ppermute(x[:, -halo:], SEQUENCE, [(i, i + 1) for i in range(shards - 1)])
    after = jax.lax.ppermute(x[:, :halo], SEQUENCE, [(i + 1, i) for i in range(shards - 1)])
    return jnp.concatenate([before, x, after], axis=1)
