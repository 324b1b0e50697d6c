"""Trains a model: ``python -m experiments.train --config=quickstart --workdir=runs/quickstart``.

Settings are changed with ``--set steps=500 --set optimizer.learning_rate=1e-3``; the resolved ones are printed and
saved in the workdir. The same command continues a run that was stopped. Exit codes: 0 finished, 1 an error (one line),
75 stopped by SIGTERM, SIGUSR1 or Ctrl-C with everything saved. ``experiments.launch`` starts it on many GPUs.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import app, flags, logging

from experiments.paths import define_path

if TYPE_CHECKING:
    from experiments.suite import Suite

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("config", None, "A file in experiments/configs, without .py.")
    define_path("workdir", None, "The folder of the run: made, or continued.")
    flags.DEFINE_multi_string("set", [], "A setting: a.b=value. May be repeated.")
    define_path("init_from", None, "Start from the weights of a run's folder or of a Hugging Face folder.")
    flags.DEFINE_multi_string(
        "allow_change",
        [],
        "A setting that a run may change when it goes on: of the optimizer, or data.path where the data were moved. "
        "May be repeated.",
    )
    flags.DEFINE_string("profile", None, "START:STEPS writes a trace of these steps into workdir/profile.")
    flags.DEFINE_bool("deterministic", False, "On a GPU: the same bits at every run, somewhat slower.")
    flags.DEFINE_bool("distributed", False, "Join the other processes of this launch (SLURM and Open MPI are found).")
    flags.DEFINE_string("coordinator", None, "host:port of process 0, where the launcher is neither of these.")
    flags.DEFINE_integer("num_processes", None, "How many processes, with --coordinator.")
    flags.DEFINE_integer("process_id", None, "Which one this is, with --coordinator.")
    flags.DEFINE_integer("heartbeat_seconds", 60, "The processes end when one has been silent for so long.", 1)
    define_path(
        "compilation_cache", "~/.cache/lte_jax/xla", "Folder of compiled programs, kept between runs; empty for none."
    )
    flags.mark_flags_as_required(["config", "workdir"])


def main(argv: list[str]) -> None:
    try:
        if len(argv) > 1:
            raise ValueError(f"{argv[1]!r}: no such argument; settings are given as --set name=value")
        _prepare()
        finished = _train()
    except Exception as error:
        from lte_jax.bad_steps import TrainingError
        from lte_jax.checkpoint import CheckpointError

        if not isinstance(error, (ValueError, OSError, CheckpointError, TrainingError)):
            _leave(traceback.format_exc())
            raise
        _leave(f"error: {error}")
        sys.exit(f"error: {error}")
    if not finished:
        from lte_jax.train import INTERRUPTED

        sys.exit(INTERRUPTED)


def _leave(text: str) -> None:
    """Ends this process of several at once: an orderly exit waits for the others, which wait for this one."""
    import jax

    if jax.distributed.is_initialized():
        try:
            print(text, file=sys.stderr, flush=True)
            sys.stdout.flush()
        finally:  # also where the disk of the log is full
            os._exit(1)


def _prepare() -> None:
    """What must be set before jax sees a device."""
    if not FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    if FLAGS.deterministic:
        # No atomic sums and no autotuning by measurement; the Triton kernels have neither.
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_deterministic_ops=true"
    import jax

    from lte_jax import processes

    if FLAGS.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", FLAGS.compilation_cache)
    if FLAGS.distributed or FLAGS.coordinator or FLAGS.num_processes or FLAGS.process_id is not None:
        processes.join(
            FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id, heartbeat_seconds=FLAGS.heartbeat_seconds
        )


def _train() -> bool:
    import jax

    from experiments.suite import Suite
    from lte_jax import configs, runs
    from lte_jax.train import train

    config = configs.load_named("experiments.configs", FLAGS.config)
    config = config.override(FLAGS.set) if isinstance(config, Suite) else configs.override(config, FLAGS.set)
    workdir = Path(FLAGS.workdir)
    wanted = {workdir / run.name: run for run in config.runs} if isinstance(config, Suite) else {workdir: config}
    for folder, run in wanted.items():  # before the settings are printed, which are long
        runs.check_free(folder, configs.to_dict(run), FLAGS.allow_change)
    if jax.process_index() == 0:
        print(configs.to_json(config))
    options: dict[str, Any] = {"profile": _profile(FLAGS.profile), "init_from": FLAGS.init_from}
    options["allow_change"] = FLAGS.allow_change
    if not isinstance(config, Suite):
        return train(config, workdir, **options).finished
    return _train_all(config, workdir, options)


def _train_all(suite: Suite, workdir: Path, options: dict[str, Any]) -> bool:
    """Trains and compares the runs of a suite; whether all is done."""
    from experiments.suite import compare
    from lte_jax import train

    for run in suite.runs:
        result = train.train(run, workdir / run.name, **options)
        if not result.finished or result.interrupted:  # a signal in a run's last save leaves the others to be done
            return False
    print(compare(suite, workdir))
    return True


def _profile(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    start, colon, count = text.partition(":")
    if not (colon and start.isdigit() and count.isdigit() and int(start) >= 1 and int(count) >= 1):
        raise ValueError(f"--profile={text}: write START:STEPS, such as 20:5")
    return int(start), int(count)


if __name__ == "__main__":
    define_flags()
    app.run(main)
