"""The paper's models at 0.4B and 1.4B, and the recipe that its authors train them with; the presets are its variants.

Sizes: spec of arXiv 2510.20787 and the configs of the authors' repository. No command is published for 0.4B; the same
recipe is used there. One rule of initialisation holds for all models, where the authors' baselines differ.
"""

from __future__ import annotations

from typing import Literal

from lte_jax import LTE, NSA, FullAttention, GatedDeltaNet, ModelConfig, WindowAttention
from lte_jax.checkpoint import CheckpointConfig
from lte_jax.data import PackedRows
from lte_jax.experiment import EvaluationConfig, ExperimentConfig
from lte_jax.mixers.base import MixerConfig
from lte_jax.optim import OptimizerConfig
from lte_jax.step import ComputeConfig

Size = Literal["0.4B", "1.4B"]
SIZES: tuple[Size, ...] = ("0.4B", "1.4B")
NAMES = ("gdn", "gdn_swa", "gdn_attn", "lalte", "lansa", "transformer", "nsa")
LENGTH = 4096


def model(name: str, size: Size) -> ModelConfig:
    """One of ``NAMES`` at one of ``SIZES``."""
    small = size == "0.4B"
    return ModelConfig(
        vocab_size=32000,
        width=1024 if small else 2048,
        num_layers=24,
        pattern=_pattern(name, small),
        tie_embeddings=small,
        max_length=LENGTH,
    )


def _pattern(name: str, small: bool) -> tuple[MixerConfig, ...]:
    heads, kv_heads = (16, 16) if small else (32, 8)
    gdn = GatedDeltaNet(num_heads=8, head_dim=128 if small else 256)
    attention = FullAttention(num_heads=heads, num_kv_heads=kv_heads)
    sparse = NSA(num_heads=32, num_kv_heads=2, head_dim=64, block_size=64, block_counts=16, window=512)
    patterns: dict[str, tuple[MixerConfig, ...]] = {
        "gdn": (gdn,),
        "gdn_swa": (gdn, WindowAttention(num_heads=heads, num_kv_heads=kv_heads, window=1024)),
        "gdn_attn": (gdn, attention),
        "lalte": (gdn, LTE(num_heads=heads, num_kv_heads=kv_heads, window=768, budget=512, sinks=4)),
        "lansa": (gdn, sparse),
        "transformer": (attention,),
        "nsa": (sparse,),
    }
    return patterns[name]


def experiment(name: str, size: Size) -> ExperimentConfig:
    """The model with the authors' recipe: 30,720 steps of 256 rows of 4096 tokens.

    The rows are shards written by ``python -m experiments.prepare``: give their folder with ``--set data.path=...``.
    """
    return ExperimentConfig(
        name=f"{name}_{size}",
        model=model(name, size),
        data=PackedRows(path="shards"),
        steps=30720,
        batch_size=256,
        accumulation=32,
        optimizer=OptimizerConfig(
            learning_rate=3e-4,
            final_fraction=0.1,
            warmup_steps=512,
            betas=(0.9, 0.95),
            eps=1e-15,
            weight_decay=0.1,
            clip=1.0,
        ),
        evaluation=EvaluationConfig(every=1024, batches=2),
        checkpoint=CheckpointConfig(every=1024, keep=3),
        compute=ComputeConfig(dtype="bfloat16", remat="operands"),
    )
