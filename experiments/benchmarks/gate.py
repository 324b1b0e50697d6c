"""May an operation's times be reported? Only where its GPU tests were green for the very code that is timed.

``pytest -m gpu -n 0 --record_gpu_tests`` writes the outcome of each operation's GPU tests into a record (see
tests/conftest.py), with a digest of the code that they ran; a record of other code counts for nothing.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib
import json
import subprocess
from pathlib import Path
from typing import Any

from lte_jax.whole_files import write_text

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "experiments/results/gpu_tests.json"
IMPLEMENTATIONS = ("pallas", "triton", "xla")
_NEEDS = {
    "block_attention": ("block_attention", "window_attention"),  # its window branch is the other operation
    "gated_deltanet": ("gated_deltanet", "gated_delta_rule", "short_convolution", "rms_norm"),  # the whole layer
}


class TestsRed(RuntimeError):
    """The operation's GPU tests failed, or did not run for this code."""


def digest(operation: str) -> str:
    """Of the operation's source files and those that all kernels share.

    Files of an implementation that the operation does not offer do not count: no test and no benchmark runs them.
    """
    folder = ROOT / "pallas_kernels"
    files = sorted(folder.glob("*.py"))  # what all operations share
    for name in _NEEDS.get(operation, (operation,)):
        offered = importlib.import_module(f"pallas_kernels.{name}.api").OPERATION.implementations
        absent = tuple(other for other in IMPLEMENTATIONS if other not in offered)
        files += [file for file in sorted((folder / name).glob("*.py")) if not file.name.startswith(absent)]
    total = hashlib.sha256()
    for file in files:
        total.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return total.hexdigest()[:16]


def commit() -> str:
    """The checked-out commit, with "+" where files differ from it; "unknown" outside a repository."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_record(outcomes: dict[str, dict[str, int]], device: str, path: Path) -> None:
    """Adds outcomes to the record, in place of the same operations' old ones.

    Args:
      outcomes: by the name of the test file, ``test_OPERATION`` with or without a suffix, the counts of "passed",
        "failed" and "skipped"; files of no operation are left out.
    """
    record = json.loads(path.read_text()) if path.exists() else {}
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M")
    operations = [folder.parent.name for folder in (ROOT / "pallas_kernels").glob("*/api.py")]
    for operation in operations:
        files = [counts for name, counts in outcomes.items() if name.startswith(f"test_{operation}")]
        if files:
            total = {key: sum(counts[key] for counts in files) for key in ("passed", "failed", "skipped")}
            record[operation] = total | dict(digest=digest(operation), commit=commit(), date=now, device=device)
    write_text(path, json.dumps(record, indent=1, sort_keys=True) + "\n")


def require_green(operation: str, path: Path = RECORD) -> dict[str, Any]:
    """The operation's entry of the record.

    Raises:
      TestsRed: there is none, it is of other code, or a test failed.
    """
    how = f"run pytest -m gpu -n 0 --record_gpu_tests tests/kernels/test_{operation}.py on the GPU"
    record = json.loads(path.read_text()) if path.exists() else {}
    entry = record.get(operation)
    if entry is None:
        raise TestsRed(f"{operation}: no GPU tests are recorded in {path}; {how}")
    if entry["failed"] or not entry["passed"]:
        raise TestsRed(
            f"{operation}: {entry['failed']} of its GPU tests failed and {entry['passed']} passed at commit "
            f"{entry['commit']}; no time of it is reported until all pass: mend it, then {how}"
        )
    if entry["digest"] != digest(operation):
        raise TestsRed(f"{operation}: its code has changed since its GPU tests ran (commit {entry['commit']}); {how}")
    return entry


def verified(operation: str, rows: list[dict[str, Any]], path: Path = RECORD) -> list[dict[str, Any]]:
    """Rows of one run of the benchmark; if its tests were not green then, they must be now, of the very same code.

    Raises:
      TestsRed: they are not.
    """
    if all(row["run"]["verified"] for row in rows):
        return rows
    tests = require_green(operation, path)
    if any(row["run"].get("digest") != tests["digest"] for row in rows):
        raise TestsRed(f"{operation}: other code was timed than that of the green tests (commit {tests['commit']})")
    return [{**row, "run": {**row["run"], "tests": tests, "verified": True}} for row in rows]
