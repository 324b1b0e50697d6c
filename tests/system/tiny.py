"""A laLTE small enough to be trained in tests, and its data."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from lte_jax import LTE, GatedDeltaNet, ModelConfig
from lte_jax.checkpoint import CheckpointConfig
from lte_jax.data import SymbolNeedles
from lte_jax.experiment import EvaluationConfig, ExperimentConfig
from lte_jax.optim import OptimizerConfig
from lte_jax.retention import PenaltyConfig

DATA = SymbolNeedles(length=32, needles=4, keys=4, values=4, queries=4, fillers=4, min_distance=12, heldout_rows=12)
ROUTER = dict(conv_sizes=(3, 3), conv_dilations=(1, 2))  # reach 3


def tiny_model(**lte) -> ModelConfig:
    settings = {"num_heads": 2, "window": 6, "budget": 5, "sinks": 1, "dropout": 0.2, **ROUTER, **lte}
    return ModelConfig(
        vocab_size=DATA.vocab_size,
        width=16,
        num_layers=2,
        pattern=(GatedDeltaNet(num_heads=2, head_dim=4), LTE(**settings)),
        intermediate_size=24,
        max_length=64,
        init_std=0.05,
    )


def tiny_experiment(**changes) -> ExperimentConfig:
    """11 steps; the penalty's controller moves every 4 and is at work from step 4 on."""
    config = ExperimentConfig(
        name="tiny",
        model=tiny_model(),
        data=DATA,
        steps=11,
        batch_size=8,
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=3, eps=1e-8, max_skipped=3),
        penalty=PenaltyConfig(period=4, initial=1e-2, minimum=1e-3),
        evaluation=EvaluationConfig(every=6, batches=None),
        checkpoint=CheckpointConfig(every=5, keep=2),
        log_every=1,
    )
    return dataclasses.replace(config, **changes)


def run_in_process(workdir: str, cache: str) -> None:
    """What a test starts as a separate process, to kill it."""
    import jax

    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_default_matmul_precision", "highest")  # as in the tests: the same programs
    from lte_jax.train import train

    train(tiny_experiment(checkpoint=CheckpointConfig(every=1, keep=2)), Path(workdir), devices=jax.devices()[:1])
