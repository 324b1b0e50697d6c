"""Which stretches of time and channels do the short convolution's Triton kernels work on?"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Tile:
    """A program's ``width`` channels and ``chunk`` tokens; it loads ``rows`` tokens at a time (a divisor of chunk)."""

    width: int
    chunk: int
    rows: int
    warps: int


# The fastest of those timed on an H200 at (8, 4096, 1024) bfloat16: 8 channels for each thread forward, 4 backward.
_CHOICES = {"forward": Tile(512, 64, 8, 2), "backward": Tile(512, 128, 8, 4)}


def choose(kernel: str, channels: int) -> Tile:
    """The tile of a kernel ("forward" or "backward"), narrower where there are fewer channels."""
    tile = _CHOICES[kernel]
    width = min(tile.width, max(32, 1 << (channels - 1).bit_length()))
    return dataclasses.replace(tile, width=width, warps=max(tile.warps * width // tile.width, 1))
