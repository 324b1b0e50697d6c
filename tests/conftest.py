"""Strict settings for every test: float32 dots are float32, promotion is explicit, the CPU shows eight devices."""

import os

# Before jax starts: eight simulated devices, so that meshes are tested everywhere.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_threefry_partitionable", True)


@pytest.fixture(
    params=["xla", pytest.param("triton", marks=pytest.mark.gpu), pytest.param("pallas", marks=pytest.mark.gpu)]
)
def implementation(request):
    """Each implementation of an operation in turn; those for a GPU run under ``pytest -m gpu``."""
    return request.param
