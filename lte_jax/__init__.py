"""laLTE and laNSA in JAX: hybrids of Gated DeltaNet with learned token eviction and native sparse attention.

A model, from the bottom up
  dims: the letters of dimensions, and the array types made of them
  layers, inputs: linear maps, norms, rotary positions and the MLP; what a model accepts
  mixers: a file for each token mixer, and the contract that all keep
  model_config, blocks, model: the pattern of mixers as data, one layer, the language model and its cache
  remat, depth: what a backward pass keeps; depth as a loop or written out

On a mesh of devices
  sharding: the one table of logical axes to mesh axes
  partition, partition_router: operations inside shard_map
  partition_plan, partition_retained: what each device holds, and what it receives from others

Training
  experiment, configs: all settings of a run; settings as JSON and from the command line
  train, step: the loop, and what one step computes
  losses, retention, optim: cross-entropy, LTE's penalty and its controller, AdamW
  data: documents, packing, shards, batches, synthetic tasks
  spikes, bad_steps, signals: what a run watches for
  metrics, memory, profiling, plots: what it reports
  processes, agreement: how several processes find one another, and what they tell one another

On disk
  runs, checkpoint, folder_lock: a run's folder, its saves, and who is at work in it
  checksums, damage, watched_writes, whole_files: how a save is proved whole
  restore: how a folder becomes a model
  convert, hf_config, penalty_files: the authors' folders, read and written

In use
  generate, decode, sampling, continuations, conversation: the loop over tokens and what it is made of
  lengths: which lengths are said to be too long, and which are refused
  evaluate: held-out loss, tasks, the harness, what LTE keeps
"""

from lte_jax.convert import from_pretrained, save_pretrained
from lte_jax.mixers.full_attention import Config as FullAttention
from lte_jax.mixers.gated_deltanet import Config as GatedDeltaNet
from lte_jax.mixers.lte import Config as LTE
from lte_jax.mixers.nsa import Config as NSA
from lte_jax.mixers.window_attention import Config as WindowAttention
from lte_jax.model import LanguageModel, ModelCache, ModelOutput
from lte_jax.model_config import ModelConfig

__all__ = [
    "LTE",
    "NSA",
    "FullAttention",
    "GatedDeltaNet",
    "LanguageModel",
    "ModelCache",
    "ModelConfig",
    "ModelOutput",
    "WindowAttention",
    "from_pretrained",
    "save_pretrained",
]
