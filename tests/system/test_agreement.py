"""Training on text with kernels follows XLA, and training in bfloat16 follows float32."""

import numpy as np
import pytest

from experiments.benchmarks import agreement

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def found():
    return agreement.compare(steps=200, rows=8, runs=("float32_kernels", "bfloat16"))


def test_the_loss_of_100_steps_with_kernels_in_float32_is_that_of_xla(found):
    """Measured at a rate of 1e-3: 9e-5."""
    kernels, xla = (np.array(found["curves"][name][:100]) for name in ("float32_kernels", "float32"))
    assert np.abs(kernels / xla - 1).max() < 5e-4
    assert found["curves"]["float32"][-1] < 0.6 * found["curves"]["float32"][0]  # it has learnt something


def test_the_loss_of_200_steps_in_bfloat16_lies_within_half_a_percent_of_float32(found):
    assert found["largest"]["bfloat16"] < 0.005
