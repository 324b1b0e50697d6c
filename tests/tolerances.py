"""The one table of tolerances: what is compared, in which dtype, the bound, the largest error measured, and why.

``rms_error(actual, expected)`` is the norm of the difference over the norm of the expected array (the figure that every
bound speaks of). A bound is never loosened to make a test pass: find the cause of the difference instead.
"""

from __future__ import annotations

import numpy as np

# (what, dtype) -> bound. Beside each: the largest error measured, where, and its cause.
TOLERANCES: dict[tuple[str, str], float] = {
    # Against the float64 recurrence. 9.2e-7, at one dominant key (its system mixes entries 1e4 apart).
    ("gated_delta_rule", "float32"): 4e-6,
    # 4e-5: each token is a reflection, so an ulp in |k|^2 makes a state that grows with T, in any order of summing.
    ("gated_delta_rule_reflected", "float32"): 1e-4,
    # 1.7e-3: the rounding of the results to bfloat16.
    ("gated_delta_rule", "bfloat16"): 3e-3,
    # The bound that kernels are accepted at.
    ("gated_delta_rule_gpu", "bfloat16"): 5e-3,
    ("short_convolution", "float32"): 1e-6,  # 1.8e-7
    ("short_convolution", "bfloat16"): 3e-3,  # 1.9e-3: the rounding of the results
    ("row_product", "float32"): 2e-6,
    ("row_product", "bfloat16"): 4e-3,
    ("row_product", "float16"): 6e-4,
    ("rms_norm", "float32"): 1e-6,  # 1.6e-7
    ("rms_norm", "bfloat16"): 3e-3,  # 2.4e-3: the rounding of the results
    # float32 decays of exp(-exp(A) softplus): 4e-7. In 16 bits q, k and v are rounded before the state is read.
    ("gated_deltanet", "float32"): 2e-6,
    ("gated_deltanet", "bfloat16"): 5e-3,
    ("lte_inputs", "float32"): 1e-6,
    ("lte_inputs", "bfloat16"): 3e-3,
    # The rounding of the activations between the router's convolutions.
    ("lte_inputs score", "float32"): 3e-6,
    ("lte_inputs score", "bfloat16"): 1e-2,
    # window_attention against float64 loops over the rule, up to 90 keys: the order of float32 sums, and in 16 bits
    # the rounding of probabilities before they meet v.
    ("window_attention", "float32"): 2e-6,  # 2.0e-7 on a CPU
    ("window_attention gradient", "float32"): 2e-6,  # 3.9e-7 on a CPU
    ("window_attention", "bfloat16"): 5e-3,  # 2.1e-3
    ("window_attention gradient", "bfloat16"): 6e-3,  # 2.5e-3
    ("window_attention", "float16"): 7e-4,  # 2.6e-4
    ("window_attention gradient", "float16"): 8e-4,  # 3.1e-4
    ("block attention", "float32"): 2e-6,
    # XLA's against its float32, with the same blocks selected: 3.0e-3, dq; the rounding of results.
    ("block attention", "bfloat16"): 8e-3,
    # The router against float64 loops, or against itself in float32: in 16 bits, the rounding of weights and of x_n.
    ("router", "float32"): 2e-6,
    ("router gradient", "float32"): 2e-6,
    ("router", "bfloat16"): 1e-2,
    ("router gradient", "bfloat16"): 1e-2,
    ("router", "float16"): 2e-3,
    ("router gradient", "float16"): 2e-3,
    # A mixer or a model with itself by another route (pieces, packing, padding): other orders of float32 sums.
    ("mixer", "float32"): 1e-5,
    ("mixer", "bfloat16"): 2e-2,  # 1.4e-2, the gradient of gated_deltanet: the rounding of its projections and gates
    ("model", "float32"): 2e-5,
}


def rms_error(actual, expected) -> float:
    """||actual - expected|| / ||expected|| in float64; NaN anywhere gives NaN, which passes no comparison."""
    actual = np.asarray(actual, np.float64)
    expected = np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"shape {actual.shape} where {expected.shape} was expected"
    scale = np.linalg.norm(expected)
    return float(np.linalg.norm(actual - expected) / (scale if scale > 0 else 1.0))


def assert_close(actual, expected, what: str, dtype: str = "float32") -> None:
    """Fails unless rms_error is within the table's bound for (what, dtype)."""
    error, bound = rms_error(actual, expected), TOLERANCES[what, dtype]
    assert error <= bound, f"{what} ({dtype}): error {error:.3g} is above {bound:.3g}"
