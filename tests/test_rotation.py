"""Does every case of a wide test get its day, and does what is asked for by name run on any?"""

from types import SimpleNamespace

import pytest

from tests import rotation


class Item:
    def __init__(self, case, *marks):
        self.nodeid = f"tests/test_x.py::test_wide[{case}]"
        self.marks = {mark.name: mark for mark in marks}

    def get_closest_marker(self, name):
        return self.marks.get(name)

    def add_marker(self, mark):
        self.marks[mark.name] = mark.mark


def run_by_default(
    day, monkeypatch, count=2, cases=5, expression="not gpu and not exhaustive", keyword="", args=("tests",)
):
    monkeypatch.setenv("TESTS_DAY", str(day))
    items = [Item(n, pytest.mark.rotating(count).mark) for n in range(cases)]
    items.insert(0, Item("gpu", pytest.mark.rotating(count).mark, pytest.mark.gpu.mark))
    options = dict(markexpr=expression, keyword=keyword)
    rotation.mark_the_others(SimpleNamespace(getoption=options.get, args=args), items)
    assert "exhaustive" not in items[0].marks, "a GPU's cases run with -m gpu, on any day"
    return {n for n, item in enumerate(items[1:]) if "exhaustive" not in item.marks}


def test_all_cases_come_in_turn(monkeypatch):
    days = [run_by_default(day, monkeypatch) for day in range(700_000, 700_005)]
    assert all(len(today) == 2 for today in days) and set().union(*days) == set(range(5))
    assert run_by_default(700_001, monkeypatch) == days[1], "a day's choice can be repeated"


def test_what_is_asked_for_runs(monkeypatch):
    everything = set(range(5))
    assert run_by_default(1, monkeypatch, keyword="wide") == everything
    assert run_by_default(1, monkeypatch, args=("tests/test_x.py::test_wide[3]",)) == everything
    assert run_by_default(1, monkeypatch, expression="exhaustive") == set(), "all of them are exhaustive then"
