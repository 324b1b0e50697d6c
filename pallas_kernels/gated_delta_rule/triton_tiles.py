"""Which blocks, warps and stages do the delta rule's Triton kernels run with, and which have been seen to be right?

Triton 3.4 to 3.7 compiles some backward kernels to wrong code on Hopper, silently. So a choice counts only once the
whole GPU suite, whose truth is the float64 recurrence, has passed with it on an H200: then it is entered in
``CHECKED``, and a test holds every choice to that table.
"""

from __future__ import annotations

import dataclasses

HEAD_SIZES = (64, 128, 256)


@dataclasses.dataclass(frozen=True)
class Tile:
    """``block`` is the number of value columns of a scan, or of key columns of the gradient kernel."""

    block: int
    warps: int
    stages: int


def choose(kernel: str, head_size: int) -> Tile:
    """The tile of a kernel: the fastest of those timed on an H200 at the benchmark's shapes."""
    return _CHOICES[kernel, head_size]


_CHOICES = {
    ("within", 64): Tile(64, 4, 1),
    ("within", 128): Tile(64, 4, 1),
    ("within", 256): Tile(64, 4, 1),
    ("scan", 64): Tile(32, 4, 2),
    ("scan", 128): Tile(32, 4, 2),
    ("scan", 256): Tile(32, 4, 2),
    ("reverse_scan", 64): Tile(64, 4, 2),
    ("reverse_scan", 128): Tile(64, 4, 2),
    ("reverse_scan", 256): Tile(64, 4, 2),
    ("pairs", 64): Tile(64, 4, 3),
    ("pairs", 128): Tile(64, 4, 3),
    ("pairs", 256): Tile(64, 4, 3),
    ("gradients", 64): Tile(64, 4, 1),
    ("gradients", 128): Tile(64, 4, 1),
    ("gradients", 256): Tile(64, 4, 1),
}

CHECKED: frozenset[tuple[str, int, Tile]] = frozenset(
    {
        ("within", 64, Tile(64, 4, 1)),
        ("scan", 64, Tile(32, 4, 2)),
        ("reverse_scan", 64, Tile(64, 4, 2)),
        ("pairs", 64, Tile(64, 4, 3)),
        ("gradients", 64, Tile(64, 4, 1)),
    }
)
