"""Does window attention refuse every wrong argument, naming it?"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dispatch import UnsupportedCase
from pallas_kernels.window_attention import Columns, window_attention, window_attention_step

BAD = {
    "q has shape": dict(q=np.zeros((2, 5, 4), np.float32)),
    "k has shape": dict(k=np.zeros((2, 9, 2, 7), np.float32)),
    "v has shape": dict(v=np.zeros((2, 8, 2, 3), np.float32)),
    "k has dtype float16": dict(k=np.zeros((2, 9, 2, 6), np.float16)),
    "v has dtype bfloat16": dict(v=jnp.zeros((2, 9, 2, 3), jnp.bfloat16)),
    "q has dtype int32": dict(q=np.zeros((2, 5, 4, 6), np.int32)),
    "must be a multiple": dict(q=np.zeros((2, 5, 3, 6), np.float32)),
    "queries are the last": dict(q=np.zeros((2, 10, 4, 6), np.float32)),
    "q has shape .* with T at least 1": dict(q=np.zeros((2, 0, 4, 6), np.float32)),
    "window=0": dict(window=0),
    "window=2.0": dict(window=2.0),
    "expiry is given without a window": dict(window=None, expiry=np.zeros((2, 9, 2), np.int32)),
    "scores has shape": dict(scores=np.zeros((2, 5, 2), np.float32)),
    "scores has dtype": dict(scores=np.zeros((2, 9, 2), np.float16)),
    "expiry has shape": dict(expiry=np.zeros((2, 9, 4), np.int32)),
    "expiry has dtype": dict(expiry=np.zeros((2, 9, 2), np.float32)),
    "segment_ids has shape": dict(segment_ids=np.ones((2, 5), np.int32)),
    "segment_ids has dtype": dict(segment_ids=np.ones((2, 9), bool)),
    "columns is tuple": dict(columns=(1, 2, 3, 4)),
    "columns.v has shape": dict(
        columns=Columns(
            np.zeros((2, 3, 2, 6), np.float32),
            np.zeros((2, 3, 2, 6), np.float32),
            *[np.zeros((2, 3, 2), np.int32)] * 2,
        )
    ),
    "scale=nan": dict(scale=float("nan")),
    "scale is 'x'": dict(scale="x"),
    "is not one of": dict(implementation="cuda"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    good = dict(q=np.zeros((2, 5, 4, 6), np.float32), k=np.zeros((2, 9, 2, 6), np.float32))
    good |= dict(v=np.zeros((2, 9, 2, 3), np.float32), window=4)
    arguments = good | BAD[message]
    with pytest.raises(UnsupportedCase, match=message):
        window_attention(*(arguments.pop(name) for name in "qkv"), arguments.pop("scores", None), **arguments)


def test_step_bad_arguments():
    q, k, v = np.zeros((2, 4, 6), np.float32), np.zeros((2, 9, 2, 6), np.float32), np.zeros((2, 9, 2, 3), np.float32)
    valid = np.ones((2, 9), bool)
    for message, arguments in {
        "q has shape": (q[None], k, v, valid),
        r"k\[0\] has shape": (q, k[..., :5], v, valid),
        r"v\[0\] has shape": (q, k, v[:, 1:], valid),
        r"v\[1\] has dtype": (q, (k, k), (v, v.astype(np.float16)), (valid, valid)),
        "groups": (q, (k, k), (v,), valid),
        r"valid\[0\] is float32": (q, k, v, valid.astype(np.float32)),
        r"valid\[0\] is bool": (q, k, v, valid[:, 1:]),
    }.items():
        with pytest.raises(UnsupportedCase, match=message):
            window_attention_step(*arguments)
