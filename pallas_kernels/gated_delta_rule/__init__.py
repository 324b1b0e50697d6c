"""The gated delta rule: chunks for training and prompts, one step for decoding."""

from pallas_kernels.gated_delta_rule.api import gated_delta_rule, gated_delta_rule_step

__all__ = ["gated_delta_rule", "gated_delta_rule_step"]
