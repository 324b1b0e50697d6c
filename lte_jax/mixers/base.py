"""What every token mixer promises: the interface that the model, the cache and the contract test rely on.

A mixer maps [B, T, D] to [B, T, D] along time. It is a module of parameters only; whatever changes over time (caches,
keys) is passed in and out, so that stacked layers run under ``jax.lax.scan``.

The four promises, tested for every registered mixer:

* causal: no output depends on a later token (LTE's ``"prompt"`` reading excepted: it ranks the whole prompt);
* resumable: a sequence given to ``extend`` in any pieces gives what one call gives;
* packed documents equal the documents alone, and padding anywhere changes nothing;
* the cache has a fixed shape, of ``cache_bytes(batch, max_length, dtype)`` bytes.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar, Literal

import jax
from flax import nnx
from jax.typing import DTypeLike

from lte_jax.dims import Hidden, Positions, SegmentIds
from lte_jax.layers import Linear, Recipe

Reading = Literal["train", "prompt", "streaming"]
"""How LTE reads a sequence; the other mixers read all three alike.

``"train"``: every selected token stays. ``"prompt"``: the whole sequence sees the best M at its end (the authors'
evaluation and prompt call). ``"streaming"``: each token sees what the store held at its own time.
"""

Aux = dict[str, jax.Array]
Cache = Any


@dataclasses.dataclass(frozen=True)
class MixerConfig:
    """The settings of one mixer, which alone reads them; saved with each run. All have ``num_heads``, of at least 1."""

    def validate(self, width: int) -> None:
        """Raises ValueError, stating the value, the rule and the fix, where a setting cannot work at model width D."""


class Mixer(nnx.Module, abc.ABC):
    """The interface; the constructor's arguments are the same for all."""

    inputs: ClassVar[tuple[str, ...]]
    """The names of the Linear maps of x, which read nothing else: a decode step merges them."""

    o_proj: Linear
    implementation: str | None

    needs_max_length: ClassVar[bool] = False
    """Whether the cache grows with the sequence (full attention, NSA), so that ``max_length`` bounds it."""

    @abc.abstractmethod
    def __init__(self, config: MixerConfig, width: int, recipe: Recipe):
        """Checks the settings at width D and draws the parameters."""

    @abc.abstractmethod
    def __call__(
        self,
        x: Hidden,
        *,
        positions: Positions,
        segment_ids: SegmentIds | None = None,
        reading: Reading = "train",
        key: jax.Array | None = None,
        context: Aux | None = None,
    ) -> tuple[Hidden, Aux]:
        """The whole sequence at once.

        Args:
          positions: counted from each document's first token.
          segment_ids: document of each token, 0 for padding; None for one document without padding.
          key: draws dropout; None means no dropout.
          context: the aux of the mixer below, for mixers that read it.

        Returns:
          y and aux, a dictionary of arrays with the same keys and shapes at every call.
        """

    @abc.abstractmethod
    def init_cache(self, batch: int, max_length: int | None, dtype: DTypeLike) -> Cache:
        """An empty cache, a pytree of fixed shape whose leaves all begin with the batch dimension."""

    @abc.abstractmethod
    def extend(
        self,
        x: Hidden,
        cache: Cache,
        *,
        segment_ids: SegmentIds | None = None,
        reading: Reading = "streaming",
        context: Aux | None = None,
        wants_aux: bool = True,
    ) -> tuple[Hidden, Cache, Aux]:
        """Continues each row's document by T >= 1 tokens; ``segment_ids`` is 1 for tokens and 0 for padding.

        Args:
          reading: "prompt" is for a first call on an empty cache only.
          wants_aux: False where only the mixer above reads aux: what it does not read may be left out.

        Returns:
          y, the new cache, and aux as ``__call__`` gives it.
        """

    @abc.abstractmethod
    def cache_bytes(self, batch: int, max_length: int | None, dtype: DTypeLike) -> int:
        """The cache's size in bytes, from the formula in the mixer's docstring."""
