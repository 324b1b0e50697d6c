"""What the gated delta rule's Hopper kernels share: layouts, buffers in shared memory, products and the launch.

A chunk is 64 tokens, the height of a warpgroup's product. A tile in registers has one layout (``WGMMA``); a value
per row of a tile is in ``ROWS``, one per column in ``COLUMNS``.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

CHUNK = 64
PROGRAMS = 132  # persistent ones: one per multiprocessor of a Hopper GPU
BLOCK_V = 64  # values of a program, or of a step
SQUARE = (CHUNK, CHUNK)
WGMMA = plgpu.Layout.WGMMA
ROWS = WGMMA.reduce(1)
COLUMNS = WGMMA.reduce(0)

# Of the factors that the within-chunk kernel writes per token (or the same for all tokens: CARRY).
READ_K, READ_Q, WRITE, CARRY, WRITE_UNWEIGHTED, NORM_K, NORM_Q = range(7)
FACTORS = 8
# Of the gates that it reads.
COARSE, FINE, BETA, RUN = range(4)
GATES = 4

_interpret: contextvars.ContextVar[Any] = contextvars.ContextVar("interpret", default=None)


@contextlib.contextmanager
def interpreted(params: Any = None) -> Iterator[None]:
    """Runs the kernels in Pallas's interpreter, on any device; ``params`` is a ``plgpu.InterpretGPUParams``."""
    token = _interpret.set(plgpu.InterpretGPUParams() if params is None else params)
    try:
        yield
    finally:
        _interpret.reset(token)


def interpreting() -> bool:
    return _interpret.get() is not None


def buffer(shape: tuple[int, ...], dtype: Any, width: int | None = None) -> Any:
    """Shared memory for tiles of a 16-bit dtype, in the order that copies and matrix products want.

    Both operands of a product need the order of the same width: by default that of the last dimension.
    """
    swizzle = plgpu.find_swizzle((width or shape[-1]) * jnp.dtype(dtype).itemsize * 8)
    tiling = plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize))  # type: ignore[abstract]
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))  # type: ignore[abstract]


def spare(shape: tuple[int, ...], dtype: Any, name: str = "spare") -> dict[str, Any]:
    """A buffer for ``left`` where one is needed."""
    return {name: buffer(shape, dtype)} if interpreting() else {}


def left(x: jax.Array, room: Any) -> Any:
    """``x`` in registers as the left operand of a product; the interpreter has such operands in shared memory alone."""
    if not interpreting():
        return x
    room[...] = x
    plgpu.commit_smem()
    return room


def index(dimension: int, shape: tuple[int, int] = SQUARE) -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, shape, dimension, layout=WGMMA)


def zero_of(turn: jax.Array) -> jax.Array:
    """0, which the compiler takes for a number that depends on ``turn``.

    What is computed from it stays inside a loop over ``turn``. Masks and addresses of buffers would else be computed
    before the loop and all kept in registers, which spill.
    """
    return jax.lax.optimization_barrier(turn) - turn


