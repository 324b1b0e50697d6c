"""The adapter for lm-evaluation-harness: its requests answered by our model and tokenizer.

Equal to the harness's Hugging Face adapter where that decides a number: requests sorted by length, contexts truncated
at the left to ``max_length`` less the tokens to generate, generation ended by the end-of-sequence token, an empty
context replaced by the prefix token, spaces at a context's end moved to the continuation. Padding is masked, so that no
answer depends on its batch. Truncation is counted and said. Runs without torch. Imported only where the ``eval`` extra
is installed.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from lte_jax import sharding
from lte_jax.data.pipeline import mix_seed
from lte_jax.data.tokenizer import Tokenizer, check_fits, known_text
from lte_jax.evaluate.answers import Answers
from lte_jax.lengths import check_lengths
from lte_jax.losses import token_losses
from lte_jax.mixers.base import Reading
from lte_jax.model import LanguageModel

logger = logging.getLogger(__name__)

Request = tuple[Any, list[int], list[int]]


class HarnessModel(TemplateLM):
    """A LanguageModel and its tokenizer as the harness wants them.

    Args:
      model: weights and settings.
      tokenizer: must fit the model's vocabulary.
      generator: ``generator(model, prompts, *, max_new_tokens, seeds, temperature, top_k, top_p, eos_id, stop, decode,
        reading, mesh)`` gives each prompt's text up to a stop string (passed in: evaluation and generation do not
        import one another).
      max_length: the longest sequence; default the model's.
      max_gen_toks: tokens to generate where a task names no number.
      batch_size: sequences at a time.
      reading: how LTE reads a sequence; "prompt" is the authors' evaluation.
      add_bos_token: whether every context begins with the bos token (the paper: yes).
      answers: a file that keeps answers, so that a killed evaluation goes on where it stopped.
      mesh: the devices that share a batch's rows, each with whole weights; None for the model's own device.
      seed: of drawn answers; the repeats of one request are drawn apart.

    Raises:
      ValueError: a tokenizer that does not fit the vocabulary or lacks a token, a file of other answers, or a batch
        that no device can hold.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        generator: Callable[..., list[str]],
        *,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        batch_size: int = 8,
        reading: Reading = "prompt",
        add_bos_token: bool = True,
        answers: str | os.PathLike[str] | None = None,
        mesh: Mesh | None = None,
        seed: int = 0,
    ):
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: it must be at least 1")
        if mesh is not None and batch_size % mesh.size:
            raise ValueError(f"batch_size={batch_size} is not a multiple of the {mesh.size} devices that share it")
        check_fits(tokenizer, model.config.vocab_size)
        if tokenizer.eos_id is None:
            raise ValueError(f"tokenizer {tokenizer.name!r} names no end token, which the harness stops at; give one")
        if add_bos_token and tokenizer.bos_id is None:
            raise ValueError(f"tokenizer {tokenizer.name!r} names no bos token; set add_bos_token=False")
        self.model, self.text, self.generator = model, tokenizer, generator
        self.max_length = model.config.max_length if max_length is None else max_length
        check_lengths(model, -(-batch_size // (1 if mesh is None else mesh.size)), self.max_length)
        self.max_gen_toks, self.batch_size, self.reading = max_gen_toks, batch_size, reading
        self.add_bos_token = add_bos_token
        self.truncated, self.seed = 0, seed
        self._graph, self._state = nnx.split(model)
        self._mesh = mesh
        self._state = sharding.put(self._state, mesh, PartitionSpec())
        self._answers = None if answers is None else Answers(answers, self._owner())

    def _owner(self) -> dict[str, Any]:
        """What an answer depends on."""
        digest = hashlib.sha256()
        for path, leaf in nnx.to_flat_state(self._state):
            flat = leaf.get_value().reshape(-1)
            few = np.asarray(jax.device_get(flat[:: max(1, flat.size // 997)]))
            digest.update(repr(path).encode() + np.ascontiguousarray(few).tobytes())
        return {
            "model": self.model.config.to_dict(),
            "weights": digest.hexdigest()[:16],
            "dtype": self.model.dtype.name,
            "tokenizer": self.text.fingerprint(),
            "max_length": self.max_length,
            "max_gen_toks": self.max_gen_toks,
            "reading": self.reading,
            "add_bos_token": self.add_bos_token,
        }

    def _known(self, kind: str, requests: Sequence[Any]) -> list[Any | None]:
        return [None if self._answers is None else self._answers.find(kind, request) for request in requests]

    def _keep(self, kind: str, request: Any, answer: Any) -> None:
        if self._answers is not None:
            self._answers.add(kind, request, answer)

    @property
    def eot_token_id(self) -> int:
        assert self.text.eos_id is not None
        return self.text.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self.text.bos_id is None else self.text.bos_id

    @property
    def tokenizer_name(self) -> str:
        return self.text.name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        add_bos = self.add_bos_token if add_special_tokens is None else add_special_tokens and self.add_bos_token
        return self.text.encode(string, add_bos=add_bos)

    def tok_decode(self, tokens: Sequence[int], **kwargs: Any) -> str:
        return self.text.decode(tokens)

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(sum of log-probabilities of the continuation, whether argmax gives it) for each request."""
        for _, context, continuation in requests:
            if not context or not continuation or len(continuation) > self.max_length:
                raise ValueError(
                    f"a request has {len(context)} context and {len(continuation)} continuation tokens: both need at "
                    f"least 1, and the continuation at most max_length={self.max_length}"
                )
        self._say_truncated(sum(len(c) + len(t) > self.max_length + 1 for _, c, t in requests), len(requests))
        tokens = [[context, continuation] for _, context, continuation in requests]
        found = self._known("log-likelihood", tokens)
        answers = [(0.0, False) if answer is None else (float(answer[0]), bool(answer[1])) for answer in found]
        order = [index for index, answer in enumerate(found) if answer is None]
        order.sort(key=lambda i: (-len(requests[i][1]) - len(requests[i][2]), requests[i][1] + requests[i][2]))
        with tqdm(total=len(requests), initial=len(requests) - len(order), disable=disable_tqdm) as bar:
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                for index, answer in zip(batch, self._score([requests[i] for i in batch]), strict=True):
                    answers[index] = answer
                    self._keep("log-likelihood", tokens[index], answer)
                bar.update(len(batch))
        return answers

    def _score(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        length = max(min(len(c) + len(t) - 1, self.max_length) for _, c, t in requests)
        length = -(-length // 64) * 64  # few lengths are compiled
        ids = np.zeros((self.batch_size, length), np.int32)
        labels = np.full((self.batch_size, length), -1, np.int32)
        segment_ids = np.zeros((self.batch_size, length), np.int32)
        for row, (_, context, continuation) in enumerate(requests):
            whole = (context + continuation)[-(self.max_length + 1) :]
            size = len(whole) - 1
            ids[row, :size] = whole[:-1]
            labels[row, size - len(continuation) : size] = continuation
            segment_ids[row, :size] = 1
        rows = None if self._mesh is None else sharding.by_rows(self._mesh)
        batch = sharding.put((ids, labels, segment_ids), self._mesh, rows)
        loss, greedy = jax.device_get(
            _score_batch(self._graph, self._state, *batch, reading=self.reading, mesh=self._mesh)
        )
        return [(-float(loss[row]), bool(greedy[row])) for row in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text, in windows that each see one token of what came before."""
        windows: list[Request] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            (string,) = request.args
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(string),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, pairs):
                windows.append((None, context, continuation))
                owners.append(owner)
        totals = [0.0] * len(requests)
        answers = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for owner, (log_probability, _) in zip(owners, answers, strict=True):
            totals[owner] += log_probability
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each context, up to a stop string."""
        found = self._known("generation", [request.args for request in requests])
        answers = ["" if answer is None else str(answer) for answer in found]
        groups = collections.defaultdict(list)
        asked: collections.Counter[str] = collections.Counter()
        seeds = []  # of a request that comes several times, another each time
        for index, request in enumerate(requests):
            groups[repr(request.args[1])].append(index)
            seeds.append(mix_seed(self.seed, asked[repr(request.args)]))
            asked[repr(request.args)] += 1
        done = sum(answer is not None for answer in found)
        with tqdm(total=len(requests), initial=done, disable=disable_tqdm) as bar:
            for members in groups.values():
                options = requests[members[0]].args[1]
                encoded = {index: self.tok_encode(requests[index].args[0]) for index in members}
                room = self._room(self._new_tokens(options))
                self._say_truncated(sum(len(context) > room for context in encoded.values()), len(members))
                members = [index for index in members if found[index] is None]
                members.sort(key=lambda index: (-len(encoded[index]), requests[index].args[0]))
                for start in range(0, len(members), self.batch_size):
                    batch = members[start : start + self.batch_size]
                    texts = self._continue([encoded[i] for i in batch], options, [seeds[i] for i in batch])
                    for index, text in zip(batch, texts, strict=True):
                        answers[index] = text
                        if not options.get("do_sample"):  # repeats of a drawn answer must differ
                            self._keep("generation", requests[index].args, text)
                    bar.update(len(batch))
        return answers

    def _new_tokens(self, options: dict[str, Any]) -> int:
        return normalize_gen_kwargs(dict(options), self.max_gen_toks)["max_gen_toks"]

    def _room(self, new: int) -> int:
        room = self.max_length - new
        if room < 1:
            raise ValueError(f"max_gen_toks={new} leaves no room for a context within max_length={self.max_length}")
        return room

    def _continue(self, contexts: list[list[int]], options: dict[str, Any], seeds: list[int]) -> list[str]:
        kwargs = normalize_gen_kwargs(dict(options), self.max_gen_toks)
        eos = self.text.decode([self.eot_token_id]) or None
        stop = [string for string in handle_stop_sequences(kwargs.pop("until", None), eos=eos) if string]
        new = kwargs.pop("max_gen_toks")
        room = self._room(new)
        temperature = float(kwargs.pop("temperature", 0.0)) if kwargs.pop("do_sample", False) else 0.0
        texts = self.generator(
            self.model,
            [context[-room:] or [self.prefix_token_id] for context in contexts],
            max_new_tokens=new,
            seeds=seeds,
            temperature=temperature,
            top_k=int(kwargs.pop("top_k", 0)),
            top_p=float(kwargs.pop("top_p", 1.0)),
            eos_id=self.eot_token_id,
            stop=tuple(stop),
            decode=known_text(self.text),
            reading=self.reading,
            mesh=self._mesh,
        )
        return [postprocess_generated_text(text, stop, None) for text in texts]

    def _say_truncated(self, count: int, total: int) -> None:
        self.truncated += count
        if count:
            logger.warning("%d of %d requests are cut at the left to max_length=%d", count, total, self.max_length)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("reading", "mesh"))
def _score_batch(
    graph: Any,
    state: Any,
    ids: jax.Array,
    labels: jax.Array,
    segment_ids: jax.Array,
    *,
    reading: str,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The loss of each row's labels [B], and whether argmax gives them all [B]."""

    def local(state: Any, ids: jax.Array, labels: jax.Array, segment_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graph, state)
        loss, correct, _ = token_losses(model, ids, labels, segment_ids=segment_ids, reading=reading)
        return jnp.sum(loss, axis=1), jnp.all((correct > 0) | (labels < 0), axis=1)

    rows = None if mesh is None else sharding.by_rows(mesh)
    specs = (PartitionSpec(), rows, rows, rows)
    return sharding.over_rows(local, mesh, specs, (rows, rows))(state, ids, labels, segment_ids)
