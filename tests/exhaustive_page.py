"""Keeps the page of the exhaustive tests: each run of ``pytest -m exhaustive`` writes its outcome, date and commit."""

from __future__ import annotations

import datetime
import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "experiments" / "results" / "exhaustive.md"
TITLE = """# Exhaustive tests

Sweeps that are too large for the default run. One command runs them all and rewrites their lines here:

    .venv/bin/pytest -m exhaustive

A part of them (`-k`, a file, a case) rewrites the lines that it touches: "run" counts the cases of the last run.
A test of the list that has no line here has not been run since the page exists; "+" beside a commit: files differed.

| test | cases | run | passed | failed | skipped | seconds | date | commit | machine |
|---|---|---|---|---|---|---|---|---|---|
"""


def wanted(config: pytest.Config) -> bool:
    return config.getoption("markexpr") == "exhaustive" and not config.getoption("collectonly")


class Recorder:
    """Counts the outcomes of each test function; the main process writes the page."""

    def __init__(self) -> None:
        self.cases: dict[str, int] = {}
        self.counts: dict[str, dict[str, float]] = {}

    @pytest.hookimpl(tryfirst=True)  # before -k and -m take cases away
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            if item.get_closest_marker("exhaustive") is not None:
                name = function_of(item.nodeid)
                self.cases[name] = self.cases.get(name, 0) + 1

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        counts = self.counts.setdefault(function_of(report.nodeid), dict(passed=0, failed=0, skipped=0, seconds=0.0))
        counts["seconds"] += report.duration
        if report.when == "call" or report.outcome != "passed":
            counts[report.outcome] += 1

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node, error) -> None:
        self.cases |= getattr(node, "workeroutput", {}).get("exhaustive_cases", {})  # each worker collects all

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workerinput"):
            session.config.workeroutput["exhaustive_cases"] = self.cases
            return
        if not self.counts:
            return
        lines = dict(read(PAGE.read_text())) if PAGE.is_file() else {}
        for name, counts in self.counts.items():
            if not counts["passed"] + counts["failed"] + counts["skipped"]:
                continue  # interrupted in the first case's set-up or body
            lines[name] = line(name, counts, self.cases.get(name, 0))
        PAGE.write_text(TITLE + "".join(f"{lines[name]}\n" for name in sorted(lines)))


def function_of(nodeid: str) -> str:
    return nodeid.partition("[")[0]


def read(page: str) -> list[tuple[str, str]]:
    """(test, its line) of a page."""
    return [(name, whole) for whole, name in re.findall(r"^(\| `([^`]+)` \|.*)$", page, re.M)]


def line(name: str, counts: dict[str, float], cases: int) -> str:
    run = int(counts["passed"] + counts["failed"] + counts["skipped"])
    numbers = [cases, run, *(int(counts[key]) for key in ("passed", "failed", "skipped"))]
    where = f"{len(os.sched_getaffinity(0))} CPU cores"
    cells = [f"`{name}`", *numbers, round(counts["seconds"]), datetime.date.today().isoformat(), commit(), where]
    return "| " + " | ".join(map(str, cells)) + " |"


def commit() -> str:
    """The short hash; "+" says that files differ from it. GIT_COMMIT tells it where the files are no checkout."""
    if given := os.environ.get("GIT_COMMIT"):
        return given
    words = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    found = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"
