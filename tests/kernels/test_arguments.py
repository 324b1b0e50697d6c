"""Does every operation refuse every argument of another rank, size, type or kind with its own error, before it runs?"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest

from pallas_kernels import block_attention as blocks
from pallas_kernels import gated_deltanet as layer
from pallas_kernels import lte_inputs
from pallas_kernels import window_attention as windows
from pallas_kernels.cross_entropy import cross_entropy
from pallas_kernels.dispatch import UnsupportedCase
from pallas_kernels.gated_delta_rule import gated_delta_rule, gated_delta_rule_step
from pallas_kernels.lte_inputs.api import Operands
from pallas_kernels.rms_norm import residual_rms_norm, rms_norm
from pallas_kernels.router import Convolution, Dropout, router_scores
from pallas_kernels.row_product import row_product
from pallas_kernels.short_convolution import short_convolution, short_convolution_step

B, T, U, C, H, K, N, V = 2, 5, 9, 3, 4, 2, 8, 6


def numbers(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def integers(*shape: int) -> np.ndarray:
    return np.ones(shape, np.int32)


ACTIVE = np.ones(B, bool)
TOKENS = dict(q=numbers(B, T, H, N), k=numbers(B, T, K, N), v=numbers(B, T, K, V))
TOKEN = dict(q=numbers(B, H, N), k=numbers(B, K, N), v=numbers(B, K, V))
NSA = dict(TOKENS, gates=numbers(B, T, H, 3), block_size=4, block_counts=2, window=3, segment_ids=integers(B, T))
DELTA = dict(q=numbers(B, T, K, N), k=numbers(B, T, K, N), v=numbers(B, T, H, V), g=-numbers(B, T, H))
LTE_CONVOLUTIONS = tuple(
    lte_inputs.Convolution(numbers(K, 3, c, c // 2), numbers(K, c // 2), 2) for c in (2 * N, N, N // 2)
)
# Name -> the operation and good arguments.
OPERATIONS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "cross_entropy": (cross_entropy, dict(logits=numbers(3, 5), labels=integers(3), dtype="float32")),
    "rms_norm": (rms_norm, dict(x=numbers(3, 5), weight=numbers(5), gate=numbers(3, 5), eps=1e-6, dtype="float32")),
    "residual_rms_norm": (residual_rms_norm, dict(x=numbers(3, 5), weight=numbers(5), eps=1e-6, dtype="float32")),
    "row_product": (
        row_product,
        dict(
            x=numbers(3, 5), weight=numbers(8, 5), norm=numbers(5), bias=numbers(8), residual=numbers(3, 8), eps=1e-6,
            widths=(5, 3), dtype="float32",
        ),
    ),
    "short_convolution": (
        short_convolution,
        dict(
            x=numbers(B, T, 7), weight=numbers(4, 7), segment_ids=integers(B, T), initial_state=numbers(B, 3, 7),
            activation="silu",
        ),
    ),
    "short_convolution_step": (
        short_convolution_step,
        dict(x=numbers(B, 7), weight=numbers(4, 7), state=numbers(B, 3, 7), active=ACTIVE, activation="silu"),
    ),
    "window_attention": (
        windows.window_attention,
        dict(
            q=numbers(B, T, H, N), k=numbers(B, U, K, N), v=numbers(B, U, K, V), scores=numbers(B, U, K), window=3,
            expiry=integers(B, U, K), segment_ids=integers(B, U), scale=1.0,
            columns=windows.Columns(numbers(B, C, K, N), numbers(B, C, K, V), integers(B, C, K), integers(B, C, K)),
        ),
    ),
    "window_attention_step": (
        windows.window_attention_step,
        dict(q=numbers(B, H, N), k=numbers(B, U, K, N), v=numbers(B, U, K, V), valid=np.ones((B, U), bool), scale=1.0),
    ),
    "window_attention_update_step": (
        windows.window_attention_update_step,
        dict(
            TOKEN, score=numbers(B, K), length=integers(B), sinks=1, reach=2, active=ACTIVE, scale=1.0,
            cache=windows.DecodeCache(
                numbers(B, U, K, N), numbers(B, U, K, V), numbers(B, U, K),
                numbers(B, C, K, N), numbers(B, C, K, V), integers(B, C, K), numbers(B, C, K),
            ),
        ),
    ),
    "router": (
        router_scores,
        dict(
            k=numbers(B, T, K, N), v=numbers(B, T, K, N), weight=numbers(K, 4), bias=numbers(K), dilations=(2, 2),
            convolutions=tuple(Convolution(numbers(K, 3, c, c // 2), numbers(K, c // 2)) for c in (2 * N, N)),
            method="sigmoid", segment_ids=integers(B, T), dropout=Dropout(0.1, np.ones((2, 2), np.uint32)),
        ),
    ),
    "lte_inputs": (
        lambda method, active, implementation=None, **arrays: lte_inputs.lte_inputs_step(
            Operands(**arrays), method=method, active=active, implementation=implementation
        ),
        dict(
            TOKEN | {"v": numbers(B, K, N)}, position=integers(B), cos=numbers(B, N // 2), sin=numbers(B, N // 2),
            recent=numbers(B, 12, K, 2 * N), convolutions=LTE_CONVOLUTIONS, weight=numbers(K, N // 4), bias=numbers(K),
            method="sigmoid", active=ACTIVE,
        ),
    ),
    "gated_deltanet": (
        layer.gated_deltanet_step,
        dict(
            inputs=layer.Projections(
                numbers(B, K * N), numbers(B, K * N), numbers(B, H * V), numbers(B, H), numbers(B, H), numbers(B, H * V)
            ),
            parameters=layer.Parameters(
                numbers(4, K * N), numbers(4, K * N), numbers(4, H * V), numbers(H), numbers(H), numbers(V)
            ),
            state=layer.State(
                numbers(B, H, N, V), numbers(B, 3, K * N), numbers(B, 3, K * N), numbers(B, 3, H * V)
            ),
            active=ACTIVE, eps=1e-6, beta_range=1.0,
        ),
    ),
    "gated_delta_rule": (
        gated_delta_rule,
        dict(
            DELTA, beta=numbers(B, T, H), segment_ids=integers(B, T), initial_state=numbers(B, H, N, V), scale=1.0
        ),
    ),
    "gated_delta_rule_step": (
        gated_delta_rule_step,
        dict(
            {name: x[:, 0] for name, x in DELTA.items()}, beta=numbers(B, H), state=numbers(B, H, N, V), active=ACTIVE,
            scale=1.0,
        ),
    ),
    "block_attention": (blocks.block_attention, dict(NSA, scale=1.0)),
    "block_attention_extend": (
        blocks.block_attention_extend,
        dict(
            NSA, scale=1.0,
            cache=blocks.init_block_cache(B, 16, K, N, V, 4, "float32"),
        ),
    ),
}  # fmt: skip

# Changed so, an argument is still a good one.
GOOD = {
    ("cross_entropy", "logits", "one column less"),
    ("residual_rms_norm", "x", "one row less"),
    ("residual_rms_norm", "x", "one axis more"),
    ("window_attention", "scale", "negative"),
    ("window_attention_step", "v", "one column less"),  # V is then one less
    ("block_attention", "v", "one column less"),
    ("window_attention_step", "scale", "negative"),
    ("window_attention_update_step", "scale", "negative"),
    ("window_attention_update_step", "sinks", "zero"),
    ("window_attention_update_step", "reach", "zero"),
    ("gated_delta_rule", "scale", "negative"),
    ("gated_delta_rule_step", "scale", "negative"),
    ("block_attention", "scale", "negative"),
    ("block_attention_extend", "scale", "negative"),
}


def spoiled(value: Any) -> Iterator[tuple[str, Any]]:
    """(what was done, the spoiled value): None is left out, as it stands for an absent array."""
    if isinstance(value, (np.ndarray, jax.Array)):
        value = np.asarray(value)
        yield "one axis more", value[None]
        yield "one column less", value[..., :-1]
        yield "one row less", value[:-1]
        yield "no rows", value[:0]
        yield "small integers", value.astype(np.int8)
        yield "float64", value.astype(np.float64)
        yield "a list", value.tolist()
    elif isinstance(value, tuple):
        names = getattr(value, "_fields", range(len(value)))
        for n, (name, part) in enumerate(zip(names, value, strict=True)):
            rebuild = value._make if hasattr(value, "_fields") else tuple
            yield from ((f"{name}: {how}", rebuild((*value[:n], x, *value[n + 1 :]))) for how, x in spoiled(part))
        yield "empty", ()
        if hasattr(value, "_fields"):
            yield "a plain tuple", tuple(value)
    elif isinstance(value, Dropout):
        yield from ((how, dataclasses.replace(value, seeds=x)) for how, x in spoiled(value.seeds))
        yield from ((how, dataclasses.replace(value, rate=x)) for how, x in spoiled(value.rate))
    elif isinstance(value, int):
        yield from {"negative": -1, "zero": 0, "a fraction": 2.5, "True": True, "numpy's": np.int64(2)}.items()
    elif isinstance(value, float):
        yield from {"nan": np.nan, "infinite": np.inf, "negative": -1.0}.items()
    if not isinstance(value, (np.ndarray, jax.Array)):
        yield "an array", numbers(2)
    yield "a word", "word"


@functools.cache
def cases(name: str) -> list[tuple[str, str, Any]]:
    arguments = OPERATIONS[name][1] | {"implementation": "xla"}
    return [(key, how, bad) for key, value in arguments.items() for how, bad in spoiled(value)]


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_spoiled_argument_is_refused_by_the_operation(name):
    operation, good = OPERATIONS[name]
    operation(**good)
    leaks = []
    for key, how, bad in cases(name):
        try:
            operation(**good | {key: bad})
            if (name, key, how) not in GOOD:
                leaks.append(f"{key}, {how}: taken")
        except UnsupportedCase:
            if (name, key, how) in GOOD:
                leaks.append(f"{key}, {how}: refused")
        except Exception as error:
            leaks.append(f"{key}, {how}: {type(error).__name__}: {error}")
    assert not leaks, "\n".join(leaks)


def test_the_good_changes_are_tried():
    assert {(name, key, how) for name in OPERATIONS for key, how, _ in cases(name)} >= GOOD
