"""Do block attention's Triton kernels still compile for Hopper, within their registers, on a machine without a GPU?"""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import triton_call
from pallas_kernels.block_attention import block_attention, block_attention_extend, triton_tiles
from pallas_kernels.block_attention import triton as backend
from pallas_kernels.block_attention.api import Case
from pallas_kernels.block_attention.blocks import BlockCache, table_size
from tests.kernels import needs_triton

# Spilled bytes per thread allowed, by head size and block size: what the compiler said of the tiles, rounded up.
SPILLS = {
    ("_pieces_dq_kernel", 64, 64): 16,
    ("_pieces_dq_kernel", 128, 64): 48,
    ("_dq_kernel", 128, 32): 8,
    ("_pieces_kernel", 128, 64): 64,
    ("_sum_kernel", 128, 64): 8,
    ("_means_kernel", 128, 64): 16,
    ("_means_kernel", 128, 32): 160,
}
KERNELS = {"_select_kernel", "_selected_kernel", "_dq_kernel", "_pieces_kernel", "_sum_kernel", "_means_kernel"}
GATHERING = KERNELS - {"_selected_kernel", "_pieces_kernel"} | {"_parts_kernel", "_merge_kernel", "_pieces_dq_kernel"}
STEP = {"_look_kernel", "_choose_kernel", "_selected_kernel", "_join_kernel"}


def _spec(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def _whole(group, N, S, M):
    """The calls of a forward and a backward pass over 4096 tokens."""
    B, T, K = 2, 4096, 2
    H = K * group
    case = Case(B, T, T, H, K, N, N, "bfloat16", S, M, 0.1, False, False)

    def run(q, k, v, do):
        outputs, residuals = backend.forward(case, q, k, v, None)
        return backend.backward(case, q, k, v, None, outputs, residuals, (do, do))

    wide, narrow = _spec(B, T, H, N), _spec(B, T, K, N)
    return triton_call.record_calls(run, wide, narrow, narrow, wide)


def _step(group, N, S, M):
    """The calls of a decode step behind up to 65,535 tokens."""
    B, U, K = 2, 65536, 2
    H, C = K * group, table_size(U, S)
    case = Case(B, 1, U, H, K, N, N, "bfloat16", S, M, 0.1, False, True)
    keys, means = _spec(B, U, K, N), _spec(B, C, K, N)
    cache = BlockCache(keys, keys, means, means, _spec(B, dtype=jnp.int32))

    def run(q, k, v, gates, cache):
        return backend.step(case, q, k, v, gates, cache, None, 512)

    new = _spec(B, 1, K, N)
    return triton_call.record_calls(run, _spec(B, 1, H, N), new, new, _spec(B, 1, H, 3), cache)


@needs_triton
def test_long_rows_of_documents_are_not_refused():
    """131,072 tokens with segment_ids: in one pass, as a prompt's next tokens, and one token at a time."""
    T, K, N, S = 131072, 2, 64, 64
    options = dict(block_size=S, block_counts=16, window=512, implementation="triton")

    def whole(q, k, v, gates, segment_ids):
        return block_attention(q, k, v, gates, segment_ids=segment_ids, **options)

    def more(q, k, v, gates, segment_ids, cache):
        return block_attention_extend(q, k, v, gates, cache, segment_ids=segment_ids, **options)

    def arrays(tokens):
        new = _spec(1, tokens, K, N)
        return _spec(1, tokens, 32, N), new, new, _spec(1, tokens, 32, 3), _spec(1, tokens, dtype=jnp.int32)

    keys, means = _spec(1, T, K, N), _spec(1, table_size(T, S), K, N)
    cache = BlockCache(keys, keys, means, means, _spec(1, dtype=jnp.int32))
    for function, inputs, kernel in (
        (whole, arrays(T), "_select_kernel"),
        (more, (*arrays(4096), cache), "_select_kernel"),
        (more, (*arrays(1), cache), "_look_kernel"),
    ):
        assert kernel in {call.kernel.__name__ for call in triton_call.record_calls(function, *inputs)}


def _exhaustive(*values):
    return pytest.param(*values, marks=pytest.mark.exhaustive)


@needs_triton
@pytest.mark.parametrize(
    ("group", "N", "S", "M"),
    [
        (16, 64, 64, 16),
        _exhaustive(16, 128, 64, 16),
        _exhaustive(8, 64, 64, 16),
        _exhaustive(4, 64, 32, 8),
        _exhaustive(2, 128, 32, 16),
        _exhaustive(1, 64, 64, 16),
        _exhaustive(1, 64, 16, 1),
        _exhaustive(32, 64, 16, 32),
    ],
)
def test_compiles_without_further_spills(group, N, S, M, monkeypatch):
    whole, step = [], _step(group, N, S, M)
    for most, names in ((0, KERNELS), (64, GATHERING)):
        monkeypatch.setattr(triton_tiles, "GATHERED_FORWARD", most)
        monkeypatch.setattr(triton_tiles, "GATHERED_BACKWARD", most)
        whole += _whole(group, N, S, M)
        assert {call.kernel.__name__ for call in whole} >= names
    assert {call.kernel.__name__ for call in whole} == KERNELS | GATHERING
    assert {call.kernel.__name__ for call in step} == STEP
    for kernel in map(triton_call.compile_call, [*whole, *step]):
        if kernel.name not in ("_sum_kernel", "_merge_kernel", "_choose_kernel", "_join_kernel"):
            assert "wgmma" in kernel.ptx or "mma.sync" in kernel.ptx, f"{kernel.name} does not use the tensor cores"
        assert kernel.shared_bytes <= 227 * 1024
        allowed = SPILLS.get((kernel.name, N, S), 0)
        assert kernel.spill_bytes <= allowed, (
            f"{kernel.name} at {group} heads, head size {N}, blocks of {S} spills {kernel.spill_bytes} bytes per "
            f"thread ({kernel.registers} registers); {allowed} are allowed"
        )
