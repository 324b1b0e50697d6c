"""How is a write in the background that fails known at once, and not when all processes have waited for one another?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orbax.checkpoint as ocp


class WatchedHandler(ocp.StandardCheckpointHandler):
    """Tells at once when writing fails, before Orbax waits for the other processes to say so."""

    def __init__(self, on_failure: Callable[[BaseException], None]):
        super().__init__()
        self._on_failure = on_failure

    async def async_save(self, *args: Any, **kwargs: Any) -> Any:
        writes = await super().async_save(*args, **kwargs)
        return [_Write(write, self._on_failure) for write in writes or ()]


class _Write:
    """One write in the background, with Orbax's interface of a future."""

    def __init__(self, write: Any, on_failure: Callable[[BaseException], None]):
        self._write, self._on_failure = write, on_failure

    def result(self, timeout: float | None = None) -> Any:
        try:
            return self._write.result(timeout=timeout)
        except BaseException as error:
            self._on_failure(error)
            raise
