"""How well does a checkpoint predict a data set, by default the held-out part of its own run's data?"""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Sequence
from typing import Any

from lte_jax import configs
from lte_jax.data import Batches, DataError, DataSet, PackedRows, Text
from lte_jax.data.tasks import Split
from lte_jax.data.tokenizer import Tokenizer, load_tokenizer
from lte_jax.evaluate.scores import Scores, score_batches
from lte_jax.lengths import check_lengths
from lte_jax.mixers.base import Reading
from lte_jax.model import LanguageModel


@dataclasses.dataclass(frozen=True)
class Source:
    """The setting that says which data: ``data.kind`` and its fields."""

    data: DataSet


SPLITTING: dict[type, set[str]] = {Text: {"heldout", "heldout_by", "seed"}, PackedRows: {"heldout"}}
"""The settings by which data are split."""


def data_set(
    settings: dict[str, Any], kind: str | None, assignments: Sequence[str], tokenizer: Tokenizer | None = None
) -> DataSet:
    """The data set of a run's settings, or a new one of ``kind``, with assignments such as "length=512" applied.

    Args:
      tokenizer: the model's: text of a new kind is written with it, unless an assignment says otherwise.

    Raises:
      ValueError: the run names no data and no kind is given, an unknown kind or setting, or text for a model whose
        tokenizer nobody says.
    """
    given = {"kind": kind} if kind else settings.get("data")
    if given is None:
        raise DataError("data: this checkpoint was not trained here, so it names no data set; name one with --data")
    source = configs.from_dict(Source, {"data": given})
    if kind and any(field.name == "tokenizer" for field in dataclasses.fields(source.data)):
        if tokenizer is not None:
            assignments = [f"tokenizer={tokenizer.name}", *assignments]
        elif not any(assignment.startswith("tokenizer=") for assignment in assignments):
            raise DataError(f"--data={kind}: the checkpoint holds no tokenizer to read text with; --set tokenizer=...")
    found = configs.override(source, [f"data.{assignment}" for assignment in assignments]).data
    name = getattr(found, "tokenizer", None)
    if name is not None and tokenizer is not None and load_tokenizer(name).fingerprint() != tokenizer.fingerprint():
        text = f"the data are of tokenizer {name!r}, whose ids are not those of the checkpoint's own"
        warnings.warn(text, stacklevel=2)
    changed = set(configs.differences(configs.to_dict(source.data), configs.to_dict(found)))
    if not kind and "path" not in changed and changed & SPLITTING.get(type(found), set()):
        text = "the run held out other rows of these data: it was trained on some of those held out now"
        warnings.warn(text, stacklevel=2)
    return found


def score(
    model: LanguageModel,
    data: DataSet,
    *,
    split: Split = "heldout",
    batch_size: int = 8,
    batches: int | None = None,
    reading: Reading = "streaming",
    buckets: int = 4,
) -> Scores:
    """Scores a model on rows of a split.

    Args:
      batches: how many batches; None takes all, which only the held-out split has.

    Raises:
      ValueError: token ids outside the model's vocabulary, no rows, or all batches of an endless split.
    """
    if data.vocab_size > model.config.vocab_size:
        raise DataError(
            f"the data has token ids up to {data.vocab_size - 1}: they must be below the model's vocab_size "
            f"{model.config.vocab_size}; use the model's own tokenizer"
        )
    if batches is None and split == "train":
        raise DataError("batches=None: the training rows have no end; say how many batches")
    if batches is not None and batches < 1:
        raise DataError(f"batches={batches}: it must be at least 1; raise it")
    rows = data.rows(split, batch_size=batch_size)
    if not len(rows):
        raise DataError(f"heldout=0: {type(data).__name__} holds out no rows; set heldout, or score --split=train")
    check_lengths(model, batch_size, data.length)
    source = Batches(rows, batch_size, pad_last=True)
    try:
        return score_batches(model, itertools.islice(source, batches), reading=reading, buckets=buckets)
    finally:
        source.close()
