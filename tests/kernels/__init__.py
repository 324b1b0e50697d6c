"""Tests of the operations on arrays."""

import pytest

from pallas_kernels import triton_call

needs_triton = pytest.mark.skipif(
    triton_call.triton is None, reason="triton is not installed; pip install -e '.[gate]'"
)
