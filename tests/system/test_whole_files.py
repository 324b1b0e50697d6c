"""Is a file there whole or not at all, and the old one left, whatever ends its writing?"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lte_jax import runs
from lte_jax.evaluate.answers import Answers
from lte_jax.whole_files import copy_file, partial_of, whole_file, write_json, write_text

ROOT = Path(__file__).parents[2]


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "deep" / "numbers.json"
    write_json(path, {"a": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        for write in (lambda: write_text(path, "x" * 1000), lambda: copy_file(__file__, path)):
            with pytest.raises(OSError, match="File too large"):
                write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert json.loads(path.read_text()) == {"a": 1} and list(path.parent.iterdir()) == [path]
    with pytest.raises(KeyError), whole_file(path) as partial:
        partial.write_text("half")
        raise KeyError
    assert json.loads(path.read_text()) == {"a": 1} and list(path.parent.iterdir()) == [path]


def test_bytes_are_on_the_disk_before_the_rename(tmp_path, monkeypatch):
    calls = []
    sync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append("sync"), sync(file)))
    monkeypatch.setattr(Path, "replace", lambda self, target: (calls.append("rename"), replace(self, target))[1])
    write_text(tmp_path / "a", "text")
    assert calls == ["sync", "rename"] and (tmp_path / "a").read_text() == "text"


def test_answers_survive_a_kill_while_half_a_line_is_dropped(tmp_path):
    path = tmp_path / "answers.jsonl"
    answers = Answers(path, {"model": "a"})
    answers.add("likelihood", "x", 1.0)
    answers.add("likelihood", "y", 2.0)
    path.write_text(path.read_text() + '{"key": "ha')
    code = f"""
import os, pathlib, signal
from lte_jax.evaluate.answers import Answers
write = pathlib.Path.write_text
def half(self, text, **options):
    write(self, text[:5], **options)
    os.kill(os.getpid(), signal.SIGKILL)
pathlib.Path.write_text = half
Answers({str(path)!r}, {{"model": "a"}})
"""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    killed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(Answers(path, {"model": "a"})) == 2 and path.read_text().endswith("}\n")


def test_a_kill_while_a_runs_settings_are_written_leaves_the_folder_free(tmp_path):
    partial_of(tmp_path / "config.json").write_text('{"ste')
    folder, lock = runs.claim(tmp_path, {"steps": 1})
    assert lock is not None and runs.read_config(folder) == {"steps": 1}
    lock.close()
    with pytest.raises(runs.RunError, match="is not empty"):
        runs.claim(Path(__file__).parent, {"steps": 1})
