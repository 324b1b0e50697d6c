"""What do the other processes say? Words that travel through JAX's coordination service, without a device.

A collective of the devices waits for every process. One that has failed and does not come leaves the others there: an
abort on CPUs, a wait without end on GPUs. So what each process found by itself is told here, before the next one.
"""

from __future__ import annotations

import itertools
from typing import Any

import jax
from jax._src import distributed  # the service's client has no public name; Orbax takes it from here too

TIMEOUT_SECONDS = 1800
"""How much longer one process may take than another, to read its share of a checkpoint for example. A process that has
died ends the others sooner, by its heartbeat."""

_rounds = itertools.count()


class SilenceError(RuntimeError):
    """A process said nothing in time."""


def exchange(words: str) -> list[str]:
    """What each process says, by process index. All processes call this, equally often and in the same order.

    Raises:
      SilenceError: a process said nothing for ``TIMEOUT_SECONDS``.
    """
    if jax.process_count() == 1:
        return [words]
    client: Any = distributed.global_state.client
    topic = f"lte_jax/exchange/{next(_rounds)}"
    client.key_value_set(f"{topic}/{jax.process_index()}", words)
    heard = []
    for process in range(jax.process_count()):
        try:
            heard.append(client.blocking_key_value_get(f"{topic}/{process}", TIMEOUT_SECONDS * 1000))
        except jax.errors.JaxRuntimeError as error:
            raise SilenceError(
                f"process {process} said nothing for {TIMEOUT_SECONDS} s, or the coordinator is gone "
                f"({str(error).splitlines()[0]}): see its log, and start all processes again"
            ) from error
    return heard
