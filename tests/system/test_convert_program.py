"""From the authors' folder to a checkpoint and back: the same weights, settings and tokenizer, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import lte_jax
from experiments import convert
from lte_jax import configs, restore, runs
from lte_jax.checkpoint import CheckpointError, Checkpoints
from lte_jax.data.packing import DataError
from lte_jax.evaluate.inventory import inventory
from lte_jax.retention import PenaltyConfig, PenaltyState

REFERENCE = Path(__file__).parent.parent / "data" / "reference"
FOLDERS = ["gdn", "gdn_attn", "gdn_lte", "gdn_nsa", "gdn_swa", "transformer", "nsa", "decode_lte"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A checkpoint with a tokenizer, converted from the reference."""
    folder = tmp_path_factory.mktemp("converted") / "run"
    model = lte_jax.LanguageModel(
        lte_jax.ModelConfig(vocab_size=259, width=8, num_layers=1, pattern=(lte_jax.FullAttention(num_heads=2),)),
        rngs=nnx.Rngs(0),
    )
    restore.save_model(model, folder, tokenizer=restore.load_tokenizer("bytes"))
    return folder


def parameters(model) -> dict[str, jax.Array]:
    return {"/".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.split(model)[1])}


@pytest.mark.parametrize("name", ["gdn_lte", "nsa"])
def test_there_and_back_is_the_same_file(name, tmp_path, capsys):
    convert.convert(str(REFERENCE / name), str(tmp_path / "run"))
    convert.convert(str(tmp_path / "run"), str(tmp_path / "back"))
    original = lte_jax.from_pretrained(REFERENCE / name)
    between, tokenizer = restore.load_model(tmp_path / "run")
    assert tokenizer is None and between.config == original.config
    back = lte_jax.from_pretrained(tmp_path / "back")
    assert back.config == original.config
    for ours in (between, back):
        jax.tree.map(np.testing.assert_array_equal, nnx.split(ours)[1], nnx.split(original)[1])
    assert "a checkpoint" in capsys.readouterr().out


@pytest.mark.parametrize("shared", ["head", "layer", "all"])
def test_the_penalty_goes_there_and_back(shared, tmp_path, capsys):
    shutil.copytree(REFERENCE / "gdn_lte", tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    config["attn"].update(l1_lambda_shared=shared, l1_alpha=1.25, l1_lambda_tolerate=[0.9, 1.1], l1_warmup_steps=7)
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "theirs" / "model.safetensors")
    heads = np.array([[0.5, 0.25, 0, 1e-9], [0.125, 1e-3, 0, 1]], np.float32)
    tensors["model.l1_lambda"] = np.array({"head": heads, "layer": heads[:, 0], "all": heads[0, 0]}[shared])
    tensors["model.num_kept"] = 10 * heads + 1
    save_file(tensors, tmp_path / "theirs" / "model.safetensors")

    convert.convert(str(tmp_path / "theirs"), str(tmp_path / "run"))
    convert.convert(str(tmp_path / "run"), str(tmp_path / "back"))
    assert "kept tokens (up to 11) go along; how many steps and updates it has seen does not" in capsys.readouterr().out
    between = restore.load_penalty(tmp_path / "run")
    broadcast = {"head": heads, "layer": heads[:, :1], "all": heads[:1, :1]}[shared] + np.zeros_like(heads)
    np.testing.assert_array_equal(between.weights, broadcast)
    assert (between.schedule.shared, between.schedule.raise_factor, between.schedule.warmup_steps) == (shared, 1.25, 7)
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert set(back) == set(tensors)
    jax.tree.map(np.testing.assert_array_equal, back, tensors)
    attn = json.loads((tmp_path / "back" / "config.json").read_text())["attn"]
    assert attn == {**attn, **{name: value for name, value in config["attn"].items() if "l1" in name}}

    config["attn"]["l1_lambda_shared"] = "all" if shared == "head" else "head"
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="do not fit 2 LTE layers with l1_lambda_shared"):
        restore.load_penalty(tmp_path / "theirs")


