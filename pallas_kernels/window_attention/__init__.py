"""Causal attention within a window, plus retained columns that outlive it."""

from pallas_kernels.window_attention.api import NEVER, Columns, window_attention, window_attention_step

__all__ = ["NEVER", "Columns", "window_attention", "window_attention_step"]
