"""Which cases of a wide test run today? One a day by default, another each day; ``pytest -m exhaustive`` runs them all.

    @pytest.mark.rotating  # rotating(2): two a day
    @pytest.mark.parametrize("seed", range(100))
    def test_something(seed): ...

A case that is asked for by its name, or by ``-k``, runs on any day. ``TESTS_DAY``, which pytest prints at its start,
repeats another day's choice.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable

import pytest

from tests.exhaustive_page import function_of


def day() -> int:
    """Today's number, the same in every worker."""
    return int(os.environ.setdefault("TESTS_DAY", str(datetime.date.today().toordinal())))


def mark_the_others(config: pytest.Config, items: Iterable[pytest.Item]) -> None:
    """Makes the cases that are not today's exhaustive ones; where those are asked for, all of them."""
    everything = config.getoption("markexpr") == "exhaustive"
    named = config.getoption("keyword") or any("::" in argument for argument in config.args)
    groups: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("rotating") and not item.get_closest_marker("gpu"):
            groups.setdefault(function_of(item.nodeid), []).append(item)
    for cases in groups.values():
        mark = cases[0].get_closest_marker("rotating")
        count = mark.args[0] if mark.args else 1
        today = {(day() * count + n) % len(cases) for n in range(count)}
        for index, item in enumerate(cases):
            if everything or (index not in today and not named):
                item.add_marker(pytest.mark.exhaustive)
