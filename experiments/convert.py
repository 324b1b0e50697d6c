"""Turns a Hugging Face folder of the authors' format into a checkpoint, and a checkpoint into such a folder.

python -m experiments.convert --source=lalte-1.4b --check
python -m experiments.convert --source=lalte-1.4b --target=runs/lalte
python -m experiments.convert --source=runs/lalte --target=exported

Weights, settings, tokenizer and LTE's penalty (its schedule, weights and counts of kept tokens) travel both ways. The
optimiser's state, the data's position, and the penalty's counters of steps and updates do not: the authors' folder has
no place for them.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from typing import Any

from absl import app, flags, logging

from experiments.paths import define_path
from experiments.warned import said_in_one_line
from lte_jax import restore
from lte_jax.convert import save_pretrained
from lte_jax.data.tokenizer import load_tokenizer
from lte_jax.evaluate.inventory import describe, inventory

FLAGS = flags.FLAGS


def define_flags() -> None:
    define_path("source", None, "A Hugging Face folder, or a training run's folder, to read.")
    define_path("target", None, "The folder to write: of the other format than the source; new or empty.")
    flags.DEFINE_integer("step", None, "Which checkpoint of a run; default the newest.")
    define_path("tokenizer", None, "'bytes', a tokenizer.json or its folder, in place of the source's own.")
    flags.DEFINE_bool("check", False, "Only print which weights match and what memory is needed; reads no weights.")
    flags.mark_flag_as_required("source")


def check(source: str, step: int | None = None) -> bool:
    """Prints how the source's weights meet its settings; whether all match."""
    found = inventory(source, step)
    print(describe(found))
    return found.matches


def convert(source: str, target: str, step: int | None = None, tokenizer: str | None = None) -> None:
    """Reads one format and writes the other."""
    model, found = restore.load_model(source, step=step)
    if tokenizer is not None:
        found = load_tokenizer(tokenizer)
    penalty = restore.load_penalty(source, step)
    if penalty is not None:
        print(
            f"penalty: schedule, weights (up to {penalty.weights.max():.3g}) and kept tokens (up to "
            f"{penalty.kept.max():.4g}) go along; how many steps and updates it has seen does not"
        )
    if restore.find(source).checkpoints is None:
        restore.save_model(model, target, tokenizer=found, penalty=penalty)
        print(f"{target}: a checkpoint, for --init_from, experiments.generate and experiments.evaluate")
        return
    with tempfile.TemporaryDirectory() as folder:
        if found is not None:
            found.save(folder)
            # Their generation begins and ends by the config's numbers, which nothing here reads.
            ids = {"bos_token_id": found.bos_id, "eos_token_id": found.eos_id}
            known: dict[str, Any] = {name: number for name, number in ids.items() if number is not None}
            model.config = dataclasses.replace(model.config, **known)
        save_pretrained(model, target, tokenizer_folder=folder, penalty=penalty)
    print(f"{target}: a Hugging Face folder of the authors' format")


def main(argv: list[str]) -> None:
    logging.set_verbosity(logging.ERROR)  # at lower levels orbax tells its whole life
    with said_in_one_line(argv):
        if FLAGS.check:
            sys.exit(0 if check(FLAGS.source, FLAGS.step) else 1)
        if not FLAGS.target:
            raise ValueError("--target is missing: name the folder to write, or say --check")
        convert(FLAGS.source, FLAGS.target, FLAGS.step, FLAGS.tokenizer)


if __name__ == "__main__":
    define_flags()
    app.run(main)
