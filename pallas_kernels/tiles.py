"""Which tiles fit a GPU: allowed sizes, the shared-memory budget, and the words for breaking a rule."""

from __future__ import annotations

import jax

from pallas_kernels.dispatch import UnsupportedCase

HOPPER = 90

# Bytes of shared memory that one program may use, by compute capability (CUDA C++ programming guide, table of limits).
SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}


def ceil_div(length: int, tile: int) -> int:
    """How many tiles cover ``length``."""
    return -(-length // tile)


def power_of_2(size: int, least: int = 1) -> int:
    """The smallest power of two that is neither below ``size`` nor below ``least``, itself one."""
    return max(least, 1 << (size - 1).bit_length())


def capability() -> int:
    """Compute capability, 90 for 9.0, of the GPU that kernels are made for; Hopper's where there is none to ask."""
    device = jax.local_devices()[0]
    if device.platform != "gpu":
        return HOPPER
    digits = str(device.compute_capability).replace(".", "")
    return int(digits) if digits.isdigit() else 0  # none of NVIDIA's


def check_shared_memory(operation: str, buffers: dict[str, int], capability: int = 90) -> int:
    """Adds up ``buffers`` (name -> bytes) and raises UnsupportedCase, listing them, if one program cannot hold them.

    Compiling a kernel that asks for too much can take very long before it fails, so this comes first.

    Returns:
      The total in bytes.
    """
    total, limit = sum(buffers.values()), SHARED_BYTES[capability]
    if total > limit:
        parts = ", ".join(f"{name} {size}" for name, size in buffers.items())
        raise UnsupportedCase(
            f"{operation}: {total} bytes of shared memory ({parts}) are more than the {limit} of compute capability "
            f"{capability / 10}; use smaller tiles or implementation='xla'"
        )
    return total
