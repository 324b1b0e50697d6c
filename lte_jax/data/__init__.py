"""Which data sets are there?

A data set is a frozen record of settings with ``length`` (T), ``vocab_size`` and ``rows(split, batch_size=B)``: the
rows in reading order, without end for ``"train"``, once for ``"heldout"``. ``Batches`` makes batches of them.
"""

from __future__ import annotations

from lte_jax.data.mixture import Mixture, Part
from lte_jax.data.needles import TextNeedles
from lte_jax.data.packing import IGNORE, DataError, Packing, UnreadableError
from lte_jax.data.pipeline import Batches, ReadingConfig
from lte_jax.data.shards import PackedRows
from lte_jax.data.tasks import MQAR, Copying, MQARMix, SymbolNeedles
from lte_jax.data.text import Text

DataSet = Part | MQARMix | Mixture
"""The type of a setting that may be any data set."""

__all__ = [
    "IGNORE",
    "MQAR",
    "Batches",
    "Copying",
    "DataError",
    "DataSet",
    "MQARMix",
    "Mixture",
    "PackedRows",
    "Packing",
    "ReadingConfig",
    "SymbolNeedles",
    "Text",
    "TextNeedles",
    "UnreadableError",
]
