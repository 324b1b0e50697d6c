"""Which stretches of time and channels do the short convolution's Triton kernels work on?"""

from __future__ import annotations

import dataclasses

from pallas_kernels.tiles import power_of_2


@dataclasses.dataclass(frozen=True)
class Tile:
    """A program's ``width`` channels and ``chunk`` tokens; it loads ``rows`` tokens at a time (a divisor of chunk)."""

    width: int
    chunk: int
    rows: int
    warps: int


# By kernel and whether there are documents: the fastest of those timed on an H200 at (8, 4096, 1024) bfloat16, all of 4
# channels for each thread. With 8, the forward pass needs so many registers that few warps fit; with 2, there are too
# few bytes on their way.
_CHOICES = {
    ("forward", False): Tile(512, 64, 8, 4),
    ("forward", True): Tile(512, 64, 8, 4),
    ("backward", False): Tile(1024, 128, 8, 8),
    ("backward", True): Tile(512, 64, 8, 4),
}


def choose(kernel: str, channels: int, packed: bool) -> Tile:
    """The tile of a kernel ("forward" or "backward"), narrower where there are fewer channels."""
    tile = _CHOICES[kernel, packed]
    width = min(tile.width, power_of_2(channels, 32))
    return dataclasses.replace(tile, width=width, warps=max(tile.warps * width // tile.width, 1))
