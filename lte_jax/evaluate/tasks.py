"""Which tasks of lm-evaluation-harness are there under which names, where do their documents come from, and what do
they score?

Documents come from a hub, or from local files of the same format (``local_documents``). RULER makes its own and counts
their tokens with the model's own tokenizer. Imported only where the ``eval`` extra is installed.
"""

from __future__ import annotations

import collections
import contextlib
import difflib
import json
import os
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from lte_jax.evaluate.harness import HarnessModel
from lte_jax.evaluate.ruler import check_asked, check_variable_tracking, own_tokenizers, replaced
from lte_jax.whole_files import whole_file

SETS: dict[str, tuple[str, ...]] = {
    "short_context": (
        "wikitext",
        "lambada_openai",
        "piqa",
        "hellaswag",
        "winogrande",
        "arc_easy",
        "arc_challenge",
        "social_iqa",
        "boolq",
    ),
    "retrieval": ("swde_v0", "fda_v0", "squad_completion_v0"),
    "needles": ("niah_single_1", "niah_single_2", "niah_single_3"),
}
"""Names for several tasks."""


def _contains(doc: dict[str, Any], results: Sequence[str]) -> dict[str, int]:
    return {"contains": int(re.search(re.escape(doc["value"]), results[0], re.IGNORECASE) is not None)}


def _version_0(name: str, dataset: str) -> dict[str, Any]:
    """An EVAPORATE task as the paper scored it: texts and values as they stand, where version 1 strips both."""
    return {
        "task": f"{name}_v0",
        "dataset_path": dataset,
        "dataset_name": "default",
        "output_type": "generate_until",
        "validation_split": "validation",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{value}}",
        "target_delimiter": "",
        "process_results": _contains,
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 48, "do_sample": False},
        "metric_list": [{"metric": "contains", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 0},
    }


OWN: dict[str, dict[str, Any]] = {
    config["task"]: config
    for config in (
        _version_0("swde", "hazyresearch/based-swde-v2"),
        _version_0("fda", "hazyresearch/based-fda"),
        _version_0("squad_completion", "hazyresearch/based-squad"),
    )
}
"""Tasks that the harness does not have."""


def expand(names: Sequence[str]) -> list[str]:
    """The tasks behind names, where a name may be one of ``SETS``; each once, in order."""
    return list(dict.fromkeys(task for name in names for task in SETS.get(name, (name,))))


