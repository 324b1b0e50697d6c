"""How is a small file written so that it is there whole or not at all?"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Writes under another name in the folder, which is made, and renames; a full disk or a kill leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes JSON so; what JSON does not know, as its text."""
    write_text(path, json.dumps(values, indent=2, default=str) + "\n")