def test_the_penalty_of_a_run_goes_to_the_authors_format(tmp_path):
    model = lte_jax.from_pretrained(REFERENCE / "gdn_lte")
    state = PenaltyState(*(jnp.full((2, 4), value) for value in (0.5, 9.0)), jnp.int32(64), jnp.int32(2))
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", asynchronous=False)
    settings = {"model": model.config.to_dict(), "penalty": configs.to_dict(PenaltyConfig(period=4))}
    training = {"optimizer": {"count": jnp.ones(3)}, "penalty": state}
    checkpoints.save(64, {"params": parameters(model), "training": training}, {"config": settings})
    checkpoints.close()
    convert.convert(str(tmp_path / "run"), str(tmp_path / "out"))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    np.testing.assert_array_equal(tensors["model.l1_lambda"], np.full((2, 4), 0.5))
    np.testing.assert_array_equal(tensors["model.num_kept"], np.full((2, 4), 9.0))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["attn"]["l1_lambda_update_steps"] == 4


def test_an_exported_config_names_the_tokenizers_own_ends(run, tmp_path):
    assert restore.load(run).model.config.eos_token_id == 2, "which is a byte for this tokenizer"
    convert.convert(str(run), str(tmp_path / "out"))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["bos_token_id"], written["eos_token_id"]) == (256, 257)


def test_a_setting_that_is_not_read_is_said_by_the_program_too(tmp_path, capsys, monkeypatch):
    shutil.copytree(REFERENCE / "transformer", tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    (tmp_path / "theirs" / "config.json").write_text(json.dumps({**config, "rope_scaling": {"factor": 4.0}}))
    monkeypatch.setattr(convert, "FLAGS", SimpleNamespace(source=str(tmp_path / "theirs"), step=None, check=True))
    with warnings.catch_warnings(), pytest.raises(SystemExit) as ended:
        warnings.simplefilter("default")
        convert.main(["convert"])
    assert ended.value.code == 0
    assert capsys.readouterr().err == "warning: config.json: rope_scaling={'factor': 4.0} is not read\n"


def test_the_program_runs_from_the_shell(run, tmp_path):
    def program(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "experiments.convert", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=REFERENCE.parents[2], timeout=120)

    done = program(f"--source={run}", f"--target={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    model, tokenizer = restore.load_model(tmp_path / "out")
    assert tokenizer.name == "bytes"
    jax.tree.map(np.testing.assert_array_equal, parameters(model), parameters(restore.load_model(run)[0]))
    refused = program(f"--source={tmp_path / 'nowhere'}", "--check")
    assert refused.returncode == 1
    assert refused.stderr.strip() == (
        f"error: {tmp_path / 'nowhere'}: no such folder; name a Hugging Face folder or a training run's"
    )


def test_every_path_to_a_run_works(run):
    expected = nnx.split(restore.load_model(run)[0])[1]
    for path, step in ((run / "checkpoints", None), (run / "checkpoints" / "0", None), (run, 0)):
        model, tokenizer = restore.load_model(path, step=step, dtype=jnp.bfloat16)
        assert tokenizer.name == "bytes" and model.dtype == jnp.bfloat16
        jax.tree.map(np.testing.assert_array_equal, nnx.split(model)[1], expected)


def test_the_newest_whole_step_is_read(run, tmp_path, caplog):
    shutil.copytree(run, tmp_path / "run")
    model, _ = restore.load_model(run)
    doubled = {name: 2 * leaf for name, leaf in parameters(model).items()}
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", asynchronous=False)
    for step in (1, 2):
        checkpoints.save(step, {"params": doubled}, {"config": {"model": model.config.to_dict()}})
    checkpoints.close()
    for file in (tmp_path / "run" / "checkpoints" / "2" / "params" / "d").iterdir():
        file.write_bytes(b"")
    found, _ = restore.load_model(tmp_path / "run")
    np.testing.assert_array_equal(found.embeddings.weight[...], 2 * model.embeddings.weight[...])
    assert "checkpoint skipped" in caplog.text
    with pytest.raises(CheckpointError, match="2: params cannot be read"):
        restore.load_model(tmp_path / "run", step=2)
    assert (tmp_path / "run" / "checkpoints" / "2").is_dir(), "reading must not rename anything"


def test_training_can_start_from_it(run):
    model, _ = restore.load_model(run)
    for source in (run, run / "checkpoints" / "0"):
        found = runs.initial_params(source, runs.single_device_builder(model.config))
        jax.tree.map(np.testing.assert_array_equal, found, parameters(model))
    with pytest.raises(runs.RunError, match=r"--init_from: .*nowhere: no such folder"):
        runs.initial_params(run / "nowhere", runs.single_device_builder(model.config))


@pytest.mark.parametrize("name", FOLDERS)
def test_the_inventory_needs_no_weights(name):
    found = inventory(REFERENCE / name)
    assert found.matches
    model = lte_jax.from_pretrained(REFERENCE / name)
    assert found.parameters == sum(leaf.size for leaf in jax.tree.leaves(nnx.split(model)[1]))
    for length, size in found.cache_bytes.items():
        cache = jax.eval_shape(lambda length=length: model.init_cache(1, length, jnp.bfloat16))
        assert size == sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))


