"""How the penalty brings what each head keeps inside its tolerance: a small laLTE on text, about ten minutes on a CPU.

``loss.png`` in the workdir draws the kept count of every head beside the band of the budget. The budget is a quarter of
the row, and the controller's factors are gentler than the paper's, whose runs are ten times as long.
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
    sources = sysconfig.get_paths()["stdlib"] + "/asyncio/*.py"
    return ExperimentConfig(
        name="penalty",
        model=ModelConfig(
            vocab_size=259,
            width=64,
            num_layers=2,
            pattern=(
                GatedDeltaNet(num_heads=2, head_dim=16),
                LTE(num_heads=4, num_kv_heads=4, window=16, budget=32, sinks=1, dropout=0.0),
            ),
            intermediate_size=96,
            max_length=512,
            init_std=0.05,
        ),
        data=Text(path=sources, packing=Packing(length=128), heldout=0.05, undecodable="replace"),
        steps=3000,
        batch_size=8,
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=50, eps=1e-8, final_fraction=0.2, weight_decay=0.01),
        penalty=PenaltyConfig(period=8, initial=1e-3, minimum=1e-5, raise_factor=1.1, lower_factor=1.15),
        evaluation=EvaluationConfig(every=1000, batches=8),
        checkpoint=CheckpointConfig(every=1000, keep=1),
    )
