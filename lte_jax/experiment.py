"""What is an experiment made of? Its settings, each beside the code that reads it, and what they must satisfy."""

from __future__ import annotations

import dataclasses

from lte_jax.checkpoint import CheckpointConfig
from lte_jax.data import DataSet, ReadingConfig
from lte_jax.losses import router_reach
from lte_jax.mixers.base import Reading
from lte_jax.model_config import ModelConfig
from lte_jax.optim import OptimizerConfig
from lte_jax.retention import PenaltyConfig
from lte_jax.sharding import MeshConfig
from lte_jax.spikes import SpikeConfig
from lte_jax.step import ComputeConfig, StepConfig


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Held-out evaluation inside the loop."""

    every: int = 1000
    """Steps between evaluations; the last step is always evaluated, if rows are held out."""
    batches: int | None = 16
    """How many batches of ``batch_size`` held-out rows; None takes all."""
    reading: Reading = "prompt"
    """How LTE reads: "prompt" and "streaming" hold the budget, "train" does not."""


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """Everything that a run is made of; saved with it."""

    name: str
    model: ModelConfig
    data: DataSet
    steps: int
    batch_size: int
    """Rows of a step, over all devices and accumulated parts."""
    accumulation: int = 1
    """Parts of a step's batch that are computed one after the other."""
    seed: int = 0
    """Of the initial weights and of dropout; the order of rows and what a task draws follow ``data.seed``."""
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    penalty: PenaltyConfig = dataclasses.field(default_factory=PenaltyConfig)
    spikes: SpikeConfig = dataclasses.field(default_factory=SpikeConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    compute: ComputeConfig = dataclasses.field(default_factory=ComputeConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    reading: ReadingConfig = dataclasses.field(default_factory=ReadingConfig)
    log_every: int = 10

    def check(self) -> None:
        """Raises ValueError, stating the value, the rule and the fix, before anything is launched."""
        self.model.validate()
        if "lte" in self.model.layer_names():
            router_reach(self.model)
        if min(self.steps, self.batch_size, self.accumulation, self.log_every, self.evaluation.every) < 1:
            raise ValueError("steps, batch_size, accumulation, log_every and evaluation.every must be at least 1")
        if self.evaluation.batches is not None and self.evaluation.batches < 1:
            raise ValueError(
                f"evaluation.batches={self.evaluation.batches}: it must be at least 1, or none for all held-out rows; "
                "a run that holds out no rows evaluates nothing"
            )
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"batch_size={self.batch_size} is not a multiple of accumulation={self.accumulation}: change one"
            )
        if self.data.vocab_size > self.model.vocab_size:
            raise ValueError(
                f"the data has token ids up to {self.data.vocab_size - 1}, outside the model's vocabulary "
                f"[0, {self.model.vocab_size}): raise model.vocab_size or use the model's tokenizer"
            )


def step_config(config: ExperimentConfig, length: int) -> StepConfig:
    """What of an experiment shapes the compiled step."""
    return StepConfig(
        config.model,
        config.optimizer,
        config.penalty,
        config.compute,
        steps=config.steps,
        accumulation=config.accumulation,
        seed=config.seed,
        length=length,
        spikes=config.spikes,
    )
