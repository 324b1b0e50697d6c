"""A byte-level laLTE on a folder of real text; by default the sources of the Python that runs it.

Another folder, glob or file: ``--set data.path=...``. Then ``python -m experiments.generate`` continues from it.
"""

from __future__ import annotations

import sysconfig

from lte_jax import LTE, GatedDeltaNet, ModelConfig
from lte_jax.checkpoint import CheckpointConfig
from lte_jax.data import Packing, Text
from lte_jax.experiment import EvaluationConfig, ExperimentConfig
from lte_jax.optim import OptimizerConfig
from lte_jax.retention import PenaltyConfig


def get_config() -> ExperimentConfig:
    sources = sysconfig.get_paths()["stdlib"] + "/*.py"
    return ExperimentConfig(
        name="text",
        model=ModelConfig(
            vocab_size=259,
            width=128,
            num_layers=4,
            pattern=(
                GatedDeltaNet(num_heads=2, head_dim=64),
                LTE(num_heads=4, num_kv_heads=2, window=64, budget=32, sinks=2),
            ),
            max_length=2048,
            init_std=0.02,
            bos_token_id=256,
            eos_token_id=257,
            pad_token_id=258,
        ),
        data=Text(path=sources, packing=Packing(length=512), heldout=0.05, undecodable="replace"),
        steps=600,
        batch_size=8,
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=50, weight_decay=0.05),
        penalty=PenaltyConfig(period=8, initial=1e-3, minimum=1e-5, initial_steps=200),
        evaluation=EvaluationConfig(every=200, batches=8),
        checkpoint=CheckpointConfig(every=200, keep=2),
    )
