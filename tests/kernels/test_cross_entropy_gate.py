"""Does the Triton kernel of cross-entropy compile for Hopper without a GPU, in its registers, with wide loads?"""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import triton_call
from pallas_kernels.cross_entropy import triton as backend
from tests.kernels import needs_triton


@needs_triton
@pytest.mark.parametrize("vocabulary", [32000, 259])
def test_it_compiles_without_spills(vocabulary):
    logits = jax.ShapeDtypeStruct((64, vocabulary), jnp.float32)
    labels = jax.ShapeDtypeStruct((64,), jnp.int32)
    (call,) = triton_call.record_calls(functools.partial(backend.forward, dtype=jnp.bfloat16), logits, labels)
    compiled = triton_call.compile_call(call)
    assert compiled.spill_bytes == 0
    assert ("ld.global.v4" in compiled.ptx) == (vocabulary % 4 == 0)  # rows that begin at 16 bytes
