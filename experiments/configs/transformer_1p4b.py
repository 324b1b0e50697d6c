"""The paper's transformer at 1.4B, trained on packed shards: ``--set data.path=...``."""

from experiments.configs._paper import experiment
from lte_jax.experiment import ExperimentConfig


def get_config() -> ExperimentConfig:
    return experiment("transformer", "1.4B")
