"""What every operation checks in its arguments, and the words in which it refuses one."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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

    def record(self, name: str, value: Any, kind: type) -> None:
        """``value`` is one of the NamedTuples ``kind``; its fields are still to be checked."""
        self.require(isinstance(value, kind), f"{name} is {type(value).__name__}; it must be a {kind.__name__}")

    def number(self, name: str, value: Any, least: float = -math.inf) -> float:
        """``value`` as a float: finite, at least ``least``, and known when the program is traced."""
        try:
            number = float(value)
        except (TypeError, ValueError, jax.errors.JAXTypeError) as error:
            raise UnsupportedCase(f"{self.operation}: {name} is {value!r}; it must be a number, not traced") from error
        self.require(math.isfinite(number), f"{name}={number}; it must be finite")
        self.require(number >= least, f"{name}={number}; it must be at least {least}")
        return number

    def scale(self, scale: float | None) -> float:
        """Of the logits; None is N^-1/2."""
        return self.sizes["N"] ** -0.5 if scale is None else self.number("scale", scale)

    def count(self, name: str, value: Any, least: int = 1) -> None:
        """``value`` is a Python integer of at least ``least``; True is none."""
        whole = isinstance(value, int) and not isinstance(value, bool)
        self.require(whole and value >= least, f"{name}={value!r}; it must be a Python integer >= {least}")

    def choice(self, name: str, value: object, allowed: Iterable[object], fix: str = "") -> None:
        """``value`` is one of ``allowed``; ``fix`` says what to do instead."""
        known = any(type(value) is type(one) and value == one for one in allowed)
        listed = ", ".join(map(str, allowed))
        self.require(known, f"{name}={value!r} is not one of {listed}" + (f"; {fix}" if fix else ""))

    def dtype(self, name: str, value: Any) -> np.dtype:
        """``value`` as a dtype, one of ``FLOATS``."""
        try:
            dtype = jnp.dtype(value)
        except TypeError as error:
            raise UnsupportedCase(f"{self.operation}: {name}={value!r} is no dtype; use a float one") from error
        self.choice(name, str(dtype), FLOATS)
        return dtype
