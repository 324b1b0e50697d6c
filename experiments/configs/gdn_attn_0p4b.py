"""The paper's gdn_attn at 0.4B, trained on packed shards: ``--set data.path=...``."""

from experiments.configs._paper import experiment
from lte_jax.experiment import ExperimentConfig


def get_config() -> ExperimentConfig:
    return experiment("gdn_attn", "0.4B")
