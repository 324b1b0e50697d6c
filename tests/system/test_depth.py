"""Written out, the depth computes what the scan computes, and the rule says where it is."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lte_jax import GatedDeltaNet, LanguageModel, ModelConfig
from lte_jax.depth import through, unstacked
from lte_jax.losses import training_loss
from lte_jax.mixers.lte import Config as LTE
from pallas_kernels.dispatch import lowering_for_gpu
from tests.tolerances import rms_error

CONFIG = ModelConfig(
    vocab_size=40,
    width=16,
    num_layers=4,
    pattern=(GatedDeltaNet(num_heads=2, head_dim=8), LTE(num_heads=2, window=13, budget=6, sinks=2, dropout=0.2)),
    init_std=0.2,
)


@functools.cache
def loss_and_gradients(layers: str, remat: str):
    model = LanguageModel(CONFIG, rngs=nnx.Rngs(0), layers=layers, remat=remat)
    graph, state = nnx.split(model)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 40, (2, 33)), jnp.int32)

    @functools.partial(jax.value_and_grad, has_aux=True)
    def compute(state):
        weights = jnp.arange(4, dtype=jnp.float32).reshape(2, 2) / 10
        return training_loss(nnx.merge(graph, state), ids, weights, key=jax.random.key(3))

    return jax.jit(compute)(state)


@pytest.mark.rotating
@pytest.mark.parametrize("remat", ["none", "operands"])
def test_written_out_equals_the_scan(remat):
    (loss, numbers), gradients = loss_and_gradients("unroll", remat)
    (expected_loss, expected_numbers), expected = loss_and_gradients("scan", "none")
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    np.testing.assert_array_equal(numbers["selected"], expected_numbers["selected"])  # layer by layer
    for ours, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        assert rms_error(ours, theirs) < 1e-5


def test_the_rule_writes_out_in_training_on_a_gpu_alone():
    graph, state = nnx.split(nnx.eval_shape(lambda: LanguageModel(CONFIG, rngs=nnx.Rngs(0), implementation="xla")))
    ids = jax.ShapeDtypeStruct((1, 32), jnp.int32)

    def scans(reading: str) -> int:
        def hidden(state, ids):
            return nnx.merge(graph, state).hidden(ids, reading=reading)[0]

        jaxpr = jax.make_jaxpr(hidden)(state, ids)
        return sum(eqn.primitive.name == "scan" for eqn in jaxpr.eqns)

    assert scans("train") == scans("prompt") == 1
    with lowering_for_gpu():
        assert scans("train") == 0 and scans("prompt") == 1


def test_what_is_written_out_is_still_computed_again():
    def step(x, weight):
        return jnp.tanh(jnp.tanh(x @ weight)), None

    def repeated(remat):
        def loss(weights):
            return jnp.sum(through(step, jnp.ones((8, 8)), weights, layers="unroll", remat=remat)[0])

        jaxpr = jax.make_jaxpr(jax.grad(loss))(jnp.ones((3, 8, 8)))
        return [eqn.params for eqn in jaxpr.eqns if "prevent_cse" in eqn.params]

    assert repeated("none") == []
    assert [(params["differentiated"], params["prevent_cse"]) for params in repeated("full")] == [(True, True)] * 3


def test_the_gradient_of_slices_is_one_stack():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3, 2)), jnp.float32)
    cotangents = jnp.asarray(np.random.default_rng(1).normal(size=(5, 3, 2)), jnp.float32)
    parts, pull = jax.vjp(unstacked, x)
    np.testing.assert_array_equal(jnp.stack(parts), x)
    np.testing.assert_array_equal(pull(tuple(cotangents))[0], cotangents)
    assert "pad" not in str(jax.make_jaxpr(lambda c: pull(tuple(c)))(cotangents))


def equations(jaxpr):
    """Every equation, of inner programs too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@pytest.mark.parametrize("layers", ["scan", "unroll"])
def test_training_casts_each_weight_once(layers):
    """As a stack of all layers, not where a backward pass would cast it again; its gradient is widened once too."""
    model = nnx.eval_shape(lambda: LanguageModel(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, remat="operands"))
    model.layers = layers
    graph, state = nnx.split(model)
    ids = jnp.zeros((2, 33), jnp.int32)
    loss = lambda state: training_loss(nnx.merge(graph, state), ids)[0]  # noqa: E731
    jaxpr = jax.make_jaxpr(jax.grad(loss))(state).jaxpr
    variables = jax.tree.leaves(state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    linear = [x.get_value().shape for x in variables if "multiplied" in x.get_metadata()]
    assert len(linear) == 17  # 7 of a delta rule's layer, 4 of LTE, 3 of each MLP
    casts = [e for e in equations(jaxpr) if e.primitive.name == "convert_element_type"]
    for to, origin in ((jnp.bfloat16, jnp.float32), (jnp.float32, jnp.bfloat16)):
        shapes = [
            e.invars[0].aval.shape
            for e in casts
            if (e.params["new_dtype"], e.invars[0].aval.dtype) == (to, origin)
            and e.invars[0].aval.shape[-2:] in {shape[1:] for shape in linear}
        ]
        assert sorted(shapes) == sorted(linear)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="layers='loop' is not one of scan, unroll"):
        through(lambda x, _: (x, None), jnp.ones(2), jnp.ones((3, 2)), layers="loop", remat="none")
