"""Scores a checkpoint: on data, on tasks of our own, or on those of lm-evaluation-harness.

python -m experiments.evaluate --checkpoint=runs/quickstart
python -m experiments.evaluate --checkpoint=runs/quickstart --own=needles --lengths=96,192 --num_samples=200
python -m experiments.evaluate --checkpoint=runs/text --own=bytes --text=corpus/
python -m experiments.evaluate --checkpoint=runs/text --inspect --text=corpus/story.txt --lengths=2048
python -m experiments.evaluate --checkpoint=lalte-1.4b --tasks=short_context --output=results.json --cache=answers.jsonl
python -m experiments.evaluate --checkpoint=lalte-1.4b --tasks=niah_single_1 --lengths=1024,2048,4096 --max_length=4224
python -m experiments.evaluate --checkpoint=lalte-1.4b --tasks=swde_v0,fda_v0 --local_data=documents/
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags, logging

from lte_jax import configs, restore
from lte_jax.data.sources import find_units, read_documents
from lte_jax.evaluate import heldout, inspection, own
from lte_jax.evaluate.answers import write_json
from lte_jax.evaluate.pictures import result_picture, scores_picture
from lte_jax.evaluate.probe import probe
from lte_jax.generate import generate
from lte_jax.model import LanguageModel
from lte_jax.sampling import Sampling
from lte_jax.sharding import rows_mesh

FLAGS = flags.FLAGS

TASK_KINDS = {"needles": ("TextNeedles", "SymbolNeedles"), "mqar": ("MQARMix", "MQAR"), "copying": ("Copying",)}
"""The data sets that a task of our own can be asked on; the first is the default."""


def define_flags() -> None:
    flags.DEFINE_string("checkpoint", None, "A training run's folder, or a Hugging Face folder of the authors' format.")
    flags.DEFINE_integer("step", None, "Which checkpoint of a run; default the newest.")
    flags.DEFINE_string("output", None, "The JSON file to write, and a picture beside it; default in the run's folder.")
    flags.DEFINE_string("data", None, "Kind of data set (SymbolNeedles, Text, MQAR, ...); default the run's own.")
    flags.DEFINE_multi_string("set", [], "A setting of the data set, such as length=512 or path=corpus/.")
    flags.DEFINE_enum("split", "heldout", ["heldout", "train"], "Which rows.")
    flags.DEFINE_integer("batch_size", 8, "Rows, or requests of a task, at a time.")
    flags.DEFINE_integer("batches", None, "At most so many batches; default all that are held out.")
    flags.DEFINE_integer("buckets", 4, "In how many ranges of distance the accuracy is given.")
    flags.DEFINE_enum(
        "reading", None, ["train", "prompt", "streaming"], "How LTE reads; default streaming, for tasks prompt."
    )
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the computation.")
    flags.DEFINE_string("implementation", None, "Of every operation: xla, triton or pallas; default the fastest.")
    flags.DEFINE_list(
        "tasks", [], "Tasks of lm-evaluation-harness, or short_context, retrieval, needles; needs the eval extra."
    )
    flags.DEFINE_enum("own", None, [*TASK_KINDS, "positions", "bytes"], "A task of our own; it needs no download.")
    flags.DEFINE_bool("inspect", False, "Show what LTE keeps of --text, or of a row of data: pictures and a page.")
    flags.DEFINE_integer("num_samples", 200, "For --own: how many samples of each length (or windows of text).")
    flags.DEFINE_integer("depths", 5, "For --own=needles: in how many ranges of depth needles are asked for.")
    flags.DEFINE_string("text", None, "Text for --inspect and --own=positions, bytes or needles: a file or folder.")
    flags.DEFINE_string("tokenizer", None, "'bytes', a tokenizer.json or its folder; default its own.")
    flags.DEFINE_string("include_path", None, "For tasks: a folder with further task files.")
    flags.DEFINE_integer("num_fewshot", None, "For tasks: examples before each question; default the task's.")
    flags.DEFINE_integer("limit", None, "For tasks: only the first so many questions.")
    flags.DEFINE_integer("max_length", None, "For tasks: the longest sequence; default the model's.")
    flags.DEFINE_bool("add_bos", True, "For tasks: whether each context begins with the begin token.")
    flags.DEFINE_string(
        "cache", None, "For tasks: keep answers in this file (JSON lines), so that a killed run goes on."
    )
    flags.DEFINE_list("lengths", [], "For --own, --inspect, and RULER's tasks (default 4096): tokens of a sample.")
    flags.DEFINE_string(
        "local_data", None, "For tasks: documents in place of the hub, as FOLDER/OWNER/NAME/SPLIT.jsonl."
    )
    flags.DEFINE_integer("devices", 1, "For tasks: share each batch over so many devices, each with whole weights.")
    flags.DEFINE_bool("log_samples", False, "For tasks: write documents, answers and scores to OUTPUT.samples.jsonl.")
    flags.DEFINE_integer("seed", 0, "For --own and tasks: of drawn samples and examples.")
    flags.DEFINE_string("metadata", "{}", "For tasks: JSON of further values that some take.")
    flags.mark_flag_as_required("checkpoint")


def evaluate_data(
    checkpoint: str,
    output: str | None = None,
    *,
    step: int | None = None,
    kind: str | None = None,
    assignments: Sequence[str] = (),
    types: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Scores a data set, writes JSON and a picture, and returns what was written."""
    place = restore.find(checkpoint)
    data = heldout.data_set(restore.read_settings(place, step), kind, assignments)
    loaded = restore.load(checkpoint, step=step, **(types or {}))
    scores = heldout.score(loaded.model, data, **options)
    target = Path(output) if output else place.folder / "evaluation.json"
    chance = getattr(data, "chance", None)
    record = {
        "checkpoint": str(checkpoint),
        "step": loaded.step,
        "data": {"kind": type(data).__name__, **configs.to_dict(data)},
        **options,
        **scores.to_dict(),
        **({} if chance is None else {"chance": chance}),
    }
    write_json(target, record)
    scores_picture(scores, target.with_suffix(".png"), type(data).__name__)
    print(f"loss {scores.loss:.4f}, perplexity {scores.perplexity:.4g}, accuracy {scores.accuracy:.4f}", end="")
    print(f" ({scores.targets:,} targets{'' if chance is None else f', chance {chance:.4f}'})")
    for bucket in scores.by_distance:
        print(f"  answers {bucket.low}-{bucket.high} tokens back: {bucket.accuracy:.4f} of {bucket.queries:,}")
    print(f"{target}, {target.with_suffix('.png')}")
    return record


