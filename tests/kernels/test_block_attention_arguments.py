"""Does block attention refuse every wrong argument, naming it?"""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from pallas_kernels.block_attention import block_attention
from pallas_kernels.dispatch import UnsupportedCase
from tests.kernels.test_block_attention import NAMES, OPTIONS, draw


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(k=lambda x: x[:, :, :, :3]), "k has shape"),
        (dict(v=lambda x: x[:, 1:]), "v has shape"),
        (dict(gates=lambda x: x[..., :2]), r"gates has shape .* \[B, T, H, 3\]"),
        (dict(v=lambda x: x.astype(jnp.bfloat16)), "v has dtype bfloat16; it must be float32"),
        (dict(q=lambda x: x[:, :, :3], gates=lambda x: x[:, :, :3]), "must be a multiple"),
        (dict(block_size=0), "block_size=0"),
        (dict(block_counts=True), "block_counts=True"),
        (dict(window=2.5), "window=2.5"),
        (dict(scale=float("nan")), "scale=nan"),
        (dict(segment_ids=jnp.ones((1, 5), jnp.int32)), "segment_ids has shape"),
        (dict(implementation="cuda"), "'cuda' is not one of"),
    ],
)
def test_bad_arguments_are_named(change, message):
    named = dict(zip(NAMES, draw(0, 1, 9, 4, 2, 8, 8), strict=True))
    options = dict(OPTIONS)
    for name, value in change.items():
        if name in named:
            named[name] = value(named[name])
        else:
            options[name] = value
    with pytest.raises(UnsupportedCase, match=message):
        block_attention(**named, **options)
