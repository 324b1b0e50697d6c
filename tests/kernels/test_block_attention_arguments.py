"""Does block attention refuse every wrong argument, naming it, and take every right one?"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_attention import block_attention, block_attention_extend, init_block_cache
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


def test_numbers_of_documents_may_be_negative():
    """All three branches take a document by its number, whatever its sign; 0 alone is padding."""
    ids = jnp.asarray([[0] * 2 + [1] * 19 + [0] * 3 + [2] * 16], jnp.int32)
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v = (jax.random.normal(key, (1, 40, heads, 16)) for key, heads in zip(keys[:3], (4, 2, 2), strict=True))
    gates = jax.random.uniform(keys[3], (1, 40, 4, 3))
    run = functools.partial(block_attention, block_size=4, block_counts=2, window=5, implementation="xla")
    expected = run(q, k, v, gates, segment_ids=ids)
    np.testing.assert_array_equal(run(q, k, v, gates, segment_ids=jnp.where(ids == 2, -7, ids)), expected)
    extend = functools.partial(block_attention_extend, block_size=4, block_counts=2, window=5, implementation="xla")
    cache = init_block_cache(1, 64, 2, 16, 16, 4, jnp.float32)
    real = (ids[:, :21] != 0).astype(jnp.int32)
    arrays = [x[:, :21] for x in (q, k, v, gates)]
    first, second = (jax.tree.leaves(extend(*arrays, cache, segment_ids=ids)) for ids in (real, -real))
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)
