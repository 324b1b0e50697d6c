"""Does the gated delta rule refuse every wrong argument, naming it and the rule?"""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from pallas_kernels.dispatch import UnsupportedCase
from pallas_kernels.gated_delta_rule import gated_delta_rule, gated_delta_rule_step

BAD = {
    "q_rank": (dict(q=jnp.zeros((2, 3, 4))), "q has shape"),
    "k_size": (dict(k=jnp.zeros((2, 3, 2, 9))), r"k has shape .* \[B, T, K, N\] with N = 5"),
    "v_tokens": (dict(v=jnp.zeros((2, 4, 6, 7))), r"v has shape .* \[B, T, H, V\] with T = 3"),
    "heads": (dict(v=jnp.zeros((2, 3, 5, 7)), g=jnp.zeros((2, 3, 5)), beta=jnp.zeros((2, 3, 5))), "multiple of K"),
    "beta_shape": (dict(beta=jnp.zeros((2, 3, 5))), r"beta has shape .* \[B, T, H\] with H = 6"),
    "g_dtype": (dict(g=jnp.zeros((2, 3, 6), jnp.bfloat16)), "g has dtype bfloat16"),
    "beta_dtype": (dict(beta=jnp.zeros((2, 3, 6), jnp.int32)), "beta has dtype int32"),
    "q_dtype": (dict(q=jnp.zeros((2, 3, 2, 5), jnp.int32)), "q has dtype int32"),
    "k_dtype": (dict(k=jnp.zeros((2, 3, 2, 5), jnp.bfloat16)), "k has dtype bfloat16"),
    "v_dtype": (dict(v=jnp.zeros((2, 3, 6, 7), jnp.bfloat16)), "v has dtype bfloat16"),
    "state_shape": (
        dict(initial_state=jnp.zeros((2, 6, 7, 5))),
        r"initial_state has shape .* \[B, H, N, V\] with N = 5",
    ),
    "state_dtype": (dict(initial_state=jnp.zeros((2, 6, 5, 7), jnp.bfloat16)), "initial_state has dtype"),
    "segments_shape": (dict(segment_ids=jnp.ones((2, 4), jnp.int32)), "segment_ids"),
    "segments_dtype": (dict(segment_ids=jnp.ones((2, 3))), "segment_ids has dtype"),
    "no_tokens": (dict(q=jnp.zeros((2, 0, 2, 5))), "at least 1"),
    "not_array": (dict(q=None), "q has type NoneType"),
    "implementation": (dict(implementation="cuda"), "'cuda' is not one of"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    changes, message = BAD[name]
    arguments = dict(
        q=jnp.zeros((2, 3, 2, 5)), k=jnp.zeros((2, 3, 2, 5)), v=jnp.zeros((2, 3, 6, 7)), g=jnp.zeros((2, 3, 6)),
        beta=jnp.zeros((2, 3, 6)),
    )  # fmt: skip
    with pytest.raises(UnsupportedCase, match=message):
        gated_delta_rule(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("state", None, "state has type NoneType"),
        ("state", jnp.zeros((2, 6, 7, 5)), r"state has shape .* \[B, H, N, V\] with N = 5"),
        ("active", jnp.ones((3,), bool), "active"),
        ("active", jnp.ones((2,), jnp.int32), "active has dtype"),
        ("q", jnp.zeros((2, 1, 2, 5)), "q has shape"),
    ],
)
def test_bad_step_input(name, value, message):
    arguments = dict(
        q=jnp.zeros((2, 2, 5)), k=jnp.zeros((2, 2, 5)), v=jnp.zeros((2, 6, 7)), g=jnp.zeros((2, 6)),
        beta=jnp.zeros((2, 6)), state=jnp.zeros((2, 6, 5, 7)),
    )  # fmt: skip
    with pytest.raises(UnsupportedCase, match=message):
        gated_delta_rule_step(**{**arguments, name: value})
