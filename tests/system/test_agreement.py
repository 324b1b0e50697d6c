"""Training in bfloat16 with kernels follows float32 without any."""

import pytest

from experiments.benchmarks import agreement


@pytest.mark.gpu
def test_the_loss_of_200_steps_on_text_lies_within_half_a_percent_of_float32():
    found = agreement.compare(steps=200, rows=8)
    assert found["largest"]["bfloat16"] < 0.005
    assert found["curves"]["float32"][-1] < 0.6 * found["curves"]["float32"][0]  # it has learnt something
