"""How is one long sequence split over the GPU, exactly?

The state after a segment of chunks is linear in the state S before it (transposed, [V,N], as the scans hold it):

    after = S F + end        F [N,N] the segment's transition, end [V,N] its state from zeros

All segments' F and end are found at once, by a scan over chunks: F is what becomes of the rows of the identity when
nothing is written. Then the states are passed from segment to segment, and the scan over chunks runs again with every
segment from its own state. Backwards the transition is the transpose of F, so only the ends are new.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Plan:
    """``segments`` stretches of ``length`` chunks; the last one may be shorter, but not empty."""

    segments: int
    length: int


# A split finds the states twice and the transitions besides: it pays where the scan alone would leave three quarters of
# the GPU idle.
_MOST_PROGRAMS = 33
_LEAST_CHUNKS = 16


def plan(programs: int, chunks: int, wanted: int) -> Plan:
    """How to split ``chunks``, if a scan without a split has ``programs`` independent blocks of 64 values.

    One segment if more than 33 programs (a quarter of an H200's 132 multiprocessors); else as many as make ``wanted``
    programs at most, of at least 16 chunks each.
    """
    segments = min(wanted // programs, chunks // _LEAST_CHUNKS) if programs <= _MOST_PROGRAMS else 1
    if segments < 3:
        return Plan(1, chunks)
    length = -(-chunks // segments)
    return Plan(-(-chunks // length), length)
