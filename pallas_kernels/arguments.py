"""What every operation checks in its arguments, and the words in which it refuses one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax

from pallas_kernels.dispatch import UnsupportedCase

FLOATS = ("float32", "bfloat16", "float16")


class Arguments:
    """The checks of one call: each raises UnsupportedCase, the operation's name in front, for a broken rule.

    ``sizes`` holds the dimensions met so far. A name means one size in the whole call: what the caller has put there,
    where other arguments fix it, else that of the first array that has it.
    """

    def __init__(self, operation: str):
        self.operation = operation
        self.sizes: dict[str, int] = {}

    def require(self, condition: bool, message: str) -> None:
        """``message`` states the value, the rule that it breaks, and what to do instead."""
        if not condition:
            raise UnsupportedCase(f"{self.operation}: {message}")

    def array(self, name: str, array: Any, dimensions: str, *dtypes: str) -> None:
        """``array`` has these dimensions, as in ``"B T K 3"``, none empty, and one of the dtypes (if none: any)."""
        letters = dimensions.split()
        wanted = f"[{', '.join(letters)}]"
        known = hasattr(array, "shape") and hasattr(array, "dtype")
        self.require(known, f"{name} has type {type(array).__name__}; it must be an array {wanted}")
        fault = f"{name} has shape {array.shape}; it must be {wanted}"
        self.require(len(array.shape) == len(letters), fault)
        for letter, size in zip(letters, array.shape, strict=True):
            if letter.isdigit():
                self.require(size == int(letter), fault)
            elif letter in self.sizes:
                self.require(size == self.sizes[letter], f"{fault} with {letter} = {self.sizes[letter]}")
            else:
                self.require(size > 0, f"{fault} with {letter} at least 1")
                self.sizes[letter] = size
        fits = not dtypes or str(array.dtype) in dtypes
        self.require(fits, f"{name} has dtype {array.dtype}; it must be {' or '.join(dtypes)}: cast it")

    def optional(self, name: str, array: Any, dimensions: str, *dtypes: str) -> None:
        """``array`` is None, or as :meth:`array` wants it."""
        if array is not None:
            self.array(name, array, dimensions, *dtypes)

    def heads(self) -> None:
        """H, the heads of the queries or the values, are equal groups for the K heads of the keys."""
        H, K = self.sizes["H"], self.sizes["K"]
        self.require(H % K == 0, f"there are H = {H} heads and K = {K} key heads; H must be a multiple of K")

    def scale(self, scale: float | None) -> float:
        """Of the logits; None is N^-1/2."""
        if scale is None:
            return self.sizes["N"] ** -0.5
        try:
            value = float(scale)
        except (TypeError, ValueError, jax.errors.JAXTypeError) as error:
            raise UnsupportedCase(f"{self.operation}: scale is {scale!r}; it must be a number, not traced") from error
        self.require(math.isfinite(value), f"scale={value}; it must be finite")
        return value

    def count(self, name: str, value: Any) -> None:
        """``value`` is an int of at least 1; True is none."""
        whole = isinstance(value, int) and not isinstance(value, bool)
        self.require(whole and value >= 1, f"{name}={value!r}; it must be an integer >= 1")

    def choice(self, name: str, value: object, allowed: Sequence[object]) -> None:
        """``value`` is one of ``allowed``."""
        self.require(value in allowed, f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}")