def texts(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    **options: Any,
) -> list[str]:
    """What the harness adapter calls to continue prompts."""
    found = generate(model, prompts, sampling=Sampling(temperature, top_k, top_p), **options)
    return [generation.text or "" for generation in found]


def evaluate_tasks(
    checkpoint: str,
    tasks: Sequence[str],
    output: str | None = None,
    *,
    step: int | None = None,
    tokenizer: str | None = None,
    types: dict[str, Any] | None = None,
    adapter: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Runs tasks of the harness, writes JSON, and returns what was written.

    Raises:
      RuntimeError: the harness is not installed.
      ValueError: no tokenizer, one that does not fit, an unknown task, or a --cache of another evaluation.
    """
    try:
        from lte_jax.evaluate.harness import HarnessModel
        from lte_jax.evaluate.tasks import run_tasks, write_samples
    except ImportError as error:
        raise RuntimeError(f"--tasks needs lm-evaluation-harness ({error}): pip install -e '.[eval]'") from None
    loaded = restore.load(checkpoint, tokenizer=tokenizer, needs_tokenizer=True, step=step, **(types or {}))
    settings = dict(adapter or {})
    mesh = rows_mesh(settings.pop("devices", 1))
    results = run_tasks(HarnessModel(loaded.model, loaded.tokenizer, texts, mesh=mesh, **settings), tasks, **options)
    target = Path(output) if output else restore.find(checkpoint).folder / "tasks.json"
    samples = results.pop("samples", None)
    if samples is not None:
        write_samples(samples, target.with_suffix(".samples.jsonl"))
    write_json(target, {"checkpoint": str(checkpoint), "step": loaded.step, **(adapter or {}), **options, **results})
    for task, numbers in results["results"].items():
        shown = ", ".join(f"{name} {value:.4f}" for name, value in numbers.items() if isinstance(value, float))
        print(f"{task}: {shown}")
    if results["truncated"]:
        print(f"warning: {results['truncated']} requests were cut at the left; raise --max_length")
    print(target)
    return results


def evaluate_own(
    checkpoint: str,
    name: str,
    output: str | None = None,
    *,
    step: int | None = None,
    kind: str | None = None,
    assignments: Sequence[str] = (),
    text: str | None = None,
    tokenizer: str | None = None,
    lengths: Sequence[int] = (),
    depths: int = 5,
    types: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Runs one of our own tasks, writes JSON and a picture, and returns what was written.

    Needles, MQAR and copying take the settings of the run's own data where that is of their kind.
    """
    place = restore.find(checkpoint)
    needs = name in ("positions", "bytes")
    loaded = restore.load(checkpoint, tokenizer=tokenizer, needs_tokenizer=needs, step=step, **(types or {}))
    model, found = loaded.model, loaded.tokenizer
    chosen = own.Options(**options)
    if name in ("positions", "bytes"):
        if text is None:
            raise ValueError(f"--own={name} needs --text, a file or folder of text")
        length = lengths[0] if lengths else model.config.max_length
        task = own.positions if name == "positions" else own.bytes_perplexity
        result = task(model, found, text, chosen, length=length)
    else:
        kinds = TASK_KINDS[name]
        saved = restore.read_settings(place, step)
        kind = kind or next((k for k in kinds if saved.get("data", {}).get("kind") == k), kinds[0])
        if kind not in kinds:
            raise ValueError(f"--data={kind}: --own={name} takes {' or '.join(kinds)}")
        if text is not None and kind != "TextNeedles":
            raise ValueError(f"--text={text}: --own={name} on {kind} draws its own tokens; drop it")
        assignments = [*assignments, *([] if text is None else [f"haystack={text}"])]
        same = saved if saved.get("data", {}).get("kind") == kind else {}
        data: Any = heldout.data_set(same, None if same else kind, assignments)
        if name == "needles":
            result = own.needles(model, data, chosen, lengths=lengths, depths=depths)
        elif name == "copying":
            result = own.copying(model, data, chosen, lengths=lengths)
        else:
            parts = [(l, p) for l, p, _ in data.test] if kind == "MQARMix" else [(data.length, data.pairs)]
            parts = [part for part in parts if not lengths or part[0] in lengths]
            if not parts:
                raise ValueError(f"--lengths={','.join(map(str, lengths))}: the task has no such length")
            result = own.mqar(model, chosen, parts=parts, vocabulary=data.vocabulary)
    target = Path(output) if output else place.folder / f"{name}.json"
    record = {"checkpoint": str(checkpoint), "step": loaded.step, **options, **result.to_dict()}
    write_json(target, record)
    result_picture(result, target.with_suffix(".png"), Path(checkpoint).name)
    print(own.table(result))
    print(f"{target}, {target.with_suffix('.png')}")
    return record


def inspect(
    checkpoint: str,
    output: str | None = None,
    *,
    step: int | None = None,
    kind: str | None = None,
    assignments: Sequence[str] = (),
    text: str | None = None,
    tokenizer: str | None = None,
    length: int | None = None,
    types: dict[str, Any] | None = None,
) -> list[Path]:
    """Writes pictures and a page on what LTE keeps of one text, or, without one, of the data's first held-out row.

    Args:
      output: the folder; default ``inspect`` in the run's folder.
      length: tokens to look at; default the text's, at most the model's ``max_length``.
    """
    place = restore.find(checkpoint)
    loaded = restore.load(checkpoint, tokenizer=tokenizer, needs_tokenizer=text is not None, step=step, **(types or {}))
    model, found = loaded.model, loaded.tokenizer
    length = length or model.config.max_length
    if text is not None:
        document = next((part for unit in find_units(text) for part in read_documents(unit) if part.strip()), None)
        if document is None:
            raise ValueError(f"--text={text}: the files hold no text; give others")
        tokens = found.encode(document, add_bos=found.bos_id is not None)[:length]
    else:
        data = heldout.data_set(restore.read_settings(place, step), kind, assignments)
        rows = data.rows("heldout", batch_size=1)
        if not len(rows):
            raise ValueError(f"{type(data).__name__} holds out no rows: give --text, or set heldout")
        tokens = rows[0]["input_ids"][:length].tolist()
    if text is not None or (found is not None and max(tokens) < found.vocab_size):
        stream = found.stream()
        pieces = [stream.push(token) for token in tokens]
    else:
        pieces = [f"{token} " for token in tokens]
    seen = probe(model, tokens)
    folder = Path(output) if output else place.folder / "inspect"
    written = inspection.write(seen, folder, f"{Path(checkpoint).name}: {len(tokens)} tokens", pieces)
    print(inspection.table(seen))
    print(", ".join(map(str, written)))
    return written


def _whole(flag: str, text: str) -> int:
    if not text.strip().isdigit() or int(text) < 1:
        raise ValueError(f"--{flag}={text}: not a whole number of tokens")
    return int(text)


def _run() -> None:
    types = {"dtype": FLAGS.dtype, "implementation": FLAGS.implementation}
    lengths = [_whole("lengths", length) for length in FLAGS.lengths]
    if bool(FLAGS.tasks) + (FLAGS.own is not None) + FLAGS.inspect > 1:
        raise ValueError("give one of --tasks, --own and --inspect")
    if FLAGS.inspect:
        _run_inspect(lengths, types)
        return
    if FLAGS.own:
        evaluate_own(
            FLAGS.checkpoint,
            FLAGS.own,
            FLAGS.output,
            step=FLAGS.step,
            kind=FLAGS.data,
            assignments=FLAGS.set,
            text=FLAGS.text,
            tokenizer=FLAGS.tokenizer,
            lengths=lengths,
            depths=FLAGS.depths,
            types=types,
            num_samples=FLAGS.num_samples,
            seed=FLAGS.seed,
            batch_size=FLAGS.batch_size,
            reading=FLAGS.reading or "streaming",
        )
        return
    if FLAGS.tasks:
        try:
            metadata = json.loads(FLAGS.metadata)
        except ValueError as error:
            raise ValueError(f"--metadata={FLAGS.metadata}: not JSON ({error})") from None
        adapter = {
            "max_length": FLAGS.max_length,
            "batch_size": FLAGS.batch_size,
            "reading": FLAGS.reading or "prompt",
            "add_bos_token": FLAGS.add_bos,
            "answers": FLAGS.cache,
            "devices": FLAGS.devices,
        }
        evaluate_tasks(
            FLAGS.checkpoint,
            FLAGS.tasks,
            FLAGS.output,
            step=FLAGS.step,
            tokenizer=FLAGS.tokenizer,
            types=types,
            adapter=adapter,
            include_path=FLAGS.include_path,
            num_fewshot=FLAGS.num_fewshot,
            limit=FLAGS.limit,
            lengths=lengths,
            local_data=FLAGS.local_data,
            metadata=metadata,
            seed=FLAGS.seed,
            log_samples=FLAGS.log_samples,
        )
        return
    evaluate_data(
        FLAGS.checkpoint,
        FLAGS.output,
        step=FLAGS.step,
        kind=FLAGS.data,
        assignments=FLAGS.set,
        types=types,
        split=FLAGS.split,
        batch_size=FLAGS.batch_size,
        batches=FLAGS.batches,
        buckets=FLAGS.buckets,
        reading=FLAGS.reading or "streaming",
    )


def _run_inspect(lengths: list[int], types: dict[str, Any]) -> None:
    inspect(
        FLAGS.checkpoint,
        FLAGS.output,
        step=FLAGS.step,
        kind=FLAGS.data,
        assignments=FLAGS.set,
        text=FLAGS.text,
        tokenizer=FLAGS.tokenizer,
        length=lengths[0] if lengths else None,
        types=types,
    )


def main(argv: list[str]) -> None:
    logging.set_verbosity(logging.ERROR)  # at lower levels orbax tells its whole life
    try:
        if len(argv) > 1:
            raise ValueError(f"{argv[1]!r}: no such argument; settings are given as flags")
        _run()
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    define_flags()
    app.run(main)
