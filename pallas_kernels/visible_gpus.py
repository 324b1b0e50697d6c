"""Which GPUs does a process see? Asked before JAX is there: by launchers, and by tests that share a machine's GPUs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """The names in CUDA_VISIBLE_DEVICES, else the numbers of this machine's GPUs; none where JAX takes a CPU."""
    if environment.get("JAX_PLATFORMS", "").startswith("cpu"):
        return []
    named = environment.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip() not in ("", "-1")]
    numbers = [path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia*")]
    return sorted((number for number in numbers if number.isdigit()), key=int)
