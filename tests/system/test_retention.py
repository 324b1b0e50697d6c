"""Does the penalty's controller follow the authors' traces, its own schedule, and the rule for packed documents?"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from lte_jax import retention
from lte_jax.retention import PenaltyConfig

TRACES = Path(__file__).parent.parent / "data" / "reference" / "lambda_controller.safetensors"
BUDGET, LENGTH = 512, 2048.0


def run(config, fractions, *, budget=BUDGET, positions=LENGTH, kept=0.0, finite=None):
    """(weights [steps,R,K], kept [steps,R,K]) for a sequence of kept fractions [steps,R,K]."""
    state = retention.init_state(*fractions.shape[1:], length=0)
    state = state._replace(kept=jnp.full_like(state.kept, kept))
    finite = jnp.ones(len(fractions), bool) if finite is None else jnp.asarray(finite)

    def step(state, inputs):
        fraction, ok = inputs
        state = retention.update(state, config, budget, fraction, jnp.float32(positions), ok)
        return state, (state.weights, state.kept)

    return jax.tree.map(np.asarray, jax.lax.scan(step, state, (jnp.asarray(fractions), finite))[1])


@pytest.mark.parametrize("shared", ["head", "layer", "all"])
def test_controller_follows_the_reference_traces(shared):
    arrays = load_file(TRACES)
    config = PenaltyConfig(shared=shared, initial=1e-3, minimum=1e-4, maximum=0.02)
    weights, kept = run(config, arrays[f"{shared}.sparsity"])
    expected = arrays[f"{shared}.lambda"]
    expected = expected.reshape(expected.shape + (1,) * (3 - expected.ndim))
    np.testing.assert_allclose(weights, np.broadcast_to(expected, weights.shape), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(kept, arrays[f"{shared}.kept"], rtol=1e-6, atol=1e-3)


def test_first_update_gives_the_starting_value_where_too_much_is_kept():
    # Budget 10, period 4, so a = 2/3. Of 20 positions head 0 keeps all, head 1 none, head 2 ten.
    config = PenaltyConfig(period=4, initial=1e-3, minimum=1e-5, maximum=1.0, tolerance=(0.9, 1.1))
    fractions = np.tile(np.float32([[1.0, 0.0, 0.5]]), (12, 1, 1))
    weights, kept = run(config, fractions, budget=10, positions=20.0, kept=20.0)
    np.testing.assert_allclose(kept[0, 0], [20.0, 20 / 3, 40 / 3], rtol=1e-6)
    assert (weights[:3] == 0).all(), "no penalty before the first update"
    np.testing.assert_allclose(weights[3, 0], [1e-3, 0.0, 1e-3], rtol=1e-6)
    # Second update: head 0 still too big (x 1.5), head 1 too small (stays 0), head 2 is at 10 = M: the dead band.
    np.testing.assert_allclose(weights[7, 0], [1.5e-3, 0.0, 1e-3], rtol=1e-6)
    np.testing.assert_allclose(weights[11, 0], [2.25e-3, 0.0, 1e-3], rtol=1e-6)


def test_falling_below_the_minimum_gives_zero_and_comes_back_at_the_minimum():
    config = PenaltyConfig(period=2, initial=4e-5, minimum=2e-5, maximum=5e-5)
    # The first update sees everything kept; then nothing, then everything again. Period 2: a = 1.
    fractions = np.repeat(np.float32([1, 0, 0, 1, 1, 1, 1]), 2).reshape(-1, 1, 1)
    weights, _ = run(config, fractions, budget=10, positions=20.0, kept=20.0)
    np.testing.assert_allclose(weights[1::2, 0, 0], [4e-5, 2e-5, 0, 2e-5, 3e-5, 4.5e-5, 5e-5], rtol=1e-6)


def test_no_penalty_before_the_initial_steps_and_the_first_update_comes_after_them():
    config = PenaltyConfig(period=4, initial=1e-3, minimum=1e-5, initial_steps=8)
    weights, _ = run(config, np.ones((12, 1, 1), np.float32), budget=10, positions=20.0, kept=20.0)
    assert (weights[:11] == 0).all()
    np.testing.assert_allclose(weights[11], 1e-3, rtol=1e-6)


def test_a_step_that_is_not_finite_leaves_kept_alone():
    config = PenaltyConfig(period=4)
    fractions = np.full((3, 1, 1), 0.5, np.float32)
    fractions[1] = np.nan
    _, kept = run(config, fractions, budget=10, positions=20.0, kept=20.0, finite=[True, False, True])
    assert np.isfinite(kept).all()
    assert kept[1] == kept[0] and kept[2] != kept[1]


def test_scored_positions_drop_the_reach_of_every_document_and_all_padding():
    segments = jnp.asarray([[1, 1, 1, 1, 2, 2, 3, 3, 3, 0, 0], [0, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7]], jnp.int32)
    expected = [[1, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0]]
    np.testing.assert_array_equal(retention.scored_positions((2, 11), segments, 2), np.array(expected, bool))
    np.testing.assert_array_equal(
        retention.scored_positions((1, 5), None, 2), retention.scored_positions((1, 5), jnp.ones((1, 5), jnp.int32), 2)
    )
    assert not np.any(retention.scored_positions((2, 11), segments, 20)), "no token has that much right context"


def test_penalty_is_the_mean_over_scored_positions_layers_and_heads():
    rng = np.random.default_rng(0)
    scores, weights = rng.normal(size=(3, 2, 7, 5)).astype(np.float32), rng.random((3, 5)).astype(np.float32)
    valid = rng.random((2, 7)) < 0.6
    expected = np.mean([weights * np.maximum(scores[:, b, t], 0) for b, t in zip(*np.nonzero(valid), strict=True)])
    np.testing.assert_allclose(retention.penalty(scores, weights, jnp.asarray(valid)), expected, rtol=1e-6)
    counts = retention.selected_counts(scores, jnp.asarray(valid))
    np.testing.assert_array_equal(counts, (scores > 0)[:, valid].sum(axis=1))


@pytest.mark.parametrize(
    "settings", [{"period": 1}, {"minimum": 0.0}, {"initial": 2.0}, {"raise_factor": 0.5}, {"tolerance": (1.0, 0.9)}]
)
def test_schedules_that_cannot_work_are_refused(settings):
    with pytest.raises(ValueError, match=r"penalty"):
        PenaltyConfig(**settings)
