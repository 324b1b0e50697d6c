"""Do the formulas of speed and cost count what a compiled step does?"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.configs import _paper
from experiments.launch import cost
from lte_jax import FullAttention, GatedDeltaNet, ModelConfig, metrics
from lte_jax.optim import OptimizerConfig
from lte_jax.retention import PenaltyConfig
from lte_jax.sharding import MeshConfig, make_mesh
from lte_jax.step import Builder, ComputeConfig, StepConfig
from tests.system.mesh_cases import MIXERS, config_of, loss_and_gradients

ROWS, LENGTH, WIDTH = 2, 64, 128


def counted(pattern):
    """(flops of the formula, of XLA's own count) for one step's gradients, one layer of each mixer."""
    model = ModelConfig(
        vocab_size=512, width=WIDTH, num_layers=len(pattern), pattern=pattern, max_length=LENGTH, intermediate_size=256
    )
    step = StepConfig(model, OptimizerConfig(), PenaltyConfig(), ComputeConfig(), 1, 1, 0, LENGTH)
    builder = Builder(step, make_mesh(MeshConfig(), jax.devices()[:1]))
    batch = {name: jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32) for name in ("input_ids", "labels")}
    compute = jax.jit(lambda state, batch: builder._gradients(state, batch, jnp.int32(1), None))
    parameters = sum(int(np.prod(leaf.shape)) for leaf in builder.param_shapes.values())
    formula = metrics.flops_per_token(model, parameters, LENGTH) * ROWS * LENGTH
    return formula, compute.lower(builder.abstract_state(), batch).cost_analysis()["flops"]


def test_the_flops_of_mfu_are_those_that_xla_counts():
    """Where the form that runs computes just what the formula counts: it does not skip the masked half of q k."""
    formula, xla = counted((FullAttention(num_heads=4),))
    masked = 3 * 4 * WIDTH * (LENGTH - (LENGTH + 1) / 2) * ROWS * LENGTH
    # XLA also counts norms, activations and softmax, one flop an element.
    assert formula + masked <= xla <= 1.04 * (formula + masked)
    # The chunked form of the delta rule does more products than the recurrence that the formula counts.
    formula, xla = counted((GatedDeltaNet(num_heads=2, head_dim=32),))
    assert formula < xla < 1.6 * formula


def all_reduced(text):
    """Bytes of the arrays that a compiled program sums over devices."""
    total = 0
    for line in text.splitlines():
        match = re.search(r"= (.*?) all-reduce(?:-start)?\(", line)
        for shape in re.findall(r"f32\[([\d,]*)\]", match[1]) if match else ():
            total += 4 * int(np.prod([int(size) for size in shape.split(",") if size]))
    return total


def test_gradients_are_summed_once_over_the_data_axis():
    config = config_of(MIXERS["full"])
    _, state, text = loss_and_gradients(config, MeshConfig(data=8), None)
    weights = sum(leaf.size for leaf in state.params.values())
    # A ring sums x bytes by sending 2 (n-1)/n x from each device.
    sent = 2 * 7 / 8 * all_reduced(text)
    assert sent == pytest.approx(
        cost.axis_bytes("data", 8, config.model, weights, 0), rel=0.02
    )  # besides, counts and losses


def test_costs_follow_from_the_measured_speed():
    weights, model = cost.parameters("lalte", "1.4B"), _paper.model("lalte", "1.4B")
    rate, measured = cost.speed("lalte", "1.4B", weights)
    assert measured and 1.3e9 < weights < 1.4e9
    one, eight, many = (cost.cost(weights, model, rate, gpus, 4) for gpus in (1, 8, 64))
    assert [found.parts for found in (one, eight, many)] == [64, 8, 1]
    assert one.traffic == 0 and one.tokens_per_second == pytest.approx(rate)
    assert one.days == pytest.approx(30720 * 256 * 4096 / cost.MEASURED["lalte", "1.4B"].tokens_per_second / 86400)
    # The faster a GPU computes, the more of a step is traffic.
    for found in (eight, many):
        assert found.traffic > 0
        assert found.days / one.days == pytest.approx(1 / found.gpus + found.traffic / one.compute)
    assert 7 < one.days / eight.days < 8 and 32 < one.days / many.days < 64
    assert not cost.speed("nsa", "1.4B", cost.parameters("nsa", "1.4B"))[1]


def test_the_page_is_the_programs():
    from pathlib import Path

    page = Path(cost.__file__).parents[1] / "results" / "launching.md"
    assert page.read_text() == cost.page(), "write it again: python -m experiments.launch.cost"
