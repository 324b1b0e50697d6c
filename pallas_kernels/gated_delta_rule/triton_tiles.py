"""Which blocks, warps and stages do the delta rule's Triton kernels run with?

Triton 3.4 to 3.7 compiles some backward kernels to wrong code on Hopper, silently. So a test holds every choice to
those with which all GPU tests, whose truth is the float64 recurrence, have passed on an H200
(``test_gated_delta_rule.py``; the list is in ``test_gated_delta_rule_plan.py``).
"""

from __future__ import annotations

import dataclasses

import jax

HEAD_SIZES = (64, 128, 256)


@dataclasses.dataclass(frozen=True)
class Tile:
    """``block`` is the number of value columns of a scan, or of key columns of the gradient kernel.

    A scan multiplies ``keys`` of a state's key columns at a time: fewer need fewer registers.
    """

    block: int
    warps: int
    stages: int
    keys: int = 256


def choose(kernel: str, head_size: int, values: int = 0) -> Tile:
    """The tile of a kernel: the fastest of those timed on an H200 at the benchmark's shapes.

    ``values`` are all columns of values that the launch works on at once, of every head, row and segment.
    """
    least, wide = _WIDE.get((kernel, head_size), (0, None))
    return wide if wide and values >= least and _hopper() else _CHOICES[kernel, head_size]


def _hopper() -> bool:
    """Whether kernels are made for Hopper, as where there is no GPU to ask: its products want 64 rows and 8 warps."""
    device = jax.local_devices()[0]
    return device.platform != "gpu" or device.compute_capability == "9.0"


# From how many columns of values on, and which: with fewer, narrow blocks are more programs for the multiprocessors.
_WIDE = {
    ("scan", 128): (64 * 128, Tile(64, 4, 2, keys=64)),
    ("scan", 256): (64 * 128, Tile(128, 8, 2, keys=64)),
    ("reverse_scan", 128): (128 * 128, Tile(128, 8, 2)),
    ("reverse_scan", 256): (64 * 128, Tile(128, 8, 2, keys=64)),
}


_CHOICES = {
    ("within", 64): Tile(64, 4, 1),
    ("within", 128): Tile(64, 4, 1),
    ("within", 256): Tile(64, 4, 1),
    ("scan", 64): Tile(32, 4, 2),
    ("scan", 128): Tile(32, 4, 2),
    ("scan", 256): Tile(32, 4, 2, keys=64),
    ("reverse_scan", 64): Tile(64, 4, 2),
    ("reverse_scan", 128): Tile(64, 4, 2),
    ("reverse_scan", 256): Tile(16, 4, 2, keys=64),
    ("pairs", 64): Tile(64, 4, 3),
    ("pairs", 128): Tile(64, 4, 3),
    ("pairs", 256): Tile(64, 4, 3),
    ("gradients", 64): Tile(64, 4, 1),
    ("gradients", 128): Tile(64, 4, 1),
    ("gradients", 256): Tile(64, 4, 1),
}
