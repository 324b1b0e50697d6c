"""Does the optimiser follow its equation, spare what is exempt, and survive gradients that are not finite?"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lte_jax import optim
from lte_jax.optim import OptimizerConfig

CONFIG = OptimizerConfig(learning_rate=0.1, warmup_steps=3, final_fraction=0.1, weight_decay=0.5, clip=2.0)


def params():
    return {
        "mixer": {"q_proj": {"weight": jnp.arange(6.0).reshape(2, 3)}, "A_log": jnp.ones(2), "dt_bias": jnp.ones(2)},
        "norm": {"weight": jnp.ones(3)},
        "router": {"weight": jnp.ones(4), "bias": jnp.ones(1)},
    }


def step_once(config, gradients, state, weights, step, **kwargs):
    return optim.apply(config, gradients, state, weights, step=jnp.int32(step), total_steps=10, **kwargs)


def test_schedule_rises_linearly_and_falls_as_a_cosine_to_its_fraction():
    rate = lambda step: float(optim.learning_rate(CONFIG, jnp.int32(step), 13))  # noqa: E731
    np.testing.assert_allclose(
        [rate(1), rate(3), rate(8), rate(13), rate(20)], [0.1 / 3, 0.1, 0.055, 0.01, 0.01], rtol=1e-6
    )


def test_decay_spares_norms_biases_and_gates():
    mask = optim.decay_mask(params())
    assert mask == {
        "mixer": {"q_proj": {"weight": True}, "A_log": False, "dt_bias": False},
        "norm": {"weight": False},
        "router": {"weight": True, "bias": False},
    }


def test_two_steps_by_hand():
    weights = {"weight": jnp.asarray([1.0, -2.0])}
    state = optim.adamw(CONFIG).init(weights)
    w, m, v = np.array([1.0, -2.0]), np.zeros(2), np.zeros(2)
    for step, gradient in enumerate(([3.0, 4.0], [0.1, -0.2]), start=1):
        weights, state, report = step_once(CONFIG, {"weight": jnp.asarray(gradient)}, state, weights, step)
        g = np.array(gradient)
        np.testing.assert_allclose(report["grad_norm"], np.linalg.norm(g), rtol=1e-6)
        g = g * min(1.0, 2.0 / np.linalg.norm(g))
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        direction = (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.95**step)) + 1e-15) + 0.5 * w
        w = w - 0.1 * step / 3 * direction
        np.testing.assert_allclose(weights["weight"], w, rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    weights = params()
    state = optim.adamw(CONFIG).init(weights)
    good = jax.tree.map(jnp.ones_like, weights)
    weights, state, _ = step_once(CONFIG, good, state, weights, 1)
    broken = {**good, "norm": {"weight": jnp.asarray([1.0, bad, 1.0])}}
    after, state_after, report = step_once(CONFIG, broken, state, weights, 2)
    assert not report["finite"]
    jax.tree.map(np.testing.assert_array_equal, (after, state_after), (weights, state))


def test_a_frozen_router_stays_and_does_not_count_in_the_norm():
    weights = params()
    state = optim.adamw(CONFIG).init(weights)
    gradients = jax.tree.map(jnp.ones_like, weights)
    after, state, report = step_once(CONFIG, gradients, state, weights, 1, freeze_router=jnp.asarray(True))
    jax.tree.map(np.testing.assert_array_equal, after["router"], weights["router"])
    assert np.all(after["norm"]["weight"] != weights["norm"]["weight"])
    np.testing.assert_allclose(report["grad_norm"], np.sqrt(6 + 2 + 2 + 3), rtol=1e-6)
    after, _, _ = step_once(CONFIG, gradients, state, after, 2, freeze_router=jnp.asarray(False))
    assert np.all(after["router"]["weight"] != weights["router"]["weight"])


@pytest.mark.parametrize(
    "settings",
    [{"learning_rate": 0.0}, {"final_fraction": 2.0}, {"betas": (0.9, 1.0)}, {"clip": 0.0}, {"max_skipped": 0}],
)
def test_settings_that_cannot_work_are_refused(settings):
    with pytest.raises(ValueError, match=r"optimizer\."):
        dataclasses.replace(CONFIG, **settings)
