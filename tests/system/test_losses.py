"""Is the chunked loss that of the plain formula, in value, gradient and memory, and that of the authors' step?"""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from lte_jax import losses, retention

B, T, D, L, R, K, REACH = 3, 13, 5, 29, 2, 3, 2


@dataclasses.dataclass
class StandIn:
    """A "model" whose hidden states and scores are simple functions of two arrays."""

    table: jax.Array
    head: jax.Array
    config = types.SimpleNamespace(pattern=(types.SimpleNamespace(reach=REACH),))
    implementation = None

    @property
    def head_weight(self):
        return self.head

    def hidden(self, input_ids, *, segment_ids=None, reading="train", key=None, select=None):
        hidden = jnp.tanh(self.table[input_ids])
        scores = jnp.stack([hidden[..., :K], -hidden[..., 1 : K + 1]])
        return hidden, {"scores": scores, "selected": scores > 0}


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    table = jnp.asarray(rng.normal(size=(L, D)), jnp.float32)
    head = jnp.asarray(rng.normal(size=(D, L)), jnp.float32)
    return table, head, jnp.asarray(rng.integers(0, L, (B, T)), jnp.int32)


def plain_loss(table, head, ids, labels, weights, valid):
    hidden = jnp.tanh(table[ids])
    logp = jax.nn.log_softmax(hidden @ head)
    picked = jnp.take_along_axis(logp, jnp.maximum(labels, 0)[..., None], -1)[..., 0]
    asked = labels >= 0
    ce = -jnp.sum(jnp.where(asked, picked, 0.0)) / jnp.sum(asked).astype(jnp.float32)
    scores = jnp.stack([hidden[..., :K], -hidden[..., 1 : K + 1]])[:, valid]
    return ce + jnp.mean(weights[:, None] * jax.nn.relu(scores))


@pytest.mark.parametrize("chunk_tokens", [1, 7, 1000])
def test_loss_and_gradient_equal_the_plain_formula_in_any_chunks(chunk_tokens):
    table, head, ids = arrays()
    segments = jnp.asarray([[1] * T, [1] * 5 + [2] * 8, [0, 0] + [4] * 9 + [0, 0]], jnp.int32)
    weights = jnp.asarray(np.random.default_rng(1).random((R, K)), jnp.float32)
    valid = np.asarray(retention.scored_positions((B, T), segments, REACH))

    def ours(table, head):
        return losses.training_loss(StandIn(table, head), ids, weights, segment_ids=segments, chunk_tokens=chunk_tokens)

    (loss, metrics), gradients = jax.value_and_grad(ours, (0, 1), has_aux=True)(table, head)
    labels = losses.next_token_labels(ids, segments)
    expected, expected_gradients = jax.value_and_grad(plain_loss, (0, 1))(table, head, ids, labels, weights, valid)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    for got, want in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-6)
    assert int(metrics["targets"]) == (T - 1) + 4 + 7 + 8
    assert int(metrics["scored"]) == valid.sum()
    eager, _ = ours(table, head)
    np.testing.assert_allclose(eager, loss, rtol=1e-6)


def test_labels_stop_at_the_end_of_a_document():
    ids = jnp.asarray([[5, 6, 7, 8, 9, 3]], jnp.int32)
    np.testing.assert_array_equal(losses.next_token_labels(ids), [[6, 7, 8, 9, 3, -1]])
    segments = jnp.asarray([[0, 1, 1, 2, 2, 0]], jnp.int32)
    np.testing.assert_array_equal(losses.next_token_labels(ids, segments), [[-1, 7, -1, 9, -1, -1]])


def test_parts_of_a_batch_add_up_to_the_whole():
    table, head, ids = arrays(2)
    labels = jnp.where(jnp.arange(T) % 3 == 0, losses.next_token_labels(ids), -1)
    labels = labels.at[0, :7].set(-1)
    weights = jnp.ones((R, K), jnp.float32)
    whole, metrics = losses.training_loss(StandIn(table, head), ids, weights, labels=labels)
    parts = [
        losses.training_loss(
            StandIn(table, head),
            ids[row : row + 1],
            weights,
            labels=labels[row : row + 1],
            targets=metrics["targets"],
            scored=metrics["scored"],
        )[0]
        for row in range(B)
    ]
    np.testing.assert_allclose(sum(parts), whole, rtol=1e-6)


def test_a_batch_without_targets_has_a_loss_and_gradient_of_zero():
    table, head, ids = arrays()
    labels = jnp.full((B, T), -1, jnp.int32)
    loss, gradient = jax.value_and_grad(lambda head: losses.training_loss(StandIn(table, head), ids, labels=labels)[0])(
        head
    )
    assert loss == 0 and not np.any(gradient)


def test_all_logits_are_never_held_forward_or_backward():
    table, _, ids = arrays()
    vocabulary = 20 * L
    head = jnp.ones((D, vocabulary), jnp.float32)

    def loss(table, head):
        return losses.training_loss(StandIn(table, head), ids, chunk_tokens=B * 2)[0]

    jaxpr = jax.make_jaxpr(jax.value_and_grad(loss, (0, 1)))(table, head)
    largest = max(size for size in _sizes(jaxpr.jaxpr))
    chunk = B * 2 * vocabulary
    assert chunk <= largest < B * T * vocabulary / 3, f"an array of {largest} elements; a chunk of logits has {chunk}"


def _sizes(jaxpr):
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield int(np.prod(variable.aval.shape)) if variable.aval.shape else 1
        for inner in jaxprs_in_params(equation.params):
            yield from _sizes(inner)


def test_bfloat16_hidden_states_give_a_float32_loss_and_head_gradient():
    table, head, ids = arrays()
    labels = losses.next_token_labels(ids)

    def total(hidden, head):
        return losses.cross_entropy_sums(hidden, head, labels, 8)[0]

    hidden = jnp.tanh(table[ids]).astype(jnp.bfloat16)
    value, (dhidden, dhead) = jax.value_and_grad(total, (0, 1))(hidden, head)
    assert (value.dtype, dhidden.dtype, dhead.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(value, total(hidden.astype(jnp.float32), head), rtol=5e-3)


def test_evaluation_gives_the_loss_and_the_hit_of_every_position():
    table, head, ids = arrays()
    labels = losses.next_token_labels(ids)
    model = StandIn(table, head)
    loss, correct, aux = losses.token_losses(model, ids, labels, segment_ids=None, reading="prompt", chunk_tokens=7)
    logits = jnp.tanh(table[ids]) @ head
    expected = -jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(labels, 0)[..., None], -1)[..., 0]
    np.testing.assert_allclose(loss, np.where(labels >= 0, expected, 0), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(correct, (np.argmax(logits, -1) == labels) & (np.asarray(labels) >= 0))
    assert set(aux) == {"scores", "selected"}
