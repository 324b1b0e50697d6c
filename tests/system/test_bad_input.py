"""Is every kind of bad input one line that names the value, the rule and the fix? One table, by kind."""

from __future__ import annotations

import dataclasses
import json
import shutil
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import lte_jax
from experiments import convert, evaluate, generate, prepare, sweep
from lte_jax import configs, data, restore, runs
from lte_jax.model_config import ModelConfig
from tests.system.tiny import tiny_experiment, tiny_model

REFERENCE = Path(__file__).parent.parent / "data" / "reference" / "gdn_swa"


def with_lte(**changes) -> None:
    model = tiny_model()
    dataclasses.replace(model, pattern=(model.pattern[0], dataclasses.replace(model.pattern[1], **changes))).validate()


def folder_with(folder: Path, change) -> None:
    """Reads a copy of the reference's folder whose weights went through ``change``."""
    shutil.copytree(REFERENCE, folder / "copy")
    file = folder / "copy" / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    lte_jax.from_pretrained(folder / "copy")


def truncated(folder: Path) -> None:
    shutil.copytree(REFERENCE, folder / "copy")
    file = folder / "copy" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    lte_jax.from_pretrained(folder / "copy")


def of_another_model(folder: Path) -> None:
    model = lte_jax.LanguageModel(tiny_model(), rngs=nnx.Rngs(0))
    restore.save_model(model, folder / "run")
    wider = dataclasses.replace(tiny_model(), intermediate_size=40)
    runs.initial_params(folder / "run", runs.single_device_builder(wider))


def another_run(folder: Path) -> None:
    settings = configs.to_dict(tiny_experiment())
    lock = runs.claim(folder, settings)[1]
    assert lock is not None
    lock.close()
    try:
        runs.claim(folder, {**settings, "seed": 3})
    finally:
        assert json.loads((folder / "config.json").read_text()) == settings, "it was overwritten"


def refuse_mask(_: Path) -> None:
    lte_jax.LanguageModel(tiny_model(), rngs=nnx.Rngs(0))(np.ones((1, 4), np.int32), np.array([[1, 0, 1, 1]]))


def refuse_ids(_: Path) -> None:
    lte_jax.LanguageModel(tiny_model(), rngs=nnx.Rngs(0))(np.full((1, 4), 99))


# Kind -> (what does it, the value, the rule, the fix).
CASES = {
    "unknown key": (
        lambda _: configs.override(tiny_experiment(), ["optimizer.learning_rat=1"]),
        ("'learning_rat'", "no setting", "Did you mean 'learning_rate'"),
    ),
    "unknown key of the model": (
        lambda _: ModelConfig.from_dict({**tiny_model().to_dict(), "depth": 3}),
        ("depth", "no setting", "it has", "num_layers"),
    ),
    "unknown config": (
        lambda _: configs.load_named("experiments.configs", "lalte_1p4"),
        ("lalte_1p4", "no such config", "Did you mean", "lalte_1p4b"),
    ),
    "unknown mixer": (
        lambda _: ModelConfig.from_dict({**tiny_model().to_dict(), "pattern": [{"mixer": "mamba"}]}),
        ("'mamba'", "is not one of", "gated_deltanet"),
    ),
    "sizes that do not divide": (
        lambda _: with_lte(num_heads=3),
        ("num_heads=3", "width 16 is not a multiple", "change one"),
    ),
    "heads that do not divide": (
        lambda _: with_lte(num_heads=4, num_kv_heads=3),
        ("num_kv_heads=3", "num_heads=4 is not a multiple", "change one"),
    ),
    "depth that the pattern does not divide": (
        lambda _: dataclasses.replace(tiny_model(), num_layers=3).validate(),
        ("num_layers=3", "not a multiple of the pattern's length 2", "change the depth"),
    ),
    "window shorter than the router's reach": (
        lambda _: with_lte(window=5),
        ("window=5", "reach on both sides, 6", "lengthen the window or shorten the convolutions"),
    ),
    "budget not above the sinks": (
        lambda _: with_lte(budget=2, sinks=2),
        ("budget=2", "greater than sinks=2", "raise the budget"),
    ),
    "checkpoint of another model": (of_another_model, ("down_proj/weight", "instead of", "of one model")),
    "missing weight": (
        lambda folder: folder_with(folder, lambda tensors: tensors.pop("model.layers.2.attn.b_proj.weight")),
        ("missing: model.layers.2.attn.b_proj.weight", "not those of the model's settings", "of one model"),
    ),
    "extra weight": (
        lambda folder: folder_with(folder, lambda tensors: tensors.update(more=np.ones(2, np.float32))),
        ("extra: more", "not those of the model's settings", "of one model"),
    ),
    "truncated file": (truncated, ("model.safetensors", "not a whole safetensors file", "copy it again")),
    "no data path": (lambda _: data.Text(path="").rows(), ("path=''", "no data path", "name a file")),
    "missing data path": (
        lambda folder: data.Text(path=str(folder / "nowhere")).rows(),
        ("nowhere", "no such file or folder", "correct the path"),
    ),
    "empty data": (
        lambda folder: (folder / "none.txt").touch() or data.Text(path=str(folder / "none.txt")).rows(),
        ("none.txt", "every file is empty", "give files that hold text"),
    ),
    "token ids outside the vocabulary": (refuse_ids, ("token id 99", "outside the vocabulary [0,", "tokenizer?")),
    "data outside the vocabulary": (
        lambda _: dataclasses.replace(tiny_experiment(), data=data.SymbolNeedles()).check(),
        ("token ids up to", "outside the model's vocabulary", "raise model.vocab_size"),
    ),
    "workdir of another run": (
        another_run,
        ("seed 0 -> 3", "holds another run", "Name another --workdir, or give these settings as they were"),
    ),
    "workdir of something else": (
        lambda folder: (folder / "thesis.txt").touch() or runs.claim(folder, {}),
        ("is not empty", "holds no config.json of a run", "name another --workdir"),
    ),
    "mask with a hole": (refuse_mask, ("row 0", "only padding at the left or the right", "as segment_ids")),
}


