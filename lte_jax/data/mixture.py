"""How are several data sets mixed by weight into one?"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Mapping
from typing import Any

import grain

from lte_jax import configs
from lte_jax.data.needles import TextNeedles
from lte_jax.data.packing import DataError
from lte_jax.data.pipeline import mix, once
from lte_jax.data.shards import PackedRows
from lte_jax.data.tasks import MQAR, Copying, Split, SymbolNeedles
from lte_jax.data.text import Text
from lte_jax.data.tokenizer import load_tokenizer

Part = SymbolNeedles | TextNeedles | MQAR | Copying | Text | PackedRows
"""A data set whose rows are all of one length, and may therefore be mixed."""


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Rows of several data sets in proportion to ``weights``; each part is shuffled and repeated by itself.

    The held-out split is that of all parts, mixed once. All parts give the same arrays of the same length.
    """

    parts: tuple[Part, ...] = ()
    weights: tuple[float, ...] = ()

    @property
    def length(self) -> int:
        return self._checked[0].length

    @property
    def vocab_size(self) -> int:
        return max(part.vocab_size for part in self._checked)

    @property
    def tokenizer(self) -> str | None:
        """That of the parts which have one, by the name of the first; None for tasks of symbols."""
        names = (getattr(part, "tokenizer", None) for part in self._checked)
        return next((name for name in names if name is not None), None)

    @functools.cached_property
    def _checked(self) -> tuple[Part, ...]:
        """The parts; their tokenizers' files are read once, whatever is asked of the mixture.

        Raises:
          DataError: there is none, or two have tokenizers that give different ids.
        """
        if not self.parts:
            raise DataError("parts=(): a mixture needs at least one data set; add one")
        names = dict.fromkeys(str(part.tokenizer) for part in self.parts if hasattr(part, "tokenizer"))
        if len({load_tokenizer(name).fingerprint() for name in names}) > 1:
            raise DataError(
                f"parts with tokenizers {', '.join(names)}: one model reads the ids of one; prepare all parts with the "
                "same"
            )
        return self.parts

    def to_dict(self) -> dict[str, Any]:
        """JSON values; each part carries its class name."""
        parts = [{"kind": type(part).__name__, **configs.to_dict(part)} for part in self.parts]
        return {"parts": parts, "weights": list(self.weights)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Mixture:
        """The inverse of ``to_dict``."""
        unknown = sorted(set(values) - {"parts", "weights"})
        if unknown:
            raise DataError(f"Mixture: no setting {', '.join(unknown)}; it has parts, weights")
        kinds = {kind.__name__: kind for kind in typing.get_args(Part)}
        parts = []
        for number, part in enumerate(values.get("parts", ())):
            settings = dict(part)
            kind = settings.pop("kind", None)
            if kind not in kinds:
                raise DataError(f"parts[{number}]: kind {kind!r} is unknown; use one of {', '.join(kinds)}")
            parts.append(configs.from_dict(kinds[kind], settings, f"parts[{number}]"))
        return cls(tuple(parts), tuple(map(float, values.get("weights", ()))))

    def rows(self, split: Split = "train", *, batch_size: int | None = None) -> grain.MapDataset:
        """The rows of a split in reading order: without end for "train", once for "heldout"."""
        lengths = [part.length for part in self._checked]
        if len(set(lengths)) > 1:
            raise DataError(f"parts of lengths {lengths}: rows of one batch have one length; give all parts the same")
        opened = [part.rows(split, batch_size=batch_size) for part in self.parts]
        filled = [rows for rows in opened if len(rows)]
        names = {tuple(sorted(rows[0])) for rows in filled}
        if len(names) > 1:
            raise DataError(f"parts with arrays {sorted(names)}: mix text with text, or tasks with tasks")
        if split == "train":
            return mix(opened, self.weights)
        return once(grain.MapDataset.concatenate(filled), 0) if filled else opened[0]
