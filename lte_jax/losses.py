"""What training minimises: next-token cross-entropy, never holding all logits, plus the retention penalty.

    loss = mean over targets of (logsumexp_l h W - (h W)[label]) + mean of weight[r,k] * relu(score[r,b,t,k])

The cross-entropy goes through the tokens in chunks and computes its gradient in the same pass, so that neither forward
nor backward holds [B, T, L] and the head's product is not computed twice.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from lte_jax import partition, retention
from lte_jax.dims import Hidden, SegmentIds, Tokens
from pallas_kernels.cross_entropy import cross_entropy, statistics
from pallas_kernels.dispatch import xla_or_fastest

CHUNK_TOKENS = 4096
"""Tokens of a device's rows whose float32 logits are held at a time."""

Metrics = dict[str, jax.Array]


def training_loss(
    model: Any,
    input_ids: Tokens,
    penalty_weights: Float32[Array, "R K"] | None = None,
    *,
    labels: Int32[Array, "B T"] | None = None,
    segment_ids: SegmentIds | None = None,
    key: jax.Array | None = None,
    select: jax.Array | None = None,
    targets: jax.Array | None = None,
    scored: jax.Array | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[Float32[Array, ""], Metrics]:
    """The loss of one batch and what to report about it.

    Args:
      model: has ``hidden``, ``head_weight``, ``implementation`` and ``config`` (``lte_jax.model.LanguageModel``).
      penalty_weights: lambda per LTE layer and KV head; None for no penalty.
      labels: the target at each position, negative where nothing is asked; default the next token of the same document.
      segment_ids: document of each token, 0 for padding; None for one document a row.
      key: draws dropout; None means none.
      select: scalar bool for the router's warm-up (``LanguageModel.hidden``).
      targets, scored: the counts to divide by (real labels, scored positions), where this batch is a part of a larger
        one; the losses of the parts then add up to that of the whole.
      chunk_tokens: see ``CHUNK_TOKENS``.

    Returns:
      The float32 loss and float32 metrics: "loss", "ce", "correct" (targets predicted), "targets", and with LTE layers
      "penalty", "scored" (positions) and "selected" [R,K] (scored positions with a positive score).
    """
    if labels is None:
        labels = next_token_labels(input_ids, segment_ids)
    hidden, aux = model.hidden(input_ids, segment_ids=segment_ids, reading="train", key=key, select=select)
    count = jnp.sum(labels >= 0, dtype=jnp.float32)
    implementation = xla_or_fastest(model.implementation)
    total, correct = cross_entropy_sums(hidden, model.head_weight, labels, chunk_tokens, implementation)
    ce = total / jnp.maximum(count if targets is None else targets, 1.0)
    metrics = {"ce": ce, "correct": correct, "targets": count}
    if not aux:
        return ce, {**metrics, "loss": ce}
    valid = retention.scored_positions(input_ids.shape, segment_ids, router_reach(model.config))
    metrics |= {
        "scored": jnp.sum(valid, dtype=jnp.float32),
        "selected": retention.selected_counts(jax.lax.stop_gradient(aux["scores"]), valid),
        "penalty": jnp.zeros((), jnp.float32),
    }
    if penalty_weights is not None:
        metrics["penalty"] = retention.penalty(aux["scores"], penalty_weights, valid, scored)
    loss = ce + metrics["penalty"]
    return loss, {**metrics, "loss": loss}


def token_losses(
    model: Any,
    input_ids: Tokens,
    labels: Int32[Array, "B T"],
    *,
    segment_ids: SegmentIds | None,
    reading: str,
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[Float32[Array, "B T"], Float32[Array, "B T"], dict[str, jax.Array]]:
    """For evaluation: per position the loss and 1 where the best token is the label (else 0), and the routing."""
    hidden, aux = model.hidden(input_ids, segment_ids=segment_ids, reading=reading)
    weight = model.head_weight.astype(hidden.dtype)
    length = labels.shape[1]
    hidden, labels, steps = _padded(hidden, labels, chunk_tokens)

    def chunk(inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        loss, correct, _ = statistics(_logits(inputs[0], weight), inputs[1])
        return loss, correct

    losses, corrects = jax.lax.map(chunk, (_split(hidden, steps), _split(labels, steps)))
    return _join(losses)[:, :length], _join(corrects)[:, :length], aux


def next_token_labels(input_ids: Tokens, segment_ids: SegmentIds | None = None) -> Int32[Array, "B T"]:
    """The next token of the same document at each position, -1 where there is none."""
    following = jnp.pad(input_ids[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    if segment_ids is None:
        return following
    same = (segment_ids == jnp.pad(segment_ids[:, 1:], ((0, 0), (0, 1)))) & (segment_ids != 0)
    return jnp.where(same, following, -1)


def router_reach(config: Any) -> int:
    """How many tokens ahead the LTE routers of a model look.

    Raises:
      ValueError: its LTE layers differ in that.
    """
    reaches = {mixer.reach for mixer in config.pattern if hasattr(mixer, "reach")}
    if len(reaches) != 1:
        raise ValueError(
            f"the LTE layers reach {sorted(reaches)} tokens ahead: training counts their scores together, which needs "
            "one reach for all; give them the same convolutions and the same kind of retention"
        )
    return reaches.pop()


def cross_entropy_sums(
    hidden: Hidden,
    weight: Float[Array, "D L"],
    labels: Int32[Array, "B T"],
    chunk_tokens: int = CHUNK_TOKENS,
    implementation: str | None = None,
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """(sum of cross-entropies, number of targets predicted) over positions with a label >= 0.

    Differentiable in ``hidden`` and ``weight``. The products run in the dtype of ``hidden`` with float32 accumulation.
    """

    def local(hidden: jax.Array, weight: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        hidden, labels, steps = _padded(hidden, labels, chunk_tokens)
        return _chunked(hidden, weight, labels, steps, implementation)

    mesh = partition.current_mesh()
    if mesh is not None and mesh.shape["tensor"] > 1:
        implementation = "xla"  # the compiler splits the vocabulary, which it cannot inside a kernel
    return partition.sum_over_tokens(local, hidden, weight, labels)


def _padded(hidden: Hidden, labels: jax.Array, chunk_tokens: int) -> tuple[jax.Array, jax.Array, int]:
    """Both with as many tokens as ``steps`` equal chunks hold, and ``steps``."""
    batch, length, _ = hidden.shape
    steps = min(length, max(1, -(-batch * length // chunk_tokens)))
    padding = -length % steps
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))
    return hidden, jnp.pad(labels, ((0, 0), (0, padding)), constant_values=-1), steps


def _split(x: jax.Array, steps: int) -> jax.Array:
    """[B, T, ...] -> [steps, B, T / steps, ...], each chunk every ``steps``-th token.

    Strided, so that a sequence that is sharded over devices gives each of them an equal part of every chunk.
    """
    return jnp.moveaxis(x.reshape(x.shape[0], -1, steps, *x.shape[2:]), 2, 0)


def _join(x: jax.Array) -> jax.Array:
    joined = jnp.moveaxis(x, 0, 2)
    return joined.reshape(joined.shape[0], -1, *joined.shape[3:])


def _logits(hidden: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.matmul(hidden, weight, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _chunked(
    hidden: jax.Array, weight: jax.Array, labels: jax.Array, steps: int, implementation: str | None
) -> tuple[jax.Array, jax.Array]:
    cast = weight.astype(hidden.dtype)

    def step(sums: tuple, chunk: tuple) -> tuple[tuple, None]:
        loss, correct, _ = statistics(_logits(chunk[0], cast), chunk[1])
        return (sums[0] + jnp.sum(loss), sums[1] + jnp.sum(correct)), None

    zeros = (jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))
    return jax.lax.scan(step, zeros, (_split(hidden, steps), _split(labels, steps)))[0]


def _chunked_forward(
    hidden: jax.Array, weight: jax.Array, labels: jax.Array, steps: int, implementation: str | None
) -> tuple[tuple, tuple]:
    cast = weight.astype(hidden.dtype)

    def step(carry: tuple, chunk: tuple) -> tuple[tuple, jax.Array]:
        total, hits, dweight = carry
        h, target = chunk
        logits = _logits(h, cast)
        flat = logits.reshape(-1, logits.shape[-1])
        loss, correct, dlogits = cross_entropy(flat, target.reshape(-1), dtype=h.dtype, implementation=implementation)
        dlogits = dlogits.reshape(logits.shape)
        dhidden = jnp.matmul(dlogits, cast.T, preferred_element_type=jnp.float32).astype(h.dtype)
        dweight += jnp.einsum("btd,btl->dl", h, dlogits, preferred_element_type=jnp.float32)
        return (total + jnp.sum(loss), hits + jnp.sum(correct), dweight), dhidden

    zero = jnp.zeros((), jnp.float32)
    carry = (zero, zero, jnp.zeros(weight.shape, jnp.float32))
    (total, hits, dweight), dhidden = jax.lax.scan(step, carry, (_split(hidden, steps), _split(labels, steps)))
    return (total, hits), (_join(dhidden), dweight, jnp.zeros((), weight.dtype))


def _chunked_backward(steps: int, implementation: str | None, residuals: tuple, cotangents: tuple) -> tuple:
    dhidden, dweight, like = residuals
    scale = cotangents[0]
    return (dhidden.astype(jnp.float32) * scale).astype(dhidden.dtype), (dweight * scale).astype(like.dtype), None


_chunked.defvjp(_chunked_forward, _chunked_backward)
