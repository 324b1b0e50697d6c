"""Scores a checkpoint: on data, on tasks of our own, or on those of lm-evaluation-harness.

python -m experiments.evaluate --checkpoint=runs/quickstart/lalte
python -m experiments.evaluate --checkpoint=runs/quickstart/lalte --own=needles --lengths=96,192 --num_samples=200
python -m experiments.evaluate --checkpoint=runs/text --own=bytes --text=corpus/
python -m experiments.evaluate --checkpoint=runs/text --inspect --text=corpus/story.txt --lengths=2048
python -m experiments.evaluate --checkpoint=lalte-1.4b --tasks=short_context --output=results.json --cache=answers.jsonl
python -m experiments.evaluate --checkpoint=lalte-1.4b --tasks=niah_single_1 --lengths=1024,2048,4096 --max_length=4224
python -m experiments.evaluate --checkpoint=lalte-1.4b --tasks=swde_v0,fda_v0 --local_data=documents/
"""

from __future__ import annotations

import json
from typing import Any

from absl import app, flags, logging

from experiments import evaluations
from experiments.paths import define_path
from experiments.warned import said_in_one_line

FLAGS = flags.FLAGS

READ = {
    "--tasks": "tasks tokenizer lengths seed batch_size reading include_path num_fewshot limit max_length add_bos "
    "cache local_data devices log_samples metadata",
    "--inspect": "inspect tokenizer text lengths data set",
    "--own=needles": "own tokenizer text lengths seed batch_size reading num_samples depths data set",
    "--own=mqar": "own lengths seed batch_size reading num_samples data set",
    "--own=copying": "own lengths seed batch_size reading num_samples data set",
    "--own=positions": "own tokenizer text lengths batch_size reading num_samples",
    "--own=bytes": "own tokenizer text lengths batch_size reading",
    "data": "data set split batch_size batches buckets reading",
}
"""The flags that each kind of evaluation reads, beside those of every kind."""


def define_flags() -> None:
    define_path("checkpoint", None, "A training run's folder, or a Hugging Face folder of the authors' format.")
    flags.DEFINE_integer("step", None, "Which checkpoint of a run; default the newest.")
    define_path(
        "output",
        None,
        "The JSON file to write, and a picture beside it; default in the run's folder, "
        "where earlier results of the name get a number.",
    )
    flags.DEFINE_string("data", None, "Kind of data set (SymbolNeedles, Text, MQAR, ...); default the run's own.")
    flags.DEFINE_multi_string("set", [], "A setting of the data set, such as length=512 or path=corpus/.")
    flags.DEFINE_enum("split", "heldout", ["heldout", "train"], "Which rows.")
    flags.DEFINE_integer("batch_size", 8, "Rows, or requests of a task, at a time.")
    flags.DEFINE_integer("batches", None, "At most so many batches; default all that are held out.")
    flags.DEFINE_integer("buckets", 4, "In how many ranges of distance the accuracy is given.")
    flags.DEFINE_enum(
        "reading", None, ["train", "prompt", "streaming"], "How LTE reads; default streaming, for --tasks prompt."
    )
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the computation.")
    flags.DEFINE_string("implementation", None, "Of every operation: xla, triton or pallas; default the fastest.")
    flags.DEFINE_list(
        "tasks", [], "Tasks of lm-evaluation-harness, or short_context, retrieval, needles; needs the eval extra."
    )
    flags.DEFINE_enum(
        "own",
        None,
        [kind.removeprefix("--own=") for kind in READ if kind.startswith("--own=")],
        "A task of our own; it needs no download. positions: perplexity by position in the first --lengths tokens of "
        "each text that is as long. bytes: perplexity per byte of all of every text.",
    )
    flags.DEFINE_bool("inspect", False, "Show what LTE keeps of --text, or of a row of data: pictures and a page.")
    flags.DEFINE_integer("num_samples", 200, "For --own: how many samples of each length; for positions, texts.")
    flags.DEFINE_integer("depths", 5, "For --own=needles: in how many ranges of depth needles are asked for.")
    define_path("text", None, "Text for --inspect and --own=positions, bytes or needles: a file or folder.")
    define_path("tokenizer", None, "'bytes', a tokenizer.json or its folder; default its own.")
    define_path("include_path", None, "For --tasks: a folder with further task files.")
    flags.DEFINE_integer("num_fewshot", None, "For --tasks: examples before each question; default the task's.")
    flags.DEFINE_integer("limit", None, "For --tasks: only the first so many questions.")
    flags.DEFINE_integer("max_length", None, "For --tasks: the longest sequence; default the model's.")
    flags.DEFINE_bool("add_bos", True, "For --tasks: whether each context begins with the begin token.")
    define_path("cache", None, "For --tasks: keep answers in this file (JSON lines), so that a killed run goes on.")
    flags.DEFINE_list("lengths", [], "For --own, --inspect, and RULER's tasks (default 4096): tokens of a sample.")
    define_path("local_data", None, "For --tasks: documents in place of the hub, as FOLDER/OWNER/NAME/SPLIT.jsonl.")
    flags.DEFINE_integer("devices", 1, "For --tasks: share each batch over so many devices, each with whole weights.")
    flags.DEFINE_bool("log_samples", False, "For --tasks: write documents, answers and scores to OUTPUT.samples.jsonl.")
    flags.DEFINE_integer("seed", 0, "For --own and --tasks: of drawn samples and examples.")
    flags.DEFINE_string("metadata", "{}", "For --tasks: JSON of further values that some take.")
    flags.mark_flag_as_required("checkpoint")


