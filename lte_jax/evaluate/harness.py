"""The adapter for lm-evaluation-harness: its requests answered by our model and tokenizer.

Equal to the harness's Hugging Face adapter where that decides a number: requests sorted by length, contexts truncated
at the left to ``max_length`` less the tokens to generate, the end-of-sequence text among the stop strings, an empty
context replaced by the prefix token, spaces at a context's end moved to the continuation. Truncation is counted and
said. Runs without torch. Imported only where the ``eval`` extra is installed.
"""

from __future__ import annotations

import collections
import difflib
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from lte_jax.data.tokenizer import Tokenizer, check_fits
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
      generator: ``generator(model, prompts, *, max_new_tokens, temperature, top_k, top_p, eos_id, stop, decode,
        reading)`` gives each prompt's text up to a stop string (passed in: evaluation and generation do not import one
        another).
      max_length: the longest sequence; default the model's.
      max_gen_toks: tokens to generate where a task names no number.
      batch_size: sequences at a time.
      reading: how LTE reads a sequence; "prompt" is the authors' evaluation.
      add_bos_token: whether every context begins with the bos token (the paper: yes).
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
    ):
        super().__init__()
        check_fits(tokenizer, model.config.vocab_size)
        if tokenizer.eos_id is None:
            raise ValueError(f"tokenizer {tokenizer.name!r} names no end token, which the harness stops at; give one")
        if add_bos_token and tokenizer.bos_id is None:
            raise ValueError(f"tokenizer {tokenizer.name!r} names no bos token; set add_bos_token=False")
        self.model, self.text, self.generator = model, tokenizer, generator
        self.max_length = model.config.max_length if max_length is None else max_length
        self.max_gen_toks, self.batch_size, self.reading = max_gen_toks, batch_size, reading
        self.add_bos_token = add_bos_token
        self._graph, self._state = nnx.split(model)

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
        order = sorted(
            range(len(requests)), key=lambda i: (-len(requests[i][1]) - len(requests[i][2]), requests[i][1:])
        )
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="log-likelihoods") as bar:
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                for index, answer in zip(batch, self._score([requests[i] for i in batch]), strict=True):
                    answers[index] = answer
                    key, context, continuation = requests[index]
                    if key is not None:
                        self.cache_hook.add_partial("loglikelihood", key, answer)
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
        loss, greedy = jax.device_get(
            _score_batch(self._graph, self._state, ids, labels, segment_ids, reading=self.reading)
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
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each context, up to a stop string."""
        groups = collections.defaultdict(list)
        for index, request in enumerate(requests):
            groups[repr(request.args[1])].append(index)
        answers = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="generations") as bar:
            for members in groups.values():
                encoded = {index: self.tok_encode(requests[index].args[0]) for index in members}
                members.sort(key=lambda index: (-len(encoded[index]), requests[index].args[0]))
                for start in range(0, len(members), self.batch_size):
                    batch = members[start : start + self.batch_size]
                    texts = self._continue([encoded[index] for index in batch], requests[batch[0]].args[1])
                    for index, text in zip(batch, texts, strict=True):
                        answers[index] = text
                        self.cache_hook.add_partial("generate_until", requests[index].args, text)
                    bar.update(len(batch))
        return answers

    def _continue(self, contexts: list[list[int]], options: dict[str, Any]) -> list[str]:
        kwargs = normalize_gen_kwargs(dict(options), self.max_gen_toks)
        eos = self.text.decode([self.eot_token_id]) or None
        stop = [string for string in handle_stop_sequences(kwargs.pop("until", None), eos=eos) if string]
        new = kwargs.pop("max_gen_toks")
        room = self.max_length - new
        if room < 1:
            raise ValueError(f"max_gen_toks={new} leaves no room for a context within max_length={self.max_length}")
        self._say_truncated(sum(len(context) > room for context in contexts), len(contexts))
        temperature = float(kwargs.pop("temperature", 0.0)) if kwargs.pop("do_sample", False) else 0.0
        texts = self.generator(
            self.model,
            [context[-room:] for context in contexts],
            max_new_tokens=new,
            temperature=temperature,
            top_k=int(kwargs.pop("top_k", 0)),
            top_p=float(kwargs.pop("top_p", 1.0)),
            eos_id=self.eot_token_id,
            stop=tuple(stop),
            decode=self.text.decode,
            reading=self.reading,
        )
        return [postprocess_generated_text(text, stop, None) for text in texts]

    def _say_truncated(self, count: int, total: int) -> None:
        if count:
            logger.warning("%d of %d requests are cut at the left to max_length=%d", count, total, self.max_length)


def run_tasks(
    adapter: HarnessModel,
    tasks: Sequence[str],
    *,
    include_path: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    cache: str | None = None,
    metadata: dict[str, Any] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Runs tasks of the harness and returns its results as JSON values.

    Args:
      include_path: a folder with further task files (YAML).
      limit: only the first so many documents of each task.
      cache: answers are kept in this file (sqlite), so that a killed evaluation goes on where it stopped.
      metadata: for tasks that take some, such as RULER's ``{"max_seq_lengths": [4096], "tokenizer": ...}``.

    Raises:
      ValueError: an unknown task; the message names near ones.
    """
    manager = TaskManager(include_path=include_path, metadata=metadata)
    for name in tasks:
        if not manager.match_tasks([name]):
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            raise ValueError(f"--tasks: the harness has no task {name!r}{'; near: ' + ', '.join(near) if near else ''}")
    found = simple_evaluate(
        adapter,
        tasks=list(tasks),
        num_fewshot=num_fewshot,
        limit=limit,
        use_cache=cache,
        task_manager=manager,
        metadata=metadata,
        log_samples=False,
        bootstrap_iters=1000,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    assert found is not None  # None is for the other ranks of a distributed run
    return {name: found[name] for name in ("results", "versions", "n-shot", "n-samples", "higher_is_better")}


@functools.partial(jax.jit, static_argnums=0, static_argnames="reading")
def _score_batch(graph: Any, state: Any, ids: jax.Array, labels: jax.Array, segment_ids: jax.Array, *, reading: str):
    model = nnx.merge(graph, state)
    loss, correct, _ = token_losses(model, ids, labels, segment_ids=segment_ids, reading=reading)
    return jnp.sum(loss, axis=1), jnp.all((correct > 0) | (labels < 0), axis=1)
