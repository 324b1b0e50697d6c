"""Does ``~`` mean the home folder in every flag that names a file or a folder?"""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from absl import flags

from lte_jax.data.tokenizer import load_tokenizer

NAMED = {
    "train": "workdir init_from compilation_cache",
    "evaluate": "checkpoint output text tokenizer include_path cache local_data",
    "generate": "checkpoint tokenizer prompts_file output",
    "sweep": "workdir",
    "convert": "source target tokenizer",
    "prepare": "path out",
}


@pytest.mark.parametrize("program", NAMED)
def test_a_tilde_is_the_home_folder_in_flags_that_name_files(program, monkeypatch):
    """A shell leaves it as it is inside ``--workdir=~/runs``, and a folder of that name would be made."""
    module, values = importlib.import_module(f"experiments.{program}"), flags.FlagValues()
    for name in ("DEFINE", "DEFINE_string"):
        define = getattr(flags, name)
        monkeypatch.setattr(flags, name, lambda *args, define=define, **kw: define(*args, flag_values=values, **kw))
    for name in dir(flags):
        if name.startswith(("DEFINE_", "mark_")) and name != "DEFINE_string":
            monkeypatch.setattr(flags, name, lambda *args, **kw: None)
    module.define_flags()
    values([program, *(f"--{name}=~/there" for name in NAMED[program].split())])
    for name in NAMED[program].split():
        assert values[name].value == str(Path.home() / "there"), name


def test_a_tokenizer_that_is_named_in_a_setting_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    load_tokenizer("bytes").save(tmp_path / "kept")
    assert load_tokenizer("~/kept").name == "bytes"
