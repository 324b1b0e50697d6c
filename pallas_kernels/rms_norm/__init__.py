"""RMS normalisation over the last dimension, with an optional SiLU gate, or of a residual stream."""

from pallas_kernels.rms_norm.api import residual_rms_norm, rms_norm

__all__ = ["residual_rms_norm", "rms_norm"]
