"""Runs Triton kernels on the CPU, in Triton's interpreter, and checks every address that they touch.

With TRITON_INTERPRET=1 before Triton is imported, ``triton_call`` comes here instead of to the GPU. Slow, and exact in
masks and indices: a load or a store outside the arrays of the call raises, where a GPU would often return some
neighbour's numbers; and what a kernel does not write stays NaN or an absurd index.

    TRITON_INTERPRET=1 pytest -m gpu -k triton tests/kernels

The interpreter by itself computes with the 16 bits of a bfloat16 as with a whole number, and cuts float32 off where it
should round: here they are numbers of ml_dtypes, which rounds after each step.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import triton.language as tl
from triton.runtime import interpreter

from pallas_kernels.triton_launch import TYPES, is_array

_ONE_AT_A_TIME = threading.Lock()  # XLA calls back from several threads, and the interpreter keeps global state
_UNWRITTEN_INDEX = 0x6ABCDEF0  # as an index far outside every array of a test


class OutOfBounds(IndexError):
    """A kernel touched memory that belongs to no array of its call."""


class _HostArray:
    """The part of a torch tensor that the interpreter asks for, around a numpy array that already lies on the host."""

    def __init__(self, array: np.ndarray):
        self.array, self.dtype = array, TYPES[str(array.dtype)]

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> _HostArray:
        return self

    def cpu(self) -> _HostArray:
        return self

    def new_empty(self, *_: Any, **__: Any) -> _HostArray:
        return _HostArray(self.array)

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self.array.shape

    def stride(self) -> tuple[int, ...]:
        return self.array.strides

    def set_(self, *_: Any) -> None:
        """The copy to the host: already there."""

    def copy_(self, _: Any) -> None:
        """The copy back: the kernel wrote into the array itself."""


def run(
    kernel: Any,
    arguments: tuple[Any, ...],
    outputs: tuple[jax.ShapeDtypeStruct, ...],
    grid: tuple[int, ...],
    aliases: dict[int, int],
    zeroed_outputs: Sequence[int],
    constexprs: dict[str, Any],
) -> tuple[jax.Array, ...]:
    """The outputs of one launch; the arguments are those of ``triton_call``.

    Raises:
      OutOfBounds: names the kernel, the argument nearest to the address, and the program.
    """
    where = [i for i, a in enumerate(arguments) if is_array(a)]
    plain = [float(a) if isinstance(a, np.float32) else a for a in arguments]

    def on_host(*arrays: Any) -> tuple[np.ndarray, ...]:
        copies = dict(zip(where, (np.array(a) for a in arrays), strict=True))
        results = [_unwritten(o) for o in outputs]
        for index in zeroed_outputs:
            results[index][...] = 0
        for source, target in aliases.items():
            results[target] = copies[source]
        named = [(kernel.arg_names[i], a) for i, a in copies.items()]
        named += zip(kernel.arg_names[len(plain) :], results, strict=False)
        values = [_HostArray(copies[i]) if i in copies else a for i, a in enumerate(plain)]
        # As on a GPU, an overflow is an infinity and no warning: a mask may take it away.
        with _ONE_AT_A_TIME, _checked(kernel.__name__, named), np.errstate(all="ignore"):
            kernel[grid](*values, *map(_HostArray, results), **constexprs)
        return tuple(results)

    return jax.pure_callback(on_host, outputs, *(arguments[i] for i in where))


def _unwritten(output: jax.ShapeDtypeStruct) -> np.ndarray:
    if jnp.issubdtype(output.dtype, jnp.floating):
        return np.full(output.shape, np.nan, output.dtype)
    return np.full(output.shape, _UNWRITTEN_INDEX if np.dtype(output.dtype).itemsize >= 4 else 1, output.dtype)


@contextlib.contextmanager
def _checked(kernel: str, named: list[tuple[str, np.ndarray]]) -> Iterator[None]:
    """While a launch runs: loads and stores are compared with the arrays' addresses."""
    named = sorted(named, key=lambda pair: pair[1].ctypes.data)
    starts = np.array([a.ctypes.data for _, a in named])
    ends = starts + np.array([a.nbytes for _, a in named])
    builder = interpreter.InterpreterBuilder
    load, store, patch_tensor = builder.create_masked_load, builder.create_masked_store, interpreter._patch_lang_tensor

    def check(pointers: Any, mask: Any, verb: str) -> None:
        size = np.dtype(interpreter._get_np_dtype(pointers.get_element_ty())).itemsize
        address, mask = np.broadcast_arrays(np.asarray(pointers.data).astype(np.int64), np.asarray(mask.data))
        address = address[mask.astype(bool)]
        array = np.searchsorted(starts, address, side="right") - 1
        wrong = (array < 0) | (address + size > ends[array])
        if wrong.any():
            bad, near = address[wrong][0], max(int(array[wrong][0]), 0)
            name, array_near = named[near]
            raise OutOfBounds(
                f"{kernel}: program {interpreter.interpreter_builder.grid_idx} {verb} {wrong.sum()} of {wrong.size} "
                f"numbers outside its arrays, the first {bad - starts[near]} bytes from the start of {name!r}, "
                f"which has {array_near.nbytes}"
            )

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask, "reads")
        return load(self, pointers, mask, *rest)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask, "writes")
        return store(self, pointers, value, mask, *rest)

    def patch_with_index(tensor: Any, scope: Any) -> None:
        # numpy from 2.4 on refuses int() of an array of one number, which the interpreter makes of a loop's bound.
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).item()))

    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store
    interpreter._patch_lang_tensor = patch_with_index
    try:
        yield
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store
        interpreter._patch_lang_tensor = patch_tensor


def _make_bfloat16_numbers() -> None:
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    np_dtype, dot = interpreter._get_np_dtype, builder.create_dot

    def with_bfloat16(dtype: Any) -> np.dtype:
        scalar = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
        return np.dtype(jnp.bfloat16) if scalar == tl.bfloat16 else np_dtype(dtype)

    def cast(self: Any, source: Any, dtype: Any, *_: Any) -> Any:
        return handle(source.data.astype(with_bfloat16(dtype)), dtype.scalar)

    def dot_of_float32(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        wide = (cast(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, *wide, *rest)

    interpreter._get_np_dtype = with_bfloat16
    builder.cast_impl, builder.create_fp_to_fp, builder.create_dot = cast, cast, dot_of_float32
    builder.get_bf16 = lambda self, value: handle(np.array([value], jnp.bfloat16), tl.bfloat16)


_make_bfloat16_numbers()
