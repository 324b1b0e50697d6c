"""How are times written down? JSON with all that was seen, and a page made from it.

A page keeps what people wrote into it: the tables stand between two marks, and a new run replaces the lines of the
cases that it timed.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import jax

from lte_jax.whole_files import write_text

BEGIN, END = "<!-- measured: written by experiments.bench from the JSON file beside this page -->", "<!-- end -->"
_PACKAGES = ("jax", "jaxlib", "triton", "torch", "fla-core", "jax-linear-attention")


def environment(commit: str) -> dict[str, Any]:
    """What a number depends on besides the code."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M"),
        "commit": commit,
        "hardware": jax.devices()[0].device_kind,
        "versions": versions,
    }


def merge(path: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a JSON file with ``rows`` in place of those of the same name; written back."""
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    fresh = {row["case"] for row in rows}
    merged = [row for row in old if row["case"] not in fresh] + rows
    write_text(path, json.dumps({"rows": merged}, indent=1) + "\n")
    return merged


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a section for each environment, a line for each contender of each case."""
    parts = []
    for run in dict.fromkeys(json.dumps(row["run"], sort_keys=True) for row in rows):
        about = json.loads(run)
        versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        tests = about.get("tests")
        seen = f" {tests['passed']} GPU tests of this code green on {tests['device']}." if tests else ""
        parts.append(f"### {about['hardware']}, {about['date']} UTC, commit {about['commit']}\n\n{versions}.{seen}\n")
        parts.append("| case | who | device ms | calls ms | x fastest peer | x floor | error | |\n" + "|---" * 8 + "|")
        for row in rows:
            if json.dumps(row["run"], sort_keys=True) == run:
                parts += _lines(row)
        parts.append("")
    return "\n".join(parts)


def _lines(row: dict[str, Any]) -> list[str]:
    peers = [found["best"] for found in row["contenders"] if found["peer"] and found["comparable"]]
    floor = row["bytes"] / row["copy_gbps"] * 1e-6  # milliseconds
    first = f"**{row['case']}**: {row['shape']}, {row['dtype']}; floor {floor:.3f} ms at {row['copy_gbps']:.0f} GB/s"
    lines = []
    for found in row["contenders"]:
        ratio = "" if found["peer"] or not peers else f"{found['best'] / min(peers):.2f}"
        busy = "" if found["busy"] is None else f"{found['busy']:.4f}"
        error = "" if not found["errors"] else _worst(found["errors"])
        error += {True: ", same bits twice", False: ", other bits the second time"}.get(found.get("same_bits"), "")
        cells = [first, found["name"], busy, f"{found['calls']:.4f}", ratio, f"{found['best'] / floor:.1f}", error]
        lines.append("| " + " | ".join([*cells, found["note"]]) + " |")
        first = ""
    lines += [f"| {first} | {name} | | | | | | not timed: {reason} |" for name, reason in row["missing"].items()]
    return lines


def _worst(errors: dict[str, float]) -> str:
    name = max(errors, key=lambda key: errors[key] if errors[key] == errors[key] else float("inf"))
    return f"{errors[name]:.1e} ({name})"


def write_page(path: Path, title: str, legend: str, body: str) -> None:
    """Puts the tables between the marks of a page, which is made where there is none."""
    text = path.read_text() if path.exists() else f"# {title}\n\n{legend}\n\n{BEGIN}\n{END}\n"
    if BEGIN not in text:
        text = f"{text.rstrip()}\n\n## Measured by experiments.bench\n\n{legend}\n\n{BEGIN}\n{END}\n"
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    write_text(path, f"{before}{BEGIN}\n\n{body}\n{END}{after}")
