"""Causal depthwise convolution over a few taps, with SiLU: whole sequences, and one step for decoding."""

from pallas_kernels.short_convolution.api import short_convolution, short_convolution_step

__all__ = ["short_convolution", "short_convolution_step"]
