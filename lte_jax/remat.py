"""What a backward pass keeps and what it computes again: rematerialisation policies by name."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name

# The names that the operations give to their outputs and to the residuals of their backward passes.
KERNEL_NAMES = tuple(
    f"{operation}_{part}"
    for operation in (
        "gated_delta_rule",
        "window_attention",
        "block_attention",
        "short_convolution",
        "rms_norm",
        "router",
    )
    for part in ("out", "residual")
)
OPERAND = "operand"
"""The name of what a product or a kernel reads and neither wrote: norms, rotated q and k, activations."""

_keep = jax.checkpoint_policies.save_only_these_names
_keep_products = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
_both = jax.checkpoint_policies.save_from_both_policies

POLICIES: dict[str, Callable | None] = {
    "none": None,  # keep everything
    "full": jax.checkpoint_policies.nothing_saveable,  # keep the input of each repeat of the pattern
    "kernels": _keep(*KERNEL_NAMES),  # no kernel runs twice
    "dots": _both(_keep_products, _keep(*KERNEL_NAMES)),  # neither a kernel nor a projection runs twice
    "operands": _both(_keep_products, _keep(*KERNEL_NAMES, OPERAND)),  # nor is what they read computed twice
}


def operand(x: jax.Array) -> jax.Array:
    """``x``, by the name under which the policy "operands" keeps it."""
    return checkpoint_name(x, OPERAND)


def checkpointed(function: Callable, policy: str, *, unrolled: bool = False) -> Callable:
    """``function`` under the named policy.

    Args:
      unrolled: the function is not the body of a loop. The compiler must then be kept from finding what is computed
        again equal to what was computed first, and keeping that.

    Raises:
      ValueError: the name is unknown.
    """
    if policy not in POLICIES:
        raise ValueError(f"remat={policy!r} is not one of {', '.join(POLICIES)}")
    if policy == "none":
        return function
    return jax.checkpoint(function, policy=POLICIES[policy], prevent_cse=unrolled)
