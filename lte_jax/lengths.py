"""Is a sequence longer than the model was made for (said, once), or than the device can hold (refused)?"""

from __future__ import annotations

import os
import warnings

import jax

from lte_jax.model import LanguageModel


class LengthWarning(UserWarning):
    """Sequences are longer than ``config.max_length``: they are read, but the model may not know what to do with them.

    The text is the same for every length, so that Python's filters show it once.
    """


def warn_beyond(longest: int, made_for: int, stacklevel: int = 3) -> None:
    """Warns where ``longest`` tokens are more than the model was made for."""
    if longest > made_for:
        text = f"sequences may be longer than the {made_for} tokens that the model was made for (max_length)"
        warnings.warn(text, LengthWarning, stacklevel=stacklevel)


def check_lengths(model: LanguageModel, rows: int, longest: int) -> None:
    """Warns as ``warn_beyond``, and refuses what cannot be: residuals [rows, longest, D] that outgrow the device.

    That is the least that a pass holds; how much more it takes depends on the layers and on the compiler.

    Raises:
      ValueError: the residuals of so many rows, in the model's dtype, are larger than the device's memory.
    """
    least = rows * longest * model.config.width * model.dtype.itemsize
    most = device_bytes()
    if most is not None and least > most:
        raise ValueError(
            f"{rows} rows of {longest:,} tokens: their residuals alone are {least / 2**30:,.0f} GiB, and the device "
            f"has {most / 2**30:,.0f}; shorten the rows or lower the batch size"
        )
    warn_beyond(longest, model.config.max_length, stacklevel=4)


def device_bytes() -> int | None:
    """The memory of a device: what JAX may use of an accelerator, all of the machine's on a CPU; None if unknown."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if os.environ.get("XLA_PYTHON_CLIENT_ALLOCATOR") == "cuda_async":
        return None  # its limit is what it has taken so far
    return (device.memory_stats() or {}).get("bytes_limit")