def check_flags(given: Any, kind: str) -> None:
    """Raises ValueError for the first flag that was given and that this kind of evaluation does not read."""
    known = {name for names in READ.values() for name in names.split()}
    for name in sorted(known - set(READ[kind].split())):
        if given[name].present:
            what = "an evaluation on data" if kind == "data" else kind
            raise ValueError(f"--{name}: {what} does not read it; leave it out")


def _lengths() -> list[int]:
    wrong = [text for text in FLAGS.lengths if not text.strip().isdigit() or int(text) < 1]
    if wrong:
        raise ValueError(f"--lengths={wrong[0]}: not a whole number of tokens")
    return [int(text) for text in FLAGS.lengths]


def _length() -> int | None:
    """For kinds that take one length: None takes the model's."""
    lengths = _lengths()
    if len(lengths) > 1:
        raise ValueError(f"--lengths={','.join(map(str, lengths))}: this evaluation takes one; run it again for others")
    return lengths[0] if lengths else None


def _run() -> None:
    if bool(FLAGS.tasks) + (FLAGS.own is not None) + FLAGS.inspect > 1:
        raise ValueError("give one of --tasks, --own and --inspect")
    kind = "--tasks" if FLAGS.tasks else "--inspect" if FLAGS.inspect else f"--own={FLAGS.own}" if FLAGS.own else "data"
    check_flags(FLAGS, kind)
    shared = {"step": FLAGS.step, "types": {"dtype": FLAGS.dtype, "implementation": FLAGS.implementation}}
    data = {"kind": FLAGS.data, "assignments": FLAGS.set}
    rows = {"batch_size": FLAGS.batch_size, "reading": FLAGS.reading or "streaming"}
    drawn = {"num_samples": FLAGS.num_samples, "seed": FLAGS.seed}
    if kind == "--tasks":
        _run_tasks(shared)
    elif kind == "--inspect":
        text = {"text": FLAGS.text, "tokenizer": FLAGS.tokenizer, "length": _length()}
        evaluations.inspect(FLAGS.checkpoint, FLAGS.output, **shared, **data, **text)
    elif FLAGS.own in ("positions", "bytes"):
        text = {"text": FLAGS.text, "tokenizer": FLAGS.tokenizer, "length": _length()}
        evaluations.evaluate_text(FLAGS.checkpoint, FLAGS.own, FLAGS.output, **shared, **text, **rows, **drawn)
    elif FLAGS.own:
        options = {"text": FLAGS.text, "tokenizer": FLAGS.tokenizer, "lengths": _lengths(), "depths": FLAGS.depths}
        evaluations.evaluate_own(
            FLAGS.checkpoint, FLAGS.own, FLAGS.output, **shared, **data, **options, **rows, **drawn
        )
    else:
        split = {"split": FLAGS.split, "batches": FLAGS.batches, "buckets": FLAGS.buckets}
        evaluations.evaluate_data(FLAGS.checkpoint, FLAGS.output, **shared, **data, **split, **rows)


def _run_tasks(shared: dict[str, Any]) -> None:
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
    names = ("include_path", "num_fewshot", "limit", "local_data", "seed", "log_samples")
    options = {name: getattr(FLAGS, name) for name in names}
    evaluations.evaluate_tasks(
        FLAGS.checkpoint,
        FLAGS.tasks,
        FLAGS.output,
        tokenizer=FLAGS.tokenizer,
        adapter=adapter,
        lengths=_lengths(),
        metadata=metadata,
        **shared,
        **options,
    )


def main(argv: list[str]) -> None:
    logging.set_verbosity(logging.ERROR)  # at lower levels orbax tells its whole life
    with said_in_one_line(argv):
        _run()


if __name__ == "__main__":
    define_flags()
    app.run(main)
