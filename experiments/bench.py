"""Times the kernels, and whole models, beside what others offer, all in one run.

python -m experiments.bench --operation=gated_delta_rule --implementations=triton,xla --peers=fla,jax_linear_attention
python -m experiments.bench --operation=window_attention --shapes='prompt*' --peers=cudnn,authors --authors_path=DIR
python -m experiments.bench --model=lalte,gdn_attn --lengths=4096,131072 --batches=1,16 --json=cost.jsonl
python -m experiments.bench --lines=cost.jsonl

Sides take turns; times are medians. "device" is the time in which the device ran the call's kernels, from one trace
that holds JAX and torch alike; "calls" is many calls over one synchronisation (CUDA events for torch, the host's clock
for JAX). The copy bandwidth of the same turn gives the floor. Errors are root-mean-square ratios against float32.

Results are written only with --write, for a GPU, and only of operations whose GPU tests are green for this very code:
run ``pytest -m gpu -n 0 --record_gpu_tests tests/kernels/test_OPERATION.py`` before. Without a GPU tiny shapes run
with xla, which shows that the program works and nothing else.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from absl import app, flags

FLAGS = flags.FLAGS
LEGEND = """Milliseconds, medians of one run in which all sides took turns. *device*: the time in which the device ran
kernels of the call, from one profiler trace of JAX and torch alike. *calls*: many calls over one synchronisation (CUDA
events for torch, the host's clock for JAX), which shows launches too. *x fastest peer*: ours over the fastest peer that
computes the same. *x floor*: over the bytes that must move at the copy bandwidth of the same turn. *error*: the worst
root-mean-square error ratio of output and gradients against float32."""


def define_flags() -> None:
    flags.DEFINE_list(
        "model", [], "Whole models with random weights: gdn, gdn_swa, lalte, lansa, gdn_attn, transformer."
    )
    flags.DEFINE_list("sizes", None, "For --model: 0.4B, 1.4B; default 0.4B, and tiny without a GPU.")
    flags.DEFINE_list("lengths", None, "For --model: tokens before; default 4096,16384,65536,131072.")
    flags.DEFINE_list("batches", ["1", "16"], "For --model: rows at a time.")
    flags.DEFINE_bool("prompts", True, "For --model: time the prompts of batches too.")
    flags.DEFINE_string(
        "turns",
        None,
        "For --model: a file; programs that share it compile at once, and measure in turn while none compiles.",
    )
    flags.DEFINE_string("lines", None, "Time nothing: put the lines that --model --json wrote into --results.")
    flags.DEFINE_string("operation", None, "A folder of pallas_kernels: gated_delta_rule, ...")
    flags.DEFINE_list("shapes", [], "Names of cases, * for anything; default all. --list shows them.")
    flags.DEFINE_bool("list", False, "Show the names of the operation's cases and stop.")
    flags.DEFINE_list("implementations", None, "Of ours; default triton and xla on a GPU, xla elsewhere.")
    flags.DEFINE_list("peers", [], "fla, jax_linear_attention, cudnn, torch, flex, authors.")
    flags.DEFINE_string("authors_path", None, "A checkout of the authors' repository, for --peers=authors.")
    flags.DEFINE_bool("tiny", None, "Tiny shapes; default where there is no GPU.")
    flags.DEFINE_bool("errors", True, "Compare outputs and gradients with float32.")
    flags.DEFINE_integer("rounds", 5, "Turns that each side has.")
    flags.DEFINE_string(
        "lock",
        None,
        "A file to hold while timing: several processes then compile side by side, and also while another times.",
    )
    flags.DEFINE_bool("write", False, "Write JSON and page into --results.")
    flags.DEFINE_string(
        "json",
        None,
        "Also write this run's rows into this file, for --merge (of --model: add lines, for --lines, and leave out the "
        "cases that it holds, so that a killed run goes on).",
    )
    flags.DEFINE_string("merge", None, "Time nothing: put the rows of a file written by --json into --results.")
    flags.DEFINE_bool(
        "unverified",
        False,
        "Time kernels whose tests are not green; nothing can be written then, and --merge takes the rows only once the "
        "tests of the very same code are green.",
    )
    flags.DEFINE_string("results", "experiments/results", "The folder of the pages, and of gpu_tests.json.")
    flags.DEFINE_string("commit", None, "The commit, for a copy of the project without its repository.")


def main(argv: list[str]) -> None:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory beside jax
    try:
        if len(argv) > 1:
            raise ValueError(f"{argv[1]!r}: no such argument")
        chosen = [name for name in ("operation", "merge", "model", "lines") if FLAGS[name].value]
        if len(chosen) != 1:
            raise ValueError("give one of --operation, --model, --merge and --lines")
        {"operation": _operation, "merge": _merge, "model": _models, "lines": _lines}[chosen[0]]()
    except ValueError as error:
        sys.exit(f"error: {error}")


def _operation() -> None:
    import jax

    from experiments.benchmarks import gate, operations, report
    from experiments.benchmarks.cases import Options
    from experiments.benchmarks.peers import PEERS

    gpu = jax.default_backend() == "gpu"
    tiny = not gpu if FLAGS.tiny is None else FLAGS.tiny
    if FLAGS.list:
        for case in operations.cases(FLAGS.operation, tiny):
            print(f"{case.name}: {case.shape}, {case.dtype}")
        return
    unknown = [name for name in FLAGS.peers if name not in PEERS]
    if unknown:
        raise ValueError(f"--peers={unknown[0]}: there is {', '.join(PEERS)}")
    implementations = FLAGS.implementations or (["triton", "xla"] if gpu else ["xla"])
    folder = Path(FLAGS.results)
    if FLAGS.write and (FLAGS.unverified or tiny):
        raise ValueError("--write is for real shapes of verified kernels: drop --unverified and --tiny")
    tests = None
    if set(implementations) != {"xla"} and not FLAGS.unverified:
        try:
            tests = gate.require_green(FLAGS.operation, folder / gate.RECORD.name)
        except gate.TestsRed as red:
            sys.exit(f"refused: {red}; --unverified shows times without writing them")
    rows = operations.run(
        FLAGS.operation,
        FLAGS.shapes,
        implementations,
        FLAGS.peers,
        tiny=tiny,
        options=Options(FLAGS.authors_path),
        errors=FLAGS.errors,
        rounds=FLAGS.rounds,
        say=lambda line: print(line, flush=True),
        copy_bytes=2**20 if tiny else 2**29,
        lock=FLAGS.lock,
    )
    about = report.environment(FLAGS.commit or gate.commit())
    about |= dict(tests=tests, verified=not FLAGS.unverified, digest=gate.digest(FLAGS.operation))
    rows = [{**row, "run": about} for row in rows]
    print(json.dumps(about))
    if FLAGS.json:
        Path(FLAGS.json).write_text(json.dumps({"operation": FLAGS.operation, "rows": rows}) + "\n")
    if FLAGS.write:
        _write(FLAGS.operation, rows)


def _models() -> None:
    import jax

    from experiments.benchmarks import gate, report
    from experiments.benchmarks.models import LENGTHS, Bench, Plan

    gpu = jax.default_backend() == "gpu"
    tiny = not gpu if FLAGS.tiny is None else FLAGS.tiny
    sizes = FLAGS.sizes or (["tiny"] if tiny else ["0.4B"])
    lengths = _numbers("lengths") if FLAGS.lengths else ((32, 64) if tiny else LENGTHS)
    small = {"chunk": 16, "steps": 4} if tiny else {}
    implementation = FLAGS.implementations[0] if FLAGS.implementations else None
    old = [line for line in _written() if line["who"] == "ours"]
    plans = [
        Plan(
            name,
            size,
            lengths,
            _numbers("batches"),
            prompts=FLAGS.prompts,
            implementation=implementation,
            done=frozenset((x["length"], x["batch"]) for x in old if (x["model"], x["size"]) == (name, size)),
            **small,
        )
        for size in sizes
        for name in FLAGS.model
    ]
    about = report.environment(FLAGS.commit or gate.commit())
    run = f"{about['hardware']}, {about['date'][:10]}, {about['commit']}"
    for plan in plans:
        if not plan.cases():
            continue
        bench = Bench(plan)
        with _turn(FLAGS.turns, fcntl.LOCK_SH):  # the compiler tries products on the GPU: nobody measures meanwhile
            bench.compile()
            bench.allocate()
        with _turn(FLAGS.turns, fcntl.LOCK_EX), _turn(FLAGS.lock, fcntl.LOCK_EX):
            for row in bench.rows():
                line = json.dumps({**row, "run": run})
                print(line, flush=True)
                if FLAGS.json:
                    with Path(FLAGS.json).open("a") as file:
                        file.write(line + "\n")
            del bench


def _written() -> list[dict]:
    """The lines of --json, if it is there."""
    from experiments.benchmarks import model_page

    there = FLAGS.json is not None and Path(FLAGS.json).is_file() and Path(FLAGS.json).read_text()
    return model_page.read_lines(FLAGS.json) if there else []


@contextlib.contextmanager
def _turn(path: str | None, kind: int) -> Iterator[None]:
    """Holds a lock on the file, with others (LOCK_SH) or alone (LOCK_EX)."""
    if path is None:
        yield
        return
    with Path(path).open("a") as file:
        fcntl.flock(file, kind)
        yield


def _numbers(flag: str) -> tuple[int, ...]:
    given: list[str] = getattr(FLAGS, flag)
    try:
        return tuple(int(value) for value in given)
    except ValueError:
        raise ValueError(f"--{flag}={','.join(given)}: not whole numbers") from None


def _lines() -> None:
    from experiments.benchmarks import model_page

    lines = model_page.read_lines(FLAGS.lines)
    if any(line["size"] == "tiny" for line in lines):
        raise ValueError(f"--lines={FLAGS.lines}: it holds tiny models, which no page shows")
    print(", ".join(map(str, model_page.write(lines, FLAGS.results))))


def _merge() -> None:
    from experiments.benchmarks import gate

    found = json.loads(Path(FLAGS.merge).read_text())
    try:
        rows = gate.verified(found["operation"], found["rows"], Path(FLAGS.results) / gate.RECORD.name)
    except gate.TestsRed as red:
        sys.exit(f"refused: {red}")
    _write(found["operation"], rows)


def _write(operation: str, rows: list[dict]) -> None:
    from experiments.benchmarks import report

    path = Path(FLAGS.results) / f"{operation}.json"
    merged = report.merge(path, rows)
    report.write_page(path.with_suffix(".md"), operation, LEGEND, report.table(merged))


if __name__ == "__main__":
    define_flags()
    app.run(main)
