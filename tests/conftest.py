"""Strict settings for every test: float32 dots are float32, promotion is explicit, the CPU shows eight devices."""

import importlib
import os

# Before jax starts: eight simulated devices, so that meshes are tested everywhere.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_threefry_partitionable", True)


def pytest_generate_tests(metafunc):
    """``implementation``: each one of the operation that the file tests; a GPU's run under ``pytest -m gpu``."""
    if "implementation" in metafunc.fixturenames:
        operation = metafunc.module.__name__.rpartition(".test_")[2]
        names = importlib.import_module(f"pallas_kernels.{operation}.api").OPERATION.implementations
        values = [name if name == "xla" else pytest.param(name, marks=pytest.mark.gpu) for name in names[::-1]]
        metafunc.parametrize("implementation", values)
