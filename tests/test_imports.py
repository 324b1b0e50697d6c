"""Imports run one way: kernels <- mixers <- model <- train, evaluate, generate <- experiments."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# What each part may import of ours, by prefix; the longest matching part decides.
ALLOWED = {
    "pallas_kernels": ("pallas_kernels",),
    "lte_jax.dims": (),
    "lte_jax.configs": (),
    "lte_jax.layers": ("lte_jax.dims", "lte_jax.remat", "pallas_kernels"),
    "lte_jax.inputs": ("lte_jax.dims",),
    "lte_jax.remat": (),
    "lte_jax.depth": ("lte_jax.remat", "pallas_kernels"),
    "lte_jax.sharding": ("lte_jax.dims", "pallas_kernels"),
    "lte_jax.partition_retained": ("pallas_kernels",),
    "lte_jax.partition_plan": ("lte_jax.sharding", "pallas_kernels"),
    "lte_jax.partition": (
        "lte_jax.dims",
        "lte_jax.partition_retained",
        "lte_jax.sharding",
        "lte_jax.partition_plan",
        "pallas_kernels",
    ),
    "lte_jax.partition_router": ("lte_jax.sharding", "lte_jax.partition_plan", "pallas_kernels"),
    "lte_jax.mixers.lte_router": ("lte_jax.dims", "lte_jax.layers", "lte_jax.partition_router", "pallas_kernels"),
    "lte_jax.mixers": (
        "lte_jax.dims",
        "lte_jax.inputs",
        "lte_jax.layers",
        "lte_jax.remat",
        "lte_jax.partition",
        "lte_jax.partition_plan",
        "lte_jax.mixers",
        "pallas_kernels",
    ),
    "lte_jax.whole_files": (),
    "lte_jax.data": ("lte_jax.dims", "lte_jax.configs", "lte_jax.whole_files", "lte_jax.data"),
}
MODEL = ("lte_jax.dims", "lte_jax.layers", "lte_jax.inputs", "lte_jax.remat", "lte_jax.sharding", "lte_jax.mixers")
MODEL += ("lte_jax.partition", "lte_jax.depth")
ALLOWED["lte_jax.model_config"] = (*MODEL,)
ALLOWED["lte_jax.blocks"] = (*MODEL, "lte_jax.model_config", "pallas_kernels")
ALLOWED["lte_jax.model"] = (*MODEL, "lte_jax.model_config", "lte_jax.blocks")
PROGRAMS = ("lte_jax.train", "lte_jax.evaluate", "lte_jax.generate")
FILES = sorted(path for part in ("pallas_kernels", "lte_jax", "experiments") for path in (ROOT / part).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def under(name: str, prefixes) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_run_downward(path):
    name = module_name(path)
    ours = {target for target in imports(path) if under(target, ("pallas_kernels", "lte_jax", "experiments", "tests"))}
    rules = [part for part in ALLOWED if under(name, (part,))]
    if rules:
        allowed = ALLOWED[max(rules, key=len)]
        wrong = {target for target in ours if not under(target, allowed)}
        assert not wrong, f"{name} imports {sorted(wrong)}; it may import {allowed}"
    if name.startswith("lte_jax"):
        assert not {target for target in ours if under(target, ("experiments", "tests"))}
    if under(name, PROGRAMS):
        others = [program for program in PROGRAMS if not under(name, (program,))]
        assert not {target for target in ours if under(target, others)}, "train, evaluate and generate are siblings"
    if name.startswith("lte_jax.mixers.") and name.split(".")[2] not in ("base",):
        family = name.split(".")[2].split("_router")[0].split("_store")[0]
        mixers = {"full_attention", "window_attention", "gated_deltanet", "lte", "nsa"} - {family}
        assert not {target for target in ours if under(target, {f"lte_jax.mixers.{mixer}" for mixer in mixers})}
    if name.startswith("pallas_kernels"):
        assert not {target for target in imports(path) if under(target, ("flax", "optax", "torch"))}


@pytest.mark.parametrize("path", [*FILES, *sorted((ROOT / "tests").rglob("*.py"))], ids=lambda path: path.stem)
def test_files_and_functions_stay_short(path):
    text = path.read_text()
    assert text.count("\n") <= 400, f"{path} has more than 400 lines: split it by idea"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            # A kernel's body is one pass over its tiles, and each function that it calls may cost registers.
            kernel = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
            limit = 120 if kernel else 80
            assert node.end_lineno - node.lineno < limit, f"{path}: {node.name} has {limit} lines or more"


@pytest.mark.parametrize("package", ["lte_jax", "pallas_kernels"])
def test_a_package_says_what_each_of_its_modules_is_for(package):
    docstring = ast.get_docstring(ast.parse((ROOT / package / "__init__.py").read_text()))
    listed = [name for names in re.findall(r"^  ([a-z_, ]+):", docstring, re.MULTILINE) for name in names.split(", ")]
    modules = [
        path.stem for path in (ROOT / package).iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    ]
    assert sorted([*listed, "__init__"]) == sorted(modules)
