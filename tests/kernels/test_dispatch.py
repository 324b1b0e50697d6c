"""Which implementation is chosen where, and does a program that was traced for another place stay there?"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch, triton_call, triton_launch
from pallas_kernels.dispatch import UnsupportedCase, lowering_for_gpu
from pallas_kernels.rms_norm import rms_norm
from tests.kernels import needs_triton

X = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)


def norm(implementation=None):
    """A program of its own at every call, compiled once."""
    return jax.jit(lambda x: rms_norm(x, jnp.ones(64), eps=1e-6, implementation=implementation))


@needs_triton
@pytest.mark.parametrize("recorded_first", [True, False])
def test_a_recorded_program_is_not_the_one_that_runs(recorded_first):
    """A recording gives zeros; a compiled function keeps what was traced of it."""
    run, expected = norm(), norm("xla")(X)
    if not recorded_first:
        np.testing.assert_array_equal(run(X), expected)
    for _ in range(2):
        assert [call.kernel.__name__ for call in triton_call.record_calls(run, X)] == ["_forward"]
        np.testing.assert_array_equal(run(X), expected)


def test_a_program_lowered_for_a_gpu_is_not_the_one_that_runs():
    run = norm("xla")
    seen = []
    traced = jax.jit(lambda x: (seen.append(dispatch.on_gpu()), run(x))[1])
    for inside in (False, True, False):
        if inside:
            with lowering_for_gpu():
                traced.lower(X)
        else:
            traced(X)
    assert seen == [False, True]


@pytest.mark.parametrize("device", ["cpu", jax.devices("cpu")[0]], ids=["name", "device"])
def test_another_default_device_than_the_gpu(monkeypatch, device):
    """On a machine with a GPU, a program for the CPU gets no kernel."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert dispatch.on_gpu()
    with jax.default_device(device):
        assert dispatch.platform() == "cpu" and not dispatch.on_gpu()
        np.testing.assert_array_equal(norm()(X), norm("xla")(X))
        with pytest.raises(UnsupportedCase, match="implementation='triton' needs a CUDA GPU, and JAX runs on 'cpu'"):
            norm("triton")(X)


@needs_triton
def test_arrays_on_another_device_than_the_kernel_was_chosen_for(monkeypatch):
    """Beside a GPU, an array may have been put on the CPU."""
    monkeypatch.setattr(triton_launch, "available", lambda: True)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(UnsupportedCase, match="_forward: chosen for a GPU, but its arrays lie on cpu"):
        norm()(jax.device_put(X, jax.devices("cpu")[0]))


@pytest.mark.parametrize("name", ["cuda", "XLA", 1, np.ones(2), ("triton", "xla")], ids=str)
def test_an_unknown_implementation_is_named(name):
    with pytest.raises(UnsupportedCase, match="is not one of pallas, triton, xla; None picks the fastest"):
        rms_norm(X, jnp.ones(64), eps=1e-6, implementation=name)
