"""How the next token is drawn from logits: greedy, temperature, top-k, top-p, repetition penalty."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The rule, applied in this order: repetition penalty, temperature, top-k, top-p.

    Attributes:
      temperature: divides the logits; 0 is greedy and ignores the seed.
      top_k: draw among the k most likely tokens; 0 is no limit.
      top_p: draw among the fewest most likely tokens whose probabilities reach p; 1 is no limit.
      repetition_penalty: of tokens already in the sequence, positive logits are divided by it and negative ones
        multiplied; 1 is none.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} must not be negative; 0 is greedy")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must not be negative; 0 is no limit")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]; 1 is no limit")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty={self.repetition_penalty} must be positive; 1 is none")


def draw(
    logits: Float[Array, "B L"], seen: Bool[Array, "B L"] | None, keys: jax.Array, sampling: Sampling
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """One token a row, and its log-probability under the model itself (before the rule).

    Args:
      seen: tokens already in each sequence; None where the rule has no repetition penalty.
      keys: one PRNG key a row, so that a row's tokens do not depend on its batch.
    """
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    if sampling.repetition_penalty != 1.0:
        assert seen is not None
        penalised = jnp.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty)
        logits = jnp.where(seen, penalised, logits)
    if sampling.temperature == 0.0:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    else:
        logits = _keep_likely(logits / sampling.temperature, sampling)
        token = jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
    return token, jnp.take_along_axis(log_probs, token[:, None], axis=1)[:, 0]


def _keep_likely(logits: Float[Array, "B L"], sampling: Sampling) -> Float[Array, "B L"]:
    """Logits with the tokens outside top-k and top-p at -inf."""
    if sampling.top_k:
        least = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.top_p < 1.0:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities  # the most likely token always stays
        least = jnp.min(jnp.where(before < sampling.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits
