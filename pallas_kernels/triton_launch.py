"""How does a kernel become an instruction of JAX's program? The primitive behind ``triton_call`` and its lowering.

The instruction is jaxlib's own launcher of Triton kernels. PTX is made at lowering (``triton_programs``); XLA assembles
it when it compiles the program around it, and keeps the result with that program.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.extend as jex
import numpy as np
from jax.interpreters import mlir, xla

from pallas_kernels import tiles, triton_programs
from pallas_kernels.dispatch import UnsupportedCase

TARGET = "triton_kernel_call_ffi"
"""jaxlib's name of the launcher."""

# Triton's names of jax's types.
TYPES = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "fp32",
    "float64": "fp64",
    "int64": "i64",
    "int32": "i32",
    "int16": "i16",
    "int8": "i8",
    "uint32": "u32",
    "uint8": "u8",
    "bool": "i1",
}


def available() -> bool:
    """Whether JAX came with the launcher."""
    from jaxlib import gpu_triton

    return hasattr(gpu_triton, "TritonKernel")


launch_p = jex.core.Primitive("triton_kernel_call")
launch_p.multiple_results = True
launch_p.def_impl(functools.partial(xla.apply_primitive, launch_p))


@launch_p.def_abstract_eval
def _outputs(*_: Any, outputs: Sequence[jax.ShapeDtypeStruct], **__: Any) -> list[jax.core.ShapedArray]:
    return [jax.core.ShapedArray(out.shape, out.dtype) for out in outputs]


def is_array(value: Any) -> bool:
    """Whether a kernel gets a pointer for this argument, and not its value."""
    return hasattr(value, "shape") and not isinstance(value, np.generic)


def source(
    kernel: Any,
    arguments: Sequence[Any],
    constexprs: Sequence[tuple[str, Any]],
    num_warps: int,
    num_stages: int,
    capability: int,
) -> triton_programs.Source:
    """What Triton compiles for these arguments, outputs last: pointers are aligned, and a 1 becomes a constant."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    aligned = []
    for index, (name, argument) in enumerate(zip(kernel.arg_names, arguments, strict=False)):
        if is_array(argument):
            signature[name] = "*" + TYPES[str(np.dtype(argument.dtype))]
            aligned.append(index)
        elif argument == 1:
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = _scalar_type(argument)
    constants |= dict(sorted(constexprs))
    signature |= dict.fromkeys(constants, "constexpr")
    return triton_programs.Source(
        kernel, tuple(signature.items()), tuple(constants.items()), tuple(aligned), num_warps, num_stages, capability
    )


def _scalar_type(value: int | float | np.generic) -> str:
    if isinstance(value, np.float32):
        return "fp32"
    if isinstance(value, bool) or not isinstance(value, int) or not -(2**31) <= value < 2**31:
        raise TypeError(f"{value!r} cannot be passed by value: 32-bit integers and numpy.float32 can")
    return "i32"


def launch(
    kernel: Any,
    arguments: Sequence[Any],
    outputs: Sequence[jax.ShapeDtypeStruct],
    constexprs: Sequence[tuple[str, Any]],
    *,
    grid: Sequence[int],
    num_warps: int,
    num_stages: int,
    input_output_aliases: dict[int, int],
    zeroed_outputs: Sequence[int],
) -> list[jax.Array]:
    """The outputs of ``kernel``; the arguments are those of ``triton_call``."""
    arrays = [argument for argument in arguments if is_array(argument)]
    scalars = tuple((index, argument) for index, argument in enumerate(arguments) if not is_array(argument))
    places = [index for index, argument in enumerate(arguments) if is_array(argument)]
    return launch_p.bind(
        *arrays,
        kernel=kernel,
        scalars=scalars,
        outputs=tuple(outputs),
        constexprs=tuple(constexprs),
        grid=(*grid, 1, 1)[:3],
        num_warps=num_warps,
        num_stages=num_stages,
        aliases=tuple((places.index(index), output) for index, output in input_output_aliases.items()),
        zeroed=tuple(zeroed_outputs),
    )


def _lower(
    context: mlir.LoweringRuleContext,
    *operands: Any,
    kernel: Any,
    scalars: tuple[tuple[int, Any], ...],
    outputs: tuple[jax.ShapeDtypeStruct, ...],
    constexprs: tuple[tuple[str, Any], ...],
    grid: tuple[int, int, int],
    num_warps: int,
    num_stages: int,
    aliases: tuple[tuple[int, int], ...],
    zeroed: tuple[int, ...],
) -> Any:
    from jaxlib import gpu_triton

    arguments: list[Any] = list(context.avals_in)
    for index, value in scalars:
        arguments.insert(index, value)
    first_output = len(arguments)
    arguments += outputs
    capability = tiles.capability()
    made = triton_programs.program(source(kernel, arguments, constexprs, num_warps, num_stages, capability))
    parameters = []
    for index, argument in enumerate(arguments):
        if is_array(argument):
            output = index - first_output
            clear = math.prod(outputs[output].shape) * outputs[output].dtype.itemsize if output in zeroed else 0
            parameters.append(gpu_triton.create_array_parameter(clear, triton_programs.ALIGNMENT))
        elif argument != 1:
            plain = argument.item() if isinstance(argument, np.generic) else argument
            parameters.append(gpu_triton.create_scalar_parameter(plain, _scalar_type(argument)))
    # The launcher would only carry Triton's own form of the kernel along.
    compiled = gpu_triton.TritonKernel(made.name, num_warps, 1, made.shared_bytes, made.ptx, "", capability)
    call = gpu_triton.TritonKernelCall(compiled, *grid, parameters)
    rule = jax.ffi.ffi_lowering(
        TARGET,
        backend_config={"opaque": mlir.ir_attribute(zlib.compress(call.to_proto(kernel.__name__, b"")))},
        operand_output_aliases=dict(aliases),
    )
    return rule(context, *operands)


def _refuse(context: mlir.LoweringRuleContext, *_: Any, kernel: Any, **__: Any) -> Any:
    raise UnsupportedCase(
        f"{kernel.__name__}: chosen for a GPU, but its arrays lie on {'/'.join(context.module_context.platforms)}: "
        "name implementation='xla', or choose the device by jax.default_device"
    )


mlir.register_lowering(launch_p, _refuse)
mlir.register_lowering(launch_p, _lower, platform="cuda")
