"""The Hopper kernels of the gated delta rule without a GPU: in Pallas's interpreter, and lowered for one.

The interpreter multiplies, copies and waits as the kernels say, and reports races; what only the hardware decides (the
compiled products and barriers) is seen by the GPU tests of ``test_gated_delta_rule``.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from pallas_kernels.dispatch import UnsupportedCase
from pallas_kernels.gated_delta_rule import pallas
from pallas_kernels.gated_delta_rule.api import Case, count_resets
from pallas_kernels.gated_delta_rule.pallas_tiles import interpreted
from tests.kernels.gated_delta_truth import NAMES, truth
from tests.kernels.test_gated_delta_rule import make_inputs
from tests.tolerances import assert_close

SMALL = dict(batch=1, kv_heads=1, heads=1, size=64, value_size=64, dtype="bfloat16")
GROUPED = dict(batch=1, kv_heads=1, heads=2, size=64, value_size=128, dtype="bfloat16")
WIDE = dict(batch=1, kv_heads=1, heads=1, size=128, value_size=128, dtype="bfloat16")
WIDEST = dict(batch=1, kv_heads=1, heads=1, size=256, value_size=256, dtype="bfloat16")


def forward_and_backward(inputs, cotangents, segment_ids, normalize=True):
    """As ``api`` calls the backend, without its choice of one."""
    q, k, v, g, beta, state = inputs
    runs = None
    if segment_ids is not None:
        live = (segment_ids != 0)[:, :, None]
        g, beta = jnp.where(live, g, 0.0), jnp.where(live, beta, 0.0)
        runs = count_resets(segment_ids)
    arrays, options = (q, k, v, g, beta, runs, state), {"scale": q.shape[-1] ** -0.5, "normalize": normalize}
    o, final_state, _, residuals = pallas.forward(*arrays, **options, return_updates=False)
    return o, final_state, *pallas.backward(*arrays, residuals, *cotangents, **options)


def compare(inputs, cotangents, capfd, segment_ids=None, **options):
    with interpreted(plgpu.InterpretGPUParams(detect_races=True)):
        run = jax.jit(functools.partial(forward_and_backward, **options))
        actual = jax.block_until_ready(run(inputs, cotangents, segment_ids))
    assert "RACE DETECTED" not in capfd.readouterr().out
    expected = truth(*inputs, segment_ids, *cotangents, **options)
    for name, value in zip(NAMES, actual, strict=True):
        assert_close(value, expected[name], "gated_delta_rule_gpu", str(inputs[0].dtype))


def test_interpreted(capfd):
    """Two chunks, the second cut short.

    In one head of 70 tokens the error of dg depends much on the draw: it is that of one inner product of the state with
    its gradient, both rounded to bfloat16. This draw has a typical one.
    """
    compare(*make_inputs(70, **SMALL, seed=1), capfd)


@pytest.mark.exhaustive
@pytest.mark.parametrize("sizes", [GROUPED, WIDE, WIDEST], ids=["grouped", "wide", "widest"])
def test_interpreted_documents(sizes, capfd):
    segment_ids = jnp.asarray([[3] * 60 + [0] * 2 + [1] * 3 + [2] * 95], jnp.int32)
    inputs, cotangents = make_inputs(160, decays=(0.0, 0.1, 20.0), **sizes)
    padding = (segment_ids == 0)[:, :, None, None]
    cotangents = (jnp.where(padding, jnp.zeros_like(cotangents[0]), cotangents[0]), cotangents[1])
    with_zeros = (*inputs[:2], jnp.where(padding, jnp.zeros_like(inputs[2]), inputs[2]), *inputs[3:])
    with interpreted():
        o, *rest = jax.jit(forward_and_backward)(with_zeros, cotangents, segment_ids)
    expected = truth(*with_zeros, segment_ids, *cotangents)
    o = jnp.where(padding, jnp.zeros_like(o), o)
    for name, value in zip(NAMES, (o, *rest), strict=True):
        if name in ("dg", "dbeta"):  # the choice of g and beta at padding is undone by autodiff outside the backend
            value = jnp.where(padding[..., 0], 0.0, value)
        assert_close(value, expected[name], "gated_delta_rule_gpu", "bfloat16")


@pytest.mark.exhaustive
def test_interpreted_raw_keys(capfd):
    (q, k, *rest), cotangents = make_inputs(65, **SMALL)
    compare((q, k * 0.2, *rest), cotangents, capfd, normalize=False)


def test_interpreted_step():
    (q, k, v, g, beta, state), _ = make_inputs(1, **GROUPED)
    with interpreted():
        o, after, update = jax.jit(
            functools.partial(pallas.step, scale=0.125, normalize=True, return_update=True)
        )(*(x[:, 0] for x in (q, k, v, g, beta)), state)  # fmt: skip
    expected = truth(q, k, v, g, beta, state)
    assert_close(o, expected["o"][:, 0], "gated_delta_rule_gpu", "bfloat16")
    assert_close(after, expected["final_state"], "gated_delta_rule_gpu", "bfloat16")
    assert_close(update, expected["updates"][:, 0], "gated_delta_rule_gpu", "bfloat16")


@pytest.mark.rotating
@pytest.mark.parametrize("size", [64, 128, 256])
def test_lowers_for_hopper(size):
    """Layouts, barriers and shared memory are accepted for an H200; its assembler is not asked."""
    inputs, cotangents = make_inputs(256, **{**WIDE, "size": size, "value_size": size})
    device = AbstractDevice(device_kind="NVIDIA H200", platform="gpu", num_cores=132)
    run = jax.jit(functools.partial(forward_and_backward, segment_ids=None))
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        text = run.trace(inputs, cotangents).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == 4


GOOD = Case(
    batch=2, tokens=300, key_heads=2, heads=4, head_size=128, value_size=256, dtype="bfloat16", packed=True,
    initial_state=True, normalize=True, return_updates=False, step=False,
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float32"}, "dtype='float32'"),
        ({"head_size": 96, "value_size": 96}, "key head size=96"),
        ({"value_size": 64}, "value head size=64"),
        ({"batch": 70000}, "70000 rows"),
    ],
)
def test_unsupported_cases(changes, message):
    pallas.check(GOOD)
    with pytest.raises(UnsupportedCase, match=message):
        pallas.check(GOOD.__class__(**{**vars(GOOD), **changes}))
