"""Cross-entropy of float32 logits, with its gradient in the same call."""

from pallas_kernels.cross_entropy.api import cross_entropy
from pallas_kernels.cross_entropy.xla import statistics

__all__ = ["cross_entropy", "statistics"]
