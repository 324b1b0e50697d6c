"""laLTE and laNSA in JAX: hybrids of Gated DeltaNet with learned token eviction and native sparse attention.

A model, from the bottom up:
  dims           the letters of dimensions, and array types made of them
  layers, inputs linear maps, norms, rotary positions, the MLP; what a model accepts
  mixers         one file a token mixer, and ``base``, the contract of all
  model_config, blocks, model
                 the pattern of mixers as data, one layer, the language model with its cache
  remat, depth   what a backward pass keeps; depth as a loop or written out
Operations on a mesh of devices:
  sharding       the one table of logical axes to mesh axes
  partition, partition_plan, partition_router, retained
                 operations inside shard_map, and what a device receives from others
Training:
  train, step, experiment
                 the loop, one step, all settings of a run
  losses, retention, optim
                 cross-entropy, LTE's penalty and its controller, AdamW
  spikes, bad_steps, metrics, memory, profiling, plots, signals
                 what a run watches, reports and obeys
  data           sources, packing, shards, batches, synthetic tasks
A run on disk:
  runs, checkpoint, checksums, damage, watched_writes, whole_files, restore
                 its folder, its saves, how they are proved whole, how a folder becomes a model
  convert, hf_config, penalty_files
                 the authors' folders, read and written
  processes, agreement
                 several processes: how they find one another, and what they tell one another
  configs        settings to JSON and from the command line
Use of a model:
  generate, decode, sampling, continuations, conversation, lengths
                 the loop over tokens, the layers within it, the next token, text, a chat, bounds
  evaluate       held-out loss, tasks, the harness, what LTE keeps
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
