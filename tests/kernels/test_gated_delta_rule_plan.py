"""Which tiles and segments the delta rule's kernels choose."""

from __future__ import annotations

import dataclasses

import pytest

from pallas_kernels.gated_delta_rule import segments as split
from pallas_kernels.gated_delta_rule import triton_tiles

# (block, warps, stages, keys) by kernel and head size with which ``test_gated_delta_rule.py`` has passed on an H200.
CHECKED = {
    ("scan", 64): {(32, 4, 2, 256)},
    ("scan", 128): {(32, 4, 2, 256), (64, 4, 2, 64)},
    ("scan", 256): {(32, 4, 2, 64), (128, 8, 2, 64)},
    ("reverse_scan", 64): {(64, 4, 2, 256)},
    ("reverse_scan", 128): {(64, 4, 2, 256), (128, 8, 2, 256)},
    ("reverse_scan", 256): {(16, 4, 2, 64), (128, 8, 2, 64)},
    **{("within", size): {(64, 4, 1, 256)} for size in (64, 128, 256)},
    **{("pairs", size): {(64, 4, 3, 256)} for size in (64, 128, 256)},
    **{("gradients", size): {(64, 4, 1, 256)} for size in (64, 128, 256)},
}


@pytest.mark.parametrize(("kernel", "size"), CHECKED)
def test_only_checked_tiles_are_chosen(kernel, size):
    chosen = {dataclasses.astuple(triton_tiles.choose(kernel, size, values)) for values in (size, 8192, 2**20)}
    assert chosen == CHECKED[kernel, size]


def test_wide_tiles_are_for_many_programs_on_hopper(monkeypatch):
    narrow = triton_tiles.choose("scan", 256)
    assert triton_tiles.choose("scan", 256, 64 * 128 - 128) == narrow != triton_tiles.choose("scan", 256, 64 * 128)
    monkeypatch.setattr(triton_tiles, "_hopper", lambda: False)
    assert triton_tiles.choose("scan", 256, 64 * 128) == narrow


@pytest.mark.parametrize("programs", [1, 16, 33, 34, 128])
@pytest.mark.parametrize("chunks", [1, 47, 48, 49, 512, 1000])
@pytest.mark.parametrize("wanted", [132, 256])
def test_split_covers_every_chunk_once(programs, chunks, wanted):
    plan = split.plan(programs, chunks, wanted)
    assert (plan.segments - 1) * plan.length < chunks <= plan.segments * plan.length
    assert plan.segments == 1 or (programs <= 33 and plan.segments > 2 and plan.length >= 16)