def indices(turn: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Row and column of a square tile, for use inside a loop over ``turn`` (``zero_of``)."""
    return index(0) + zero_of(turn), index(1)


def along_rows(x: Any, shape: tuple[int, int] = SQUARE) -> jax.Array:
    """x[i] at (i, j)."""
    return jax.lax.broadcast_in_dim(x, shape, [0])


def along_columns(x: jax.Array, shape: tuple[int, int] = SQUARE) -> jax.Array:
    """x[j] at (i, j)."""
    return jax.lax.broadcast_in_dim(x, shape, [1])


def zeros(shape: tuple[int, int]) -> jax.Array:
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), WGMMA)


def row_zeros() -> jax.Array:
    return plgpu.layout_cast(jnp.zeros((CHUNK,), jnp.float32), ROWS)


def product(
    a: Any,
    b: Any,
    shape: tuple[int, int],
    start: jax.Array | None = None,
    *,
    room: Any = None,
    meanwhile: Callable[[], Any] | None = None,
) -> Any:
    """a b, or start + a b. ``a`` is in shared memory or registers, ``b`` in shared memory; more in ``products``."""
    return products([(a, b)], shape, start, room=room, meanwhile=meanwhile)


def products(
    pairs: list[tuple[Any, Any]],
    shape: tuple[int, int],
    start: jax.Array | None = None,
    *,
    room: Any = None,
    meanwhile: Callable[[], Any] | None = None,
) -> Any:
    """The sum of the products of the pairs, and ``start``, in one accumulator.

    ``meanwhile`` runs between the start of the products and the wait for them; without ``start``, what it returns is
    the second result. ``room`` is where the interpreter puts left operands in registers.

    The barrier keeps the compiler from moving arithmetic on the result in front of the wait for it, which is not
    visible as a dependence on the accumulator's registers.
    """

    def multiply(accumulator):
        for a, b in pairs:
            plgpu.wgmma(accumulator, left(a, room) if isinstance(a, jax.Array) else a, b)
        return None if meanwhile is None else meanwhile()

    def fresh(accumulator):
        beside = multiply(accumulator)
        return (accumulator[...], beside) if meanwhile is not None and start is None else accumulator[...]

    def further(accumulator):
        multiply(accumulator)

    if start is not None and not interpreting():
        return jax.lax.optimization_barrier(pl.run_state(further)(plgpu.ACC.init(start)))
    result = jax.lax.optimization_barrier(pl.run_scoped(fresh, plgpu.ACC(shape, jnp.float32)))
    return result if start is None else start + result  # the interpreter's accumulators begin at zero


def together(pairs: list[tuple[Any, Any]], shape: tuple[int, int], meanwhile: Callable[[], Any]) -> tuple[Any, ...]:
    """The product of each pair (both in shared memory), all started at once, and what ``meanwhile`` returns."""

    def multiply(*accumulators):
        for accumulator, (a, b) in zip(accumulators, pairs, strict=True):
            plgpu.wgmma(accumulator, a, b)
        beside = meanwhile()
        return *(accumulator[...] for accumulator in accumulators), beside

    return jax.lax.optimization_barrier(pl.run_scoped(multiply, *(plgpu.ACC(shape, jnp.float32) for _ in pairs)))


def accumulate(sums: tuple[jax.Array, ...], terms: list[list[tuple[Any, Any]]]) -> tuple[jax.Array, ...]:
    """Each sum plus the products of its pairs (all in shared memory), all started before the first is waited for."""
    if interpreting():
        return tuple(products(pairs, (x.shape[0], x.shape[1]), x) for x, pairs in zip(sums, terms, strict=True))

    def multiply(accumulators):
        for accumulator, pairs in zip(accumulators, terms, strict=True):
            for a, b in pairs:
                plgpu.wgmma(accumulator, a, b)

    return jax.lax.optimization_barrier(pl.run_state(multiply)(tuple(plgpu.ACC.init(x) for x in sums)))


def split(x: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """x as a sum of two numbers of a 16-bit dtype."""
    high = x.astype(dtype)
    return high, (x - high.astype(jnp.float32)).astype(dtype)


def bytes_of(scratch: dict[str, Any]) -> dict[str, int]:
    """Bytes that each buffer of ``scratch`` takes of shared memory, where each begins at a multiple of 1024."""
    sizes = {}
    for name, buffers in scratch.items():
        each = buffers if isinstance(buffers, tuple) else (buffers,)
        if not isinstance(each[0], plgpu.Barrier):
            sizes[name] = sum(-(-math.prod(x.shape) * jnp.dtype(x.dtype).itemsize // 1024) * 1024 for x in each)
    return sizes


def launch(
    name: str,
    body: Callable[[Any], None],
    *,
    inputs: dict[str, Any],
    outputs: dict[str, Any],
    scratch: dict[str, Any],
    grid: dict[str, int],
    warpgroups: int = 1,
    reduction_bytes: int = 2048,
) -> dict[str, jax.Array]:
    """Runs ``body`` on every point of ``grid``, with all references by name in one namespace.

    An input or output that is None has no reference: its name is None in the namespace. ``reduction_bytes`` of shared
    memory are for sums over the rows of a tile; sums along them need none.
    """
    given = {key: x for key, x in inputs.items() if x is not None}
    wanted = {key: x for key, x in outputs.items() if x is not None}
    names = (*given, *wanted)

    def kernel(*refs, **buffers):
        body(
            types.SimpleNamespace(
                **{**dict.fromkeys((*inputs, *outputs)), **dict(zip(names, refs, strict=True)), **buffers}
            )
        )

    threads: dict[str, Any] = {"num_threads": warpgroups, "thread_name": "warpgroup"} if warpgroups > 1 else {}
    results = plgpu.kernel(
        kernel,
        out_type=tuple(wanted.values()),
        scratch_types=scratch,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=reduction_bytes),
        interpret=_interpret.get(),
        kernel_name=name,
        **threads,
    )(*given.values())
    return dict(zip(wanted, results, strict=True))
