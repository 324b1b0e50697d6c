"""How much memory will a run take on each device? Said before it is launched, from shapes and from the compiler."""

from __future__ import annotations

import math
from typing import Any

import jax


def bytes_per_device(abstract: Any) -> int:
    """Bytes that a tree of ``jax.ShapeDtypeStruct`` with shardings takes on one device."""
    total = 0
    for leaf in jax.tree.leaves(abstract):
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        total += math.prod(shape) * leaf.dtype.itemsize
    return total


def report(state: Any, compiled: Any) -> str:
    """One line: weights, optimiser, the compiled step's own working memory, and what the device has.

    Args:
      state: a ``TrainState`` of abstract arrays.
      compiled: the compiled step, whose state is donated.
    """
    parts = {
        "weights": bytes_per_device(state.params),
        "optimiser": bytes_per_device(state.optimizer),
    }
    analysis = compiled.memory_analysis()
    if analysis is not None:
        parts["activations and gradients"] = analysis.temp_size_in_bytes
    total = sum(parts.values())
    text = ", ".join(f"{name} {_size(size)}" for name, size in parts.items())
    return f"memory per device: {text}; together {_size(total)}{_limit(total)}"


def _limit(total: int) -> str:
    stats = jax.local_devices()[0].memory_stats() or {}
    limit = stats.get("bytes_limit")
    if not limit:
        return ""
    verdict = "fits" if total < 0.95 * limit else "DOES NOT FIT: lower batch_size, raise accumulation or use remat"
    return f" of {_size(limit)} ({verdict})"


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.1f} MiB"