def run_tasks(
    adapter: HarnessModel,
    tasks: Sequence[str],
    *,
    include_path: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    lengths: Sequence[int] | None = None,
    local_data: str | None = None,
    metadata: dict[str, Any] | None = None,
    seed: int = 0,
    log_samples: bool = False,
) -> dict[str, Any]:
    """Runs tasks and returns the results as JSON values.

    Args:
      tasks: names of the harness, of ``OWN`` or of ``SETS``.
      include_path: a folder with further task files (YAML).
      limit: only the first so many documents of each task, for RULER of each length.
      lengths: of RULER's samples in tokens; default 4096. Samples depend on tasks, their order, tokenizer and seed.
      local_data: a folder of documents to read in place of the hub (``local_documents``).
      metadata: further values that tasks take.
      log_samples: whether the documents, answers and scores come along, under "samples".

    Raises:
      ValueError: an unknown task (near ones are named), documents that are neither on a hub nor in local files, or
        lengths that the adapter would cut or
        that the task cannot make.
    """
    names = expand(tasks)
    if limit is not None and limit < 1:
        raise ValueError(f"--limit={limit}: it must be at least 1, or left out for all documents")
    if lengths and max(lengths) > adapter.max_length:
        raise ValueError(
            f"--lengths={max(lengths)}: every such sample would be cut to max_length={adapter.max_length}; raise "
            "--max_length above it, or shorten them"
        )
    values = {**(metadata or {}), "tokenizer": adapter.text.name}
    if lengths:
        values["max_seq_lengths"] = list(lengths)
    manager = TaskManager(include_path=include_path, metadata=values)
    for name in names:
        if name not in OWN and not manager.match_tasks([name]):
            near = difflib.get_close_matches(name, [*manager.all_tasks, *OWN, *SETS], n=3)
            raise ValueError(f"--tasks: the harness has no task {name!r}{'; near: ' + ', '.join(near) if near else ''}")
    if {"ruler", "ruler_vt"} & set(names):
        check_variable_tracking(adapter.text, lengths or [4096])
    os.environ["DISABLE_MULTIPROC"] = "1"  # the harness would fork to bootstrap, and a fork of JAX's threads may hang
    random.seed(seed)  # RULER draws its samples when it is loaded
    np.random.seed(seed)
    with local_documents(local_data), own_tokenizers():
        loaded = [_load(manager, name, local_data) for name in names]
    asked = [task for found in loaded for task in found["tasks"].values()]
    for task in asked:
        check_asked(task.task_name, task.eval_docs)
    found = simple_evaluate(
        adapter,
        # A group as such, or its own number would be missing.
        tasks=[part for name, one in zip(names, loaded, strict=True) for part in _whole(name, one)],
        num_fewshot=num_fewshot,
        **_choice(asked, limit),
        task_manager=manager,
        metadata=values,
        log_samples=log_samples,
        bootstrap_iters=1000,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    assert found is not None  # None is for the other ranks of a distributed run
    kept = ("results", "versions", "n-shot", "n-samples", "higher_is_better", *(("samples",) if log_samples else ()))
    record = {name: found[name] for name in kept}
    scored = {**found["results"], **found.get("groups", {})}
    record["results"] = {name: _asked(numbers) for name, numbers in scored.items()}
    return {**record, "truncated": adapter.truncated, "seed": seed, "tokenizer": adapter.text.name}


def _whole(name: str, found: Any) -> list[Any]:
    """What the harness made of a name: the group of that name, or its tasks."""
    return [found["groups"][name]] if name in found["groups"] else list(found["tasks"].values())


def _load(manager: TaskManager, name: str, local_data: str | None) -> Any:
    try:
        return manager.load([OWN.get(name, name)])
    except (ConnectionError, FileNotFoundError, OSError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        where = f"{local_data} holds no files for it" if local_data else "give local files with --local_data"
        raise ValueError(f"{name}: its documents cannot be read from the hub ({first}); {where}") from error
    except ImportError as error:
        raise ValueError(f"{name}: {error}; pip install -e '.[eval]'") from error


def _choice(tasks: Sequence[Any], limit: int | None) -> dict[str, Any]:
    """The harness's arguments for the first documents: of every length, where a task has several."""
    if limit is None:
        return {}
    chosen: dict[str, list[int]] = {}
    for task in tasks:
        counts: collections.Counter[Any] = collections.Counter()
        chosen[task.task_name] = []
        for index, doc in enumerate(task.eval_docs):
            group = doc.get("max_length") if isinstance(doc, dict) else None
            counts[group] += 1
            if counts[group] <= limit:
                chosen[task.task_name].append(index)
    return {"samples": chosen}


def _asked(numbers: dict[str, Any]) -> dict[str, Any]:
    """Without the -1 that RULER gives for lengths that were not asked for, and without its spread of them."""
    unasked = {name for name, value in numbers.items() if name.split(",")[0].isdigit() and value == -1}
    return {
        name: value
        for name, value in numbers.items()
        if name not in unasked and name.replace("_stderr", "") not in unasked
    }


@contextlib.contextmanager
def local_documents(folder: str | None) -> Iterator[None]:
    """Within it, data sets of the hub are read from ``folder`` where it holds them.

    A data set ``owner/name`` lies in ``folder/owner/name``, with one file a split: ``validation.jsonl``, or .json,
    .parquet or .csv; its further configurations lie in folders of their names.

    Raises:
      ValueError: there is no such folder.
    """
    if folder is None:
        yield
        return
    if not Path(folder).is_dir():
        raise ValueError(f"--local_data={folder}: no such folder")
    original = datasets.load_dataset

    def load(path: str, name: str | None = None, *args: Any, split: Any = None, **kwargs: Any) -> Any:
        place = Path(folder) / path if path else None
        if place is not None and name and (place / name).is_dir():
            place = place / name
        files = {} if place is None or not place.is_dir() else _split_files(place)
        if not files:
            return original(path, name, *args, split=split, **kwargs)
        kind = next(iter(files.values())).suffix[1:].replace("jsonl", "json")
        return original(kind, data_files={part: str(file) for part, file in files.items()}, split=split)

    with replaced(datasets, "load_dataset", load):
        yield


def _split_files(folder: Path) -> dict[str, Path]:
    kinds = (".jsonl", ".json", ".parquet", ".csv")
    return {file.stem: file for file in sorted(folder.iterdir()) if file.is_file() and file.suffix in kinds}


def write_samples(samples: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """One JSON line for each document: its task, the request, the answer and the scores."""
    with whole_file(path) as partial, partial.open("w", encoding="utf-8") as file:
        for task, records in samples.items():
            for record in records:
                file.write(json.dumps({"task": task, **record}, ensure_ascii=False, default=str) + "\n")
