"""Other people's kernels, imported only when they are asked for, and how arrays reach them.

None is a dependency of the project: ``pip install lte-jax[bench]`` brings flash-linear-attention, jax-linear-attention
and torch. The authors' repository is named by ``--authors_path`` and is never copied.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.benchmarks.clock import Contender

PEERS = ("fla", "jax_linear_attention", "cudnn", "torch", "flex", "authors")


class PeerMissing(RuntimeError):
    """A peer cannot run here; the message says why and what would help."""


def load(module: str, package: str) -> Any:
    """The module, or PeerMissing with the package to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise PeerMissing(f"{package} is not installed ({error}): pip install 'lte-jax[bench]'") from None
    except RuntimeError as error:  # triton and fla look for a driver when they are imported
        raise PeerMissing(f"{package} does not start here: {str(error).splitlines()[0]}") from None


def torch_on_gpu() -> Any:
    torch = load("torch", "torch")
    if not torch.cuda.is_available():
        raise PeerMissing("torch sees no CUDA GPU: its peers are timed on one only")
    return torch


def cudnn_on_gpu() -> None:
    if jax.default_backend() != "gpu":
        raise PeerMissing("cuDNN needs a CUDA GPU")


def to_torch(*arrays: Any) -> tuple[Any, ...]:
    """The same memory as torch tensors that want gradients where they are not whole numbers."""
    torch = torch_on_gpu()
    tensors = [torch.from_dlpack(jax.block_until_ready(array)) for array in arrays]
    return tuple(x.requires_grad_() if x.is_floating_point() else x for x in tensors)


def to_numpy(tensor: Any) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()


def torch_contender(
    name: str,
    forward: Callable[..., Any],
    inputs: Sequence[Any],
    cotangent: Any | None,
    names: Sequence[str],
    note: str = "",
    axes: tuple[int, ...] | None = None,
) -> Contender:
    """A torch function of tensors; with ``cotangent`` its gradients too.

    Args:
      names: of the output and, with a cotangent, of the inputs' gradients.
      axes: how the results' dimensions are permuted into ours, where the library has another order.
    """
    torch = torch_on_gpu()

    def call() -> list[Any]:
        if cotangent is None:
            with torch.no_grad():
                return [forward(*inputs)]
        output = forward(*inputs)
        return [output, *torch.autograd.grad(output, inputs, cotangent)]

    def values(outputs: list[Any]) -> dict[str, Any]:
        ordered = (x if axes is None or x.ndim != len(axes) else x.permute(*axes) for x in outputs)
        return dict(zip(names, map(to_numpy, ordered), strict=False))

    return Contender(name, call, values, torch=True, note=note)


def jax_contender(
    name: str,
    forward: Callable[..., Any],
    inputs: Sequence[Any],
    cotangent: Any | None,
    names: Sequence[str],
    note: str = "",
) -> Contender:
    """A JAX function of arrays, compiled here; with ``cotangent`` its gradients too."""

    def both(do: Any, *arrays: Any) -> tuple[Any, ...]:
        output, pullback = jax.vjp(forward, *arrays)
        return (output, *pullback(do))

    if cotangent is None:
        compiled = jax.jit(lambda *arrays: (forward(*arrays),)).lower(*inputs).compile()
        call = functools.partial(compiled, *inputs)
    else:
        compiled = jax.jit(both).lower(cotangent, *inputs).compile()
        call = functools.partial(compiled, cotangent, *inputs)

    def values(outputs: Any) -> dict[str, Any]:
        return dict(zip(names, (np.asarray(x, np.float32) for x in outputs), strict=False))

    return Contender(name, call, values, note=note)


def fla_module(name: str) -> Any:
    """A module of flash-linear-attention, on a GPU."""
    torch_on_gpu()
    return load(f"fla.{name}", "flash-linear-attention (fla-core)")


def authors_file(path: str | None, name: str) -> Any:
    """One file of the authors' repository as a module; what it imports of ``fla`` comes from the installed package."""
    if not path:
        raise PeerMissing("the authors' repository is not here: name its folder with --authors_path")
    file = Path(path) / name
    if not file.is_file():
        raise PeerMissing(f"--authors_path={path}: there is no {name} in it")
    fla_module("utils")
    spec = importlib.util.spec_from_file_location("lte_authors_" + file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # torch.compile and Triton look the source up by name
    spec.loader.exec_module(module)
    return module
