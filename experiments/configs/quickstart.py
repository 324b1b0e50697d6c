"""A few minutes on a laptop: laLTE against GDN+SWA with the same bytes of cache, on needles far back.

Eight needles, each a key and its value in one symbol, lie in noise 30 to 95 tokens before they are asked for. laLTE's
window is 13 tokens, and its routers must learn to spend 16 slots on needles. The other's window is 42 tokens, which
reaches the nearest needles alone: at heads of 16 laLTE's scores, positions and remembered inputs of its routers weigh
as much as 13 slots. The recurrent state is small on purpose: a large one solves the task alone.
"""

from __future__ import annotations

from experiments.suite import Suite
from lte_jax import LTE, GatedDeltaNet, ModelConfig, WindowAttention
from lte_jax.checkpoint import CheckpointConfig
from lte_jax.data import SymbolNeedles
from lte_jax.experiment import EvaluationConfig, ExperimentConfig
from lte_jax.mixers.base import MixerConfig
from lte_jax.optim import OptimizerConfig
from lte_jax.retention import PenaltyConfig

WINDOW, BUDGET = 12, 16
SAME_BYTES = 42  # the window whose cache is the largest that is no larger than LTE's, in float32 and in bfloat16


def get_config() -> Suite:
    lte = LTE(num_heads=4, window=WINDOW, budget=BUDGET, sinks=1, dropout=0.0)
    same_bytes = WindowAttention(num_heads=4, window=SAME_BYTES)
    return Suite(runs=(_experiment("lalte", lte), _experiment("gdn_swa", same_bytes)))


def _experiment(name: str, attention: MixerConfig) -> ExperimentConfig:
    data = SymbolNeedles(
        length=96, needles=8, keys=8, values=8, queries=8, fillers=8, min_distance=30, heldout_rows=512
    )
    return ExperimentConfig(
        name=name,
        model=ModelConfig(
            vocab_size=data.vocab_size,
            width=64,
            num_layers=2,
            pattern=(GatedDeltaNet(num_heads=2, head_dim=4), attention),
            intermediate_size=128,
            max_length=256,
            init_std=0.15,
        ),
        data=data,
        steps=900,
        batch_size=32,
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=50, final_fraction=0.1, eps=1e-8, weight_decay=0.01),
        # The penalty waits until recall has formed: one that bites before that drives heads to keep nothing for ever.
        penalty=PenaltyConfig(period=8, initial=1e-2, minimum=1e-4, initial_steps=300),
        evaluation=EvaluationConfig(every=300, batches=None, reading="streaming"),
        checkpoint=CheckpointConfig(every=450, keep=2),
        log_every=20,
    )
