"""Which data sets are there, by name, and how do their settings travel as JSON?

A data set is a frozen record of settings with ``length`` (T), ``vocab_size`` and ``rows(split, batch_size=B)``: the
rows in reading order, without end for ``"train"``, once for ``"heldout"``. ``pipeline.Batches`` makes batches of them.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import grain

from lte_jax.data.mixture import Mixture
from lte_jax.data.needles import TextNeedles
from lte_jax.data.packing import IGNORE, DataError
from lte_jax.data.pipeline import Batches, Reading
from lte_jax.data.shards import PackedRows
from lte_jax.data.tasks import MQAR, Copying, MQARMix, Split, SymbolNeedles
from lte_jax.data.text import Text

__all__ = ["DATASETS", "IGNORE", "Batches", "DataError", "DataSet", "Reading", "dataset_from_dict", "dataset_to_dict"]


class DataSet(Protocol):
    """What training and evaluation need of a data set."""

    @property
    def length(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    def rows(self, split: Split = "train", *, batch_size: int | None = None) -> grain.MapDataset: ...


DATASETS: dict[str, type] = {
    "symbol_needles": SymbolNeedles,
    "text_needles": TextNeedles,
    "mqar": MQAR,
    "mqar_mix": MQARMix,
    "copying": Copying,
    "text": Text,
    "packed_rows": PackedRows,
    "mixture": Mixture,
}


def dataset_to_dict(dataset: DataSet) -> dict[str, Any]:
    """Settings as JSON values, with the data set's name under ``"dataset"``."""
    name = next((name for name, kind in DATASETS.items() if type(dataset) is kind), None)
    if name is None:
        raise DataError(f"{type(dataset).__name__}: not a registered data set; use one of {', '.join(DATASETS)}")
    if isinstance(dataset, Mixture):
        return {"dataset": name, "parts": [dataset_to_dict(part) for part in dataset.parts], "weights": dataset.weights}
    return {"dataset": name, **dataclasses.asdict(dataset)}  # type: ignore[call-overload]


def dataset_from_dict(values: dict[str, Any]) -> DataSet:
    """The inverse of ``dataset_to_dict``.

    Raises:
      DataError: the data set or one of its settings is unknown.
    """
    values = dict(values)
    name = values.pop("dataset", None)
    if name not in DATASETS:
        raise DataError(f"dataset={name!r}: unknown; use one of {', '.join(DATASETS)}")
    if DATASETS[name] is Mixture:
        values["parts"] = tuple(dataset_from_dict(part) for part in values.get("parts", ()))
    return _build(DATASETS[name], values, name)


def _build(kind: type, values: dict[str, Any], name: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise DataError(f"{name}: no setting {', '.join(unknown)}; it has {', '.join(sorted(fields))}")
    built = {}
    for key, value in values.items():
        factory = fields[key].default_factory
        if isinstance(value, dict) and isinstance(factory, type):
            value = _build(factory, value, f"{name}.{key}")
        built[key] = _tuples(value)
    return kind(**built)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