@pytest.mark.parametrize("kind", CASES)
def test_bad_input_is_one_line_with_value_rule_and_fix(kind, tmp_path):
    do, words = CASES[kind]
    with pytest.raises(ValueError) as error:
        do(tmp_path)
    message = str(error.value)
    assert "\n" not in message and len(message) < 700
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(prompt="a", interactive=True), "give one of"),
        (dict(interactive=True, chunk=512), "--chunk=512: a conversation reads each line as it comes"),
        (dict(interactive=True, devices=4), "--devices=4: the rows of --prompts_file are shared"),
    ],
)
def test_flags_of_generation_that_do_not_go_together_are_refused(given, message):
    usual = dict(prompt=None, prompts_file=None, interactive=False, output=None, log_probs=False, chunk=None, devices=1)
    with pytest.raises(ValueError, match=message):
        generate.check_flags(SimpleNamespace(**usual | given))


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        ("--own=bytes", "num_samples", "--num_samples: --own=bytes does not read it; leave it out"),
        ("--own=mqar", "depths", "--depths: --own=mqar does not read it"),
        ("--tasks", "text", "--text: --tasks does not read it"),
        ("data", "limit", "--limit: an evaluation on data does not read it"),
        ("--inspect", "reading", "--reading: --inspect does not read it"),
    ],
)
def test_flags_that_an_evaluation_does_not_read_are_refused(kind, given, message):
    known = {
        name: SimpleNamespace(present=int(name == given)) for names in evaluate.READ.values() for name in names.split()
    }
    with pytest.raises(ValueError, match=message):
        evaluate.check_flags(known, kind)
    known[given].present = 0
    evaluate.check_flags(known, kind)


@pytest.mark.parametrize("program", [convert, evaluate, generate, prepare, sweep])
def test_every_program_says_what_ended_it_in_one_line(program, monkeypatch, capsys):
    """Also a worker that the system has killed, and nothing but the code at Ctrl-C."""
    for raised, code in ((KeyboardInterrupt(), 130), (BrokenProcessPool("a worker died"), "error: a worker died")):

        class Flags:
            def __getattr__(self, name, raised=raised):
                raise raised

        monkeypatch.setattr(program, "FLAGS", Flags())
        with pytest.raises(SystemExit) as ended:
            program.main(["program"])
        assert ended.value.code == code
    with pytest.raises(SystemExit, match="error: 'extra': no such argument; settings are given as flags"):
        program.main(["program", "extra"])
