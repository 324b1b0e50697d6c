"""The authors' arrays: logits, scores, selections, losses, gradients and cached decoding of every model type."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file

import lte_jax
from lte_jax.convert import to_authors, weight_names
from lte_jax.losses import training_loss
from tests.tolerances import rms_error

REFERENCE = Path(__file__).parent.parent / "data" / "reference"
FOLDERS = ["gdn", "gdn_swa", "gdn_attn", "gdn_lte", "gdn_nsa", "transformer", "nsa"]


@functools.cache
def load(folder: str):
    return lte_jax.from_pretrained(REFERENCE / folder), load_file(REFERENCE / folder / "golden.safetensors")


@pytest.mark.parametrize("folder", FOLDERS)
def test_logits(folder):
    model, golden = load(folder)
    logits = model(golden["input_ids"]).logits
    np.testing.assert_allclose(logits, golden["logits"], atol=2e-4, rtol=0)


@pytest.mark.parametrize("reading, prefix", [("prompt", ""), ("train", "train.")])
def test_scores_and_selections(reading, prefix):
    model, golden = load("gdn_lte")
    output = model(golden["input_ids"], reading=reading)
    assert sorted(output.scores) == [1, 3]
    for layer in (1, 3):
        selected = golden[f"{prefix}selected.{layer}"]
        assert 0 < selected.mean() < 1, "the reference selects everything or nothing: it pins nothing down"
        np.testing.assert_array_equal(output.selected[layer][:, :-6], selected)
        if reading == "prompt":  # the arrays hold the scores of the evaluation path alone
            np.testing.assert_allclose(output.scores[layer][:, :-6], golden[f"score.{layer}"], atol=1e-5, rtol=0)


def test_training_loss_and_every_gradient():
    model, golden = load("gdn_lte")
    graph, state = nnx.split(model)
    weights = jnp.asarray(golden["train.l1_lambda"])

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(state):
        return training_loss(nnx.merge(graph, state), jnp.asarray(golden["input_ids"], jnp.int32), weights)

    (total, metrics), gradients = loss(state)
    np.testing.assert_allclose(total, golden["train.loss"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(metrics["ce"], golden["train.ce_loss"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(metrics["penalty"], golden["train.l1_loss"], atol=1e-5, rtol=0)

    compared = set()
    for path, variable in nnx.to_flat_state(gradients):
        value = np.asarray(variable.get_value())
        for index, names in enumerate(weight_names(path, model.config)):
            name = f"grad.{names[0]}"
            actual = to_authors(path, value[index] if path[0] == "units" else value)
            assert rms_error(actual, golden[name]) <= 1e-4, name
            compared.add(name)
    assert compared == {name for name in golden if name.startswith("grad.")}


def test_cached_decoding():
    """A prompt of 192 tokens and 150 single steps through the store, ring buffers wrapping twice."""
    model, golden = load("decode_lte")
    ids, prompt = golden["input_ids"], int(golden["prefill_len"])
    cache = model.init_cache(ids.shape[0])
    pieces = []
    for start, stop in [(0, prompt), *((i, i + 1) for i in range(prompt, ids.shape[1]))]:
        logits, cache = model.extend(ids[:, start:stop], cache)
        pieces.append(logits)
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), golden["logits"], atol=2e-4, rtol=0)


@pytest.mark.parametrize("folder", [*FOLDERS, "decode_lte"])
def test_saving_gives_back_the_same_folder(folder, tmp_path):
    model = lte_jax.from_pretrained(REFERENCE / folder)
    lte_jax.save_pretrained(model, tmp_path / "out")
    theirs = load_file(REFERENCE / folder / "model.safetensors")
    ours = load_file(tmp_path / "out" / "model.safetensors")
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        if not re.search("l1_lambda|num_kept", name):
            np.testing.assert_array_equal(ours[name], value, err_msg=name)
    assert lte_jax.from_pretrained(tmp_path / "out").config == model.config


def test_shards_load_like_one_file(tmp_path):
    model, _ = load("gdn_swa")
    lte_jax.save_pretrained(model, tmp_path / "out", max_shard_bytes=300_000)
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    again = lte_jax.from_pretrained(tmp_path / "out")
    for ours, theirs in zip(jax.tree.leaves(nnx.state(again)), jax.tree.leaves(nnx.state(model)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def _copy(tmp_path: Path, folder: str = "gdn") -> Path:
    target = tmp_path / "copy"
    target.mkdir()
    for name in ("config.json", "model.safetensors"):
        (target / name).write_bytes((REFERENCE / folder / name).read_bytes())
    return target


def _rewrite(folder: Path, change) -> None:
    from safetensors.numpy import save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: _rewrite(f, lambda t: t.pop("model.norm.weight")), "missing: model.norm.weight"),
        (lambda f: _rewrite(f, lambda t: t.update(extra=np.zeros(3, np.float32))), "extra: extra"),
        (
            lambda f: _rewrite(f, lambda t: t.update({"model.norm.weight": np.zeros(3, np.float32)})),
            r"wrong shape: .*\[3\]",
        ),
        (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-100]), "whole"),
        (lambda f: (f / "config.json").write_text('{"model_type": "llama"}'), "model_type='llama' is not one of"),
        (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
    ],
    ids=["missing", "extra", "shape", "truncated", "model_type", "json"],
)
def test_damaged_folders_are_refused(tmp_path, damage, message):
    folder = _copy(tmp_path)
    damage(folder)
    with pytest.raises(ValueError, match=message):
        lte_jax.from_pretrained(folder)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds neither model\.safetensors"):
        lte_jax.from_pretrained(tmp_path)
    folder = _copy(tmp_path)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        lte_jax.from_pretrained(folder)


def test_saving_never_overwrites(tmp_path):
    model, _ = load("gdn")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(FileExistsError, match="not empty"):
        lte_jax.save_pretrained(model, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_golden_files_are_whole():
    for folder in [*FOLDERS, "decode_lte"]:
        with safe_open(REFERENCE / folder / "golden.safetensors", "np") as file:
            assert {"input_ids", "logits"} <= set(file.keys())
