"""What a backward pass keeps and what it computes again: rematerialisation policies by name."""

from __future__ import annotations

from collections.abc import Callable

import jax

# The names that the operations give to their outputs and to the residuals of their backward passes.
KERNEL_NAMES = tuple(
    f"{operation}_{part}"
    for operation in ("gated_delta_rule", "window_attention", "block_attention", "short_convolution")
    for part in ("out", "residual")
)

POLICIES: dict[str, Callable | None] = {
    "none": None,  # keep everything
    "full": jax.checkpoint_policies.nothing_saveable,  # keep the input of each repeat of the pattern
    "kernels": jax.checkpoint_policies.save_only_these_names(*KERNEL_NAMES),  # no kernel runs twice
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(*KERNEL_NAMES),
    ),  # neither a kernel nor a projection runs twice
}


def checkpointed(function: Callable, policy: str) -> Callable:
    """``function`` under the named policy.

    Raises:
      ValueError: the name is unknown.
    """
    if policy not in POLICIES:
        raise ValueError(f"remat={policy!r} is not one of {', '.join(POLICIES)}")
    if policy == "none":
        return function
    return jax.checkpoint(function, policy=POLICIES[policy], prevent_cse=False)
