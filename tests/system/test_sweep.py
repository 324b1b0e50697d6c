"""Are the points of a sweep equal in bytes of cache, and do table and figure say what the runs scored?"""

from __future__ import annotations

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import sweep
from lte_jax import LTE, LanguageModel, WindowAttention, restore
from lte_jax.convert import abstract_model
from lte_jax.evaluate.scores import Scores
from lte_jax.train import Result
from tests.system.data_samples import small_text
from tests.system.tiny import tiny_experiment

WIDTH = 64
BASE = LTE(num_heads=4, num_kv_heads=2, window=32, budget=24, sinks=2)


def cache_bytes(mixer) -> int:
    """What the layer's own cache takes, for one sequence."""
    model = dataclasses.replace(
        tiny_experiment().model, width=WIDTH, num_layers=1, pattern=(mixer,), intermediate_size=None
    )
    block = abstract_model(model, dtype=jnp.bfloat16).units.blocks[0]
    return block.mixer.cache_bytes(1, None, jnp.bfloat16)


def test_every_point_has_the_bytes_of_the_base():
    found = sweep.settings(BASE, WIDTH, [*sweep.RULES[:3], sweep.SLIDING], [24, 40])
    most = cache_bytes(BASE)
    assert [point.name for point in found][:2] == [f"learned-w24-m{found[0].budget}", f"learned-w40-m{found[1].budget}"]
    assert len(found) == 7 and isinstance(found[-1].mixer, WindowAttention) and found[-1].budget == 0
    for point in found:
        assert point.bytes == cache_bytes(point.mixer) and most - 300 < point.bytes <= most
        assert point.mixer.window == point.window
    assert found[2].budget > found[0].budget, "a rule without a router has room for more"
    with pytest.raises(ValueError, match=r"--windows=400: with .* leaves 0 slots"):
        sweep.settings(BASE, WIDTH, ["recency"], [400])
    with pytest.raises(ValueError, match="--rules=newest: there is learned, recency"):
        sweep.settings(BASE, WIDTH, ["newest"], [24])


def test_the_sweep_writes_one_table_and_one_figure(tmp_path):
    base, trained, seeds = tiny_experiment(), [], []

    def trainer(config, folder):
        """Stands in for training: the weights as they start."""
        trained.append(config.name)
        seeds.append((config.seed, config.data.seed))
        if not folder.exists():
            restore.save_model(LanguageModel(config.model, rngs=nnx.Rngs(config.seed)), folder)
        return Result(folder, config.steps, finished=True, heldout=None)

    rules = ["recency"]
    found = sweep.sweep(base, tmp_path, rules, [], [0, 3], trainer, say=lambda line: None)
    names = [point.name for point in sweep.settings(base.model.pattern[1], base.model.width, rules, [6])]
    assert trained == [f"{name}-s{seed}" for name in names for seed in (0, 3)]
    written = json.loads((tmp_path / "sweep.json").read_text())
    assert written["points"] == found and len(found) == 2
    assert seeds == [(0, base.data.seed), (3, base.data.seed + 3)], "each seed has weights and rows of its own"
    for record, name in zip(found, trained, strict=True):
        config = restore.read_settings(restore.find(tmp_path / name))["model"]
        assert config["pattern"][1]["window"] == record["window"]
    lines = (tmp_path / "sweep.md").read_text().splitlines()
    assert len(lines) == 3 and lines == sweep.table(found).splitlines()
    mean = (found[0]["accuracy"] + found[1]["accuracy"]) / 2
    assert f"| {mean:.3f} |" in lines[2] and lines[2].endswith("| 2 |")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no LTE layer"):
        plain = dataclasses.replace(base.model, pattern=base.model.pattern[:1])
        sweep.sweep(dataclasses.replace(base, model=plain), tmp_path, rules, [], [0], trainer)


def test_a_signal_ends_the_sweep_and_scores_nothing(tmp_path):
    """An unfinished run is no point of a comparison."""
    started = []

    def trainer(config, folder):
        started.append(config.name)
        return Result(folder, 4, finished=False, heldout=None, interrupted=True)

    assert sweep.sweep(tiny_experiment(), tmp_path, ["recency", "random"], [], [0], trainer) is None
    assert len(started) == 1 and not list(tmp_path.iterdir())


def test_a_run_is_scored_on_what_its_own_seed_holds_out(tmp_path, monkeypatch):
    text = small_text(tmp_path)
    base = tiny_experiment(data=text, model=dataclasses.replace(tiny_experiment().model, vocab_size=259))
    scored = []

    def trainer(config, folder):
        restore.save_model(LanguageModel(config.model, rngs=nnx.Rngs(0)), folder)
        return Result(folder, config.steps, finished=True, heldout=None)

    def score(model, batches, **options):
        scored.append(np.concatenate([batch["input_ids"][batch["labels"].max(1) >= 0] for batch in batches]))
        return Scores(1, 1.0, 0.0, (), np.zeros(1))

    monkeypatch.setattr(sweep, "score_batches", score)
    sweep.sweep(base, tmp_path / "runs", ["recency"], [], [0, 5], trainer, say=lambda line: None)
    for rows, seed in zip(scored, (text.seed, text.seed + 5), strict=True):
        own = [row["input_ids"] for row in dataclasses.replace(text, seed=seed).rows("heldout")]
        np.testing.assert_array_equal(rows, own)
    assert len(scored[0]) != len(scored[1]) or (scored[0] != scored[1]).any()