def test_the_check_names_every_fault(run, tmp_path, capsys):
    shutil.copytree(REFERENCE / "gdn", tmp_path / "deep")
    values = json.loads((tmp_path / "deep" / "config.json").read_text())
    values["num_hidden_layers"] += 1
    (tmp_path / "deep" / "config.json").write_text(json.dumps(values))
    assert not convert.check(str(tmp_path / "deep"))
    printed = capsys.readouterr().out
    assert f"missing: model.layers.{values['num_hidden_layers'] - 1}.attn.q_proj.weight" in printed
    assert convert.check(str(run))
    printed = capsys.readouterr().out
    assert "weights: all match" in printed and "memory of the weights:" in printed and "KiB in bfloat16" in printed


def test_bad_input_is_refused(run, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "stepless" / "checkpoints").mkdir(parents=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("precious")
    reference = str(REFERENCE / "gdn")
    cases = [
        (FileNotFoundError, "no such folder", lambda: restore.load_model(tmp_path / "nowhere")),
        (FileNotFoundError, "neither config.json", lambda: restore.load_model(tmp_path / "empty")),
        (CheckpointError, "no checkpoint there", lambda: restore.load_model(tmp_path / "stepless")),
        (CheckpointError, "no step 7; there are 0", lambda: restore.load_model(run, step=7)),
        (ValueError, "step=7: the path names step 0", lambda: restore.load_model(run / "checkpoints" / "0", step=7)),
        (ValueError, "has no steps", lambda: restore.load_model(reference, step=1)),
        (FileExistsError, "is not empty", lambda: convert.convert(reference, str(tmp_path / "full"))),
        (FileExistsError, "is not empty", lambda: convert.convert(str(run), str(tmp_path / "full"))),
        (DataError, "259 ids", lambda: convert.convert(reference, str(tmp_path / "new"), tokenizer="bytes")),
    ]
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()
    assert not (tmp_path / "new").exists() and [path.name for path in (tmp_path / "full").iterdir()] == ["file"]


def test_a_run_of_another_shape_is_refused(run, tmp_path):
    model, _ = restore.load_model(run)
    for name, change, message in (
        ("wide", {"vocab_size": 260}, "wrong shape: embeddings/weight"),
        ("deep", {"tie_embeddings": False}, "missing: lm_head/weight"),
    ):
        settings = {"model": {**model.config.to_dict(), **change}}
        checkpoints = Checkpoints(tmp_path / name / "checkpoints", asynchronous=False)
        checkpoints.save(0, {"params": parameters(model)}, {"config": settings})
        checkpoints.close()
        with pytest.raises(ValueError, match=message):
            restore.load_model(tmp_path / name)
        assert not inventory(tmp_path / name).matches
