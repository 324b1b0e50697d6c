"""How does an operation launch a Triton kernel from JAX, and what did the compiler make of that kernel?

Kernel files take ``jit`` and ``tl`` from here, so that they can be imported (and refuse politely) on a machine without
Triton:

    from pallas_kernels.triton_call import jit, tl, triton_call

    @jit
    def _double(x_ptr, o_ptr, SIZE: tl.constexpr): ...

    triton_call(_double, x, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), grid=(1,), SIZE=x.size)
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import triton_launch, triton_programs
from pallas_kernels.dispatch import UnsupportedCase, lowering_for_gpu, recording
from pallas_kernels.triton_launch import is_array

try:
    import triton
    import triton.language as tl
    from triton import jit
except ImportError:
    triton, tl = None, None

    def jit(function: Callable) -> Callable:
        """Stands in for ``triton.jit`` where Triton is not installed: the kernel can be named but not called."""
        return function


def constant(value: float) -> Any:
    """A number of a module, as its kernels may read it."""
    return value if tl is None else tl.constexpr(value)


LONGEST_AXIS = 65_535  # of a grid, all but the first

INSTALL = "install the extra with GPU support: pip install '.[cuda]' (triton 3.6)"


@dataclasses.dataclass(frozen=True)
class Call:
    """One recorded kernel call: all that decides what the compiler makes of it."""

    kernel: Any
    arguments: tuple[Any, ...]
    outputs: tuple[jax.ShapeDtypeStruct, ...]
    num_warps: int
    num_stages: int
    constexprs: tuple[tuple[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class CompiledKernel:
    """What the compiler made of a kernel call: per thread registers and spilled bytes, per program shared memory."""

    name: str
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    ptx: str


class _Recording:
    """Where calls are noted: another one, as JAX sees it, for every recording."""

    def __init__(self) -> None:
        self.calls: list[Call] = []


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter on the CPU (TRITON_INTERPRET=1 when Triton was imported)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def check_installed(operation: str) -> None:
    """Raises UnsupportedCase, saying what to install, unless ``triton_call`` can launch a kernel."""
    if triton is None:
        raise UnsupportedCase(f"{operation}: implementation='triton' needs triton, which is missing; {INSTALL}")
    if not (interpreting() or recording.value is not None or triton_launch.available()):
        raise UnsupportedCase(
            f"{operation}: implementation='triton' needs JAX's CUDA plugin, which is missing; {INSTALL}"
        )


def triton_call(
    kernel: Any,
    *arguments: Any,
    out_shape: Any,
    grid: Sequence[int],
    num_warps: int = 4,
    num_stages: int = 3,
    input_output_aliases: dict[int, int] | None = None,
    zeroed_outputs: Sequence[int] = (),
    **constexprs: Any,
) -> Any:
    """Launches ``kernel`` on ``grid``; the pointers of the outputs follow those of the arguments.

    Args:
      kernel: a function under ``jit``: first the arguments, then the outputs, then its constexprs.
      *arguments: arrays, and Python numbers passed by value. None stands for an absent optional array: the kernel gets
        some valid pointer that it must not use (guard the use by a constexpr).
      out_shape: a ShapeDtypeStruct, or a sequence of them.
      grid: up to three numbers of programs, each at least 1 and all but the first at most ``LONGEST_AXIS``.
      num_warps, num_stages: as in Triton.
      input_output_aliases: {index among the arguments: index of the output that shares its buffer}.
      zeroed_outputs: indices of the outputs to clear before the launch.
      **constexprs: compile-time values, by name.

    Returns:
      The output, or a tuple of outputs if ``out_shape`` is a sequence. There is no vmap rule: fold into the batch.

    Raises:
      UnsupportedCase: the grid is longer than a GPU has axes for, as may be found out only once vmap has folded rows.
    """
    if max(grid[1:], default=1) > LONGEST_AXIS:
        raise UnsupportedCase(
            f"{kernel.__name__}: {tuple(grid)} programs; all axes but the first have at most {LONGEST_AXIS}: "
            "take fewer rows at a time, or implementation='xla'"
        )
    single = hasattr(out_shape, "shape")
    outputs = tuple(jax.ShapeDtypeStruct(o.shape, o.dtype) for o in ([out_shape] if single else out_shape))
    some_array = next((a for a in arguments if is_array(a)), None)
    # A Python float would arrive as float64 and make every result that it touches float64.
    arguments = tuple(np.float32(a) if isinstance(a, float) else some_array if a is None else a for a in arguments)
    if recording.value is not None:
        recording.value.calls.append(Call(kernel, arguments, outputs, num_warps, num_stages, tuple(constexprs.items())))
        results = tuple(jnp.zeros(o.shape, o.dtype) for o in outputs)
    elif interpreting():
        from pallas_kernels import triton_interpreter  # it needs Triton

        results = triton_interpreter.run(
            kernel, arguments, outputs, tuple(grid), input_output_aliases or {}, zeroed_outputs, constexprs
        )
    else:
        results = tuple(
            triton_launch.launch(
                kernel,
                arguments,
                outputs,
                tuple(constexprs.items()),
                grid=grid,
                num_warps=num_warps,
                num_stages=num_stages,
                input_output_aliases=input_output_aliases or {},
                zeroed_outputs=zeroed_outputs,
            )
        )
    return results[0] if single else tuple(results)


def record_calls(function: Callable, *arguments: Any) -> list[Call]:
    """The kernel calls that ``function(*arguments)`` would make, in order; nothing runs and no GPU is needed.

    ``arguments`` may be ShapeDtypeStructs. Use ``jax.grad`` or ``jax.vjp`` inside ``function`` to see a backward pass.
    """
    record = _Recording()
    with lowering_for_gpu(), recording(record):
        jax.eval_shape(function, *arguments)
    return record.calls


def compile_call(call: Call, capability: int = 90) -> CompiledKernel:
    """Compiles one recorded call for a GPU of ``capability`` (90 is Hopper) with Triton alone: no GPU is needed.

    Raises:
      UnsupportedCase: Triton is not installed.
    """
    if triton is None:
        raise UnsupportedCase(f"compile_call needs triton; {INSTALL}")
    made = triton_programs.program(
        triton_launch.source(
            call.kernel,
            (*call.arguments, *call.outputs),
            call.constexprs,
            call.num_warps,
            call.num_stages,
            capability,
        )
    )
    registers, spilled = _assemble(made.ptx, capability)
    return CompiledKernel(
        name=call.kernel.__name__,
        constexprs=dict(call.constexprs),
        num_warps=call.num_warps,
        num_stages=call.num_stages,
        registers=registers,
        spill_bytes=spilled,
        shared_bytes=made.shared_bytes,
        ptx=made.ptx,
    )


def _assemble(ptx: str, capability: int) -> tuple[int, int]:
    """(registers, bytes spilled) per thread, from the report of the assembler that comes with Triton."""
    target = f"sm_{capability}a" if capability >= 90 else f"sm_{capability}"
    name = "ptxas-blackwell" if capability >= 100 else "ptxas"
    ptxas = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", name)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [ptxas, "-v", f"--gpu-name={target}", file.name, "-o", os.devnull]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = max(int(n) for n in re.findall(r"Used (\d+) registers", report))
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", report))
    return registers, spilled
