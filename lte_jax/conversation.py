"""A conversation with one model: every turn goes on from the cache of the turns before, none is read twice.

Tokens are drawn several at a call, and a turn may end inside a call; the cache of that call's start is kept, and what
of the call was said is read again from there. So after each turn the cache has seen exactly what was said.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lte_jax.continuations import Generation, Rows
from lte_jax.decode import decode_weights, stacked_cache
from lte_jax.generate import begin_loop, decode_steps, pad_left, read_chunk
from lte_jax.inputs import check_tokens
from lte_jax.lengths import warn_beyond
from lte_jax.mixers.base import Reading
from lte_jax.model import LanguageModel
from lte_jax.sampling import Sampling


class Conversation:
    """One sequence that is continued turn by turn.

    Args:
      sampling, seed, eos_id, stop, decode: as of ``generate``; draws depend on the seed and on the tokens so far.
      reading: how LTE reads the first turn; later ones, which begin with a filled cache, are read causally.
      max_length: the longest conversation, for models whose cache grows; default the model's.
      steps_per_call: tokens drawn between two looks of the host.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen
        seed: int = 0,
        eos_id: int | None = None,
        stop: Sequence[str] = (),
        decode: Callable[[Sequence[int]], str] | None = None,
        reading: Reading = "prompt",
        max_length: int | None = None,
        steps_per_call: int = 8,
    ):
        if sampling.repetition_penalty != 1.0:
            raise ValueError(
                f"repetition_penalty={sampling.repetition_penalty}: a conversation keeps no list of what was said; "
                "leave it at 1"
            )
        self._model, self._sampling, self._steps = model, sampling, steps_per_call
        self._options = (eos_id, tuple(stop), decode)
        self._seed = seed
        self._graph, self._state = nnx.split(model)
        self._weights = decode_weights(model)
        self._cache = model.init_cache(1, max_length)
        self._reading: Reading = reading
        self.length = 0

    def say(
        self, tokens: Sequence[int], max_new_tokens: int, on_tokens: Callable[[int, list[int]], Any] | None = None
    ) -> Generation:
        """Reads a turn and answers it; both stay in the cache, but for an end-of-sequence token.

        Raises:
          ValueError: no tokens, ids outside the vocabulary, or more than a growing cache holds.
          LengthWarning (a warning): the conversation may be longer than the model was made for.
        """
        if not len(tokens):
            raise ValueError("the turn is empty: give some text")
        check_tokens(np.asarray(tokens)[None], self._model.config.vocab_size)
        bound, longest = self._cache.max_length, self.length + len(tokens) + max_new_tokens + self._steps
        if bound is not None and longest > bound:
            raise ValueError(
                f"the conversation may reach {longest} tokens, and its cache holds max_length={bound}; begin a new one"
            )
        warn_beyond(self.length + len(tokens) + max_new_tokens, self._model.config.max_length)
        logits = self._read(tokens, self._reading)
        self._reading = "streaming"
        self.length += len(tokens)
        rows, said = Rows(1, *self._options, on_tokens), 0
        loop = begin_loop(self._cache, logits, [self._seed])
        while said < max_new_tokens and not rows.done():
            before = jax.tree.map(jnp.copy, loop.cache)
            loop, new, log_probs = decode_steps(
                self._graph, self._state, self._weights, loop, sampling=self._sampling, steps=self._steps
            )
            wanted = max_new_tokens - said
            rows.add(np.asarray(new)[:, :wanted], np.asarray(log_probs)[:, :wanted])
            said += self._steps
        (found,) = rows.results()
        self.length += len(found.tokens)
        self._cache = stacked_cache(loop.cache)
        surplus = said - len(found.tokens)
        if surplus:  # the turn ended inside the last call
            self._cache = stacked_cache(before)
            rest = found.tokens[said - self._steps :]
            if rest:
                self._read(rest, "streaming")
        return found

    def _read(self, tokens: Sequence[int], reading: Reading) -> jax.Array:
        ids, mask = pad_left([tokens])
        logits, self._cache = read_chunk(self._graph, self._state, ids, mask, self._cache, reading=reading)
        return logits
