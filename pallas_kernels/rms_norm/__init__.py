"""RMS normalisation over the last dimension, with an optional SiLU gate."""

from pallas_kernels.rms_norm.api import rms_norm

__all__ = ["rms_norm"]
