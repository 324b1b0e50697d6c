"""Which implementation of an operation runs: a named one or an error, or the fastest measured one.

Every operation has up to three implementations, each a module of its folder:

    "pallas"   Mosaic GPU, Hopper and newer
    "triton"   triton.language, Ampere and newer
    "xla"      plain jax.numpy, any device; also the reference

A backend module exposes ``check(case)``, which raises :class:`UnsupportedCase` before anything is launched, beside the
functions that its operation's ``api.py`` calls.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import jax

logger = logging.getLogger(__name__)

IMPLEMENTATIONS = ("pallas", "triton", "xla")

# A context of JAX's: what is traced within it is kept apart from what is traced outside, and never run there.
_lowering_for_gpu = jax.make_user_context(False)

recording = jax.make_user_context(None)
"""Where ``triton_call`` notes its calls. It is made here, as JAX wants its contexts made before it traces."""


class UnsupportedCase(ValueError):
    """An operation was asked for something that it, or the named implementation, does not do.

    The message states the value, the rule that it breaks, and what to do instead.
    """


def lowering_for_gpu() -> AbstractContextManager[None]:
    """Treats the process as one with a GPU, so that kernels can be lowered or compiled (not run) without one."""
    return _lowering_for_gpu(True)


def platform() -> str:
    """Of the device that what is traced now will run on, as far as ``jax.default_device`` and the backend tell."""
    chosen = jax.config.jax_default_device
    return jax.default_backend() if chosen is None else getattr(chosen, "platform", chosen)


def on_gpu() -> bool:
    return _lowering_for_gpu.value or platform() in ("gpu", "cuda")


def xla_or_fastest(implementation: str | None) -> str | None:
    """What the name that a model was given means for an operation whose kernels do fewer sizes than the mixers' own.

    "xla" is that; beside any other the operation picks for itself (the log says which one).
    """
    return "xla" if implementation == "xla" else None


class Operation:
    """The implementations of one operation.

    Args:
      name: the operation's folder in this package.
      implementations: the names that exist, a subset of ``IMPLEMENTATIONS``; each is a module
        ``<name>.<implementation>``, imported when first asked for.
      fastest: the order in which ``implementation=None`` tries them on a GPU, fastest measured first.
    """

    def __init__(self, name: str, implementations: Sequence[str], fastest: Sequence[str] = ("xla",)):
        self.name = name
        self.implementations = tuple(implementations)
        self.fastest = tuple(fastest)
        self._logged: set[str] = set()

    def select(self, implementation: str | None, case: Any) -> ModuleType:
        """The module that runs ``case``: the named one, or for None the first of ``fastest`` that supports it.

        Raises:
          UnsupportedCase: the name is unknown, not written for this operation, not for this device, or does not support
            the case. A named implementation is never replaced by another one.
        """
        if implementation is not None:
            return self._load(implementation, case)
        for name in self.fastest if on_gpu() else ("xla",):
            try:
                module = self._load(name, case)
            except UnsupportedCase as reason:
                self._log_once(f"{self.name}: {name} passed over: {reason}")
                continue
            self._log_once(f"{self.name}: using {name}")
            return module
        raise UnsupportedCase(f"{self.name}: no implementation supports {case}")

    def beside(self, implementation: str | None) -> str | None:
        """What the name given to another operation of the layer means here: that, or None where there is none."""
        return implementation if implementation in self.implementations else None

    def _load(self, name: str, case: Any) -> ModuleType:
        if not isinstance(name, str) or name not in IMPLEMENTATIONS:
            raise UnsupportedCase(
                f"{self.name}: implementation={name!r} is not one of {', '.join(IMPLEMENTATIONS)}; "
                "None picks the fastest"
            )
        if name not in self.implementations:
            raise UnsupportedCase(
                f"{self.name}: implementation={name!r} does not exist yet; there is {', '.join(self.implementations)}"
            )
        if name != "xla" and not on_gpu():
            raise UnsupportedCase(
                f"{self.name}: implementation={name!r} needs a CUDA GPU, and JAX runs on "
                f"{platform()!r} here; use implementation='xla' or None"
            )
        module = importlib.import_module(f"pallas_kernels.{self.name}.{name}")
        module.check(case)
        return module

    def _log_once(self, message: str) -> None:
        if message not in self._logged:
            self._logged.add(message)
            logger.info(message)
