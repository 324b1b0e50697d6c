"""Causal attention within a window, plus retained columns that outlive it."""

from pallas_kernels.window_attention.api import (
    NEVER,
    Columns,
    DecodeCache,
    window_attention,
    window_attention_step,
    window_attention_update_step,
)

__all__ = [
    "NEVER",
    "Columns",
    "DecodeCache",
    "window_attention",
    "window_attention_step",
    "window_attention_update_step",
]
