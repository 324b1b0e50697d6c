"""What does Triton make of a kernel, and where is that kept? PTX by Triton alone, on disk beside XLA's programs.

Where JAX keeps its compiled programs in a local folder (``jax_compilation_cache_dir``), PTX is kept in ``triton`` below
it. A kernel found there is neither traced nor compiled: its file is named by all that Triton's output depends on. Many
processes may share the folder: a file appears whole or not at all. One that is damaged is reported, compiled anew and
replaced.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import uuid
from pathlib import Path
from typing import Any

import jax

try:
    import triton
except ImportError:
    triton = None

logger = logging.getLogger(__name__)

FOLDER = "triton"
"""Below JAX's folder of compiled programs."""

ALIGNMENT = 16
"""Bytes to which every array is aligned, as Triton is told."""

MAX_TENSOR_MEMORY = 512
"""Columns. Beyond it Triton emits a trap, on which a GPU hangs."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A kernel and all that decides what Triton makes of it."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    """(argument, Triton's name of its type) in the kernel's order; "constexpr" for the constants."""
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    """Indices of the arguments that are pointers, aligned to ``ALIGNMENT``."""
    num_warps: int
    num_stages: int
    capability: int
    """Of the GPU: 90 is Hopper."""


@dataclasses.dataclass(frozen=True)
class Program:
    """The PTX of a kernel."""

    name: str
    """Of its entry."""
    shared_bytes: int
    ptx: str


_programs: dict[str, Program] = {}


def program(source: Source) -> Program:
    """The program of ``source``: of this process, else from the disk, else compiled and kept there.

    Raises:
      ValueError: the kernel asks for what is not launched here.
    """
    name = key(source)
    if name not in _programs:
        folder = disk()
        path = None if folder is None else folder / f"{name}.json"
        found = None if path is None else _read(path)
        if found is None:
            found = translate(source)
            if path is not None:
                _write(path, found)
        _programs[name] = found
    return _programs[name]


def disk() -> Path | None:
    """The folder of kept programs; None where JAX keeps none in a local folder."""
    folder = jax.config.jax_compilation_cache_dir
    if not folder or not jax.config.jax_enable_compilation_cache or "://" in folder:
        return None
    return Path(folder).expanduser() / FOLDER


def key(source: Source) -> str:
    """A name for what Triton would make of ``source``: equal only if all that this depends on is equal."""
    from triton._C.libtriton import get_cache_invalidating_env_vars

    backend, options = _backend(source)
    parts = {
        "triton": triton.__version__,
        "environment": get_cache_invalidating_env_vars(),
        "assembler": backend.hash(),  # its version sets the version of the PTX
        "options": options.hash(),
        "kernel": source.kernel.cache_key,  # its source, of the functions it calls, and the globals they read
        "signature": source.signature,
        "constants": [(name, getattr(value, "cache_key", repr(value))) for name, value in source.constants],
        "aligned": source.aligned,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def translate(source: Source) -> Program:
    """Runs Triton's passes up to PTX; no GPU is needed."""
    from triton._C.libtriton import ir
    from triton.compiler import ASTSource

    backend, options = _backend(source)
    tree = ASTSource(
        source.kernel,
        signature=dict(source.signature),
        constexprs=dict(source.constants),
        attrs={(index,): [["tt.divisibility", ALIGNMENT]] for index in source.aligned},
    )
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options, tree.language)
    made = tree.make_ir(
        backend.target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context
    )
    metadata: dict[str, Any] = {}
    for name in ("ttir", "ttgir", "llir", "ptx"):
        made = stages[name](made, metadata)
    if metadata["tmem_size"] > MAX_TENSOR_MEMORY:
        raise ValueError(
            f"{metadata['name']}: {metadata['tmem_size']} columns of tensor memory, more than {MAX_TENSOR_MEMORY}"
        )
    if metadata["global_scratch_size"]:
        raise ValueError(f"{metadata['name']} needs scratch in global memory, which is not launched here")
    return Program(metadata["name"], metadata["shared"], made)


def _backend(source: Source) -> tuple[Any, Any]:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    backend = make_backend(GPUTarget("cuda", source.capability, 32))
    return backend, backend.parse_options({"num_warps": source.num_warps, "num_stages": source.num_stages})


def _checksum(entry: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps([entry["name"], entry["shared_bytes"], entry["ptx"]]).encode()).hexdigest()


def _read(path: Path) -> Program | None:
    try:
        entry = json.loads(path.read_bytes())
        if entry["checksum"] != _checksum(entry):
            raise ValueError("its checksum is another")
        return Program(entry["name"], entry["shared_bytes"], entry["ptx"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("compiling a Triton kernel again: %s cannot be used (%s)", path, error)
        return None


def _write(path: Path, program: Program) -> None:
    entry = dataclasses.asdict(program)
    entry["checksum"] = _checksum(entry)
    # Not one of tempfile's, which its user alone may read: all who share the folder would compile and write in turn.
    part = path.with_name(f"{path.stem[:8]}{uuid.uuid4().hex}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(part, "x") as file:
                json.dump(entry, file)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("a Triton kernel is not kept: %s cannot be written (%s)", path, error)
