"""Does a model that has learned needles keep its score through conversion, restoring and a new process?"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from experiments.configs.quickstart import get_config
from experiments.evaluations import evaluate_own
from lte_jax import configs
from lte_jax.train import train

ROOT = Path(__file__).parents[2]


def program(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", f"experiments.{name}", *arguments], capture_output=True, text=True, cwd=ROOT, timeout=500
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
def test_a_learned_score_survives_conversion_and_a_new_process(tmp_path):
    config = get_config().runs[0]
    assert config.name == "lalte"
    train(config, tmp_path / "run", devices=jax.devices()[:1])
    options = dict(num_samples=64, seed=5, batch_size=64)
    here = evaluate_own(str(tmp_path / "run"), "needles", **options)
    assert here["total"]["accuracy"] > 0.9, "the quickstart's model has not learned needles"

    program("convert", f"--source={tmp_path / 'run'}", f"--target={tmp_path / 'theirs'}")
    program("convert", f"--source={tmp_path / 'theirs'}", f"--target={tmp_path / 'back'}")
    task = [f"--set={name}={value}" for name, value in configs.to_dict(config.data).items() if name != "seed"]
    for folder in ("theirs", "back"):
        flags = [f"--{name}={value}" for name, value in options.items()]
        where = f"--output={tmp_path / folder}.json"
        program(
            "evaluate",
            f"--checkpoint={tmp_path / folder}",
            "--own=needles",
            "--data=SymbolNeedles",
            *task,
            *flags,
            where,
        )
        there = json.loads((tmp_path / f"{folder}.json").read_text())
        assert there["total"] == here["total"] and there["rows"] == json.loads(json.dumps(here["rows"]))
