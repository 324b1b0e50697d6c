"""laLTE and laNSA in JAX: hybrids of Gated DeltaNet with learned token eviction and native sparse attention."""

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
