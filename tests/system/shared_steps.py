"""Compiled steps that runs in one process share: tracing and compiling again is most of such tests' time."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

import lte_jax.train
from lte_jax.step import Builder
from lte_jax.train import _Run


class SharedBuilder(Builder):
    """Makes its evaluation once."""

    @functools.cache  # noqa: B019, kept as long as the tests run
    def evaluate_step(self, reading):
        return super().evaluate_step(reading)


@functools.cache
def builder_of(config, mesh) -> Builder:
    return SharedBuilder(config, mesh)


@functools.cache
def programs_of(builder: Builder) -> dict:
    return {}


@contextmanager
def shared() -> Iterator[None]:
    start = _Run.start

    def and_share(self, init_from):
        self.compiled = programs_of(self.builder)
        return start(self, init_from)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lte_jax.train, "Builder", builder_of)
        patch.setattr(_Run, "start", and_share)
        yield
