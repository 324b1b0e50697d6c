"""Tokenises a corpus into packed ArrayRecord shards, in parallel; run it again after a kill and it continues.

python -m experiments.prepare --path=corpus/ --out=shards/ --set tokenizer=tokenizer.json --set packing.length=4096
"""

from __future__ import annotations

import contextlib
import os

from absl import app, flags
from tqdm import tqdm

from experiments.paths import define_path
from experiments.warned import said_in_one_line
from lte_jax import configs, folder_lock
from lte_jax.data import DataError, corpus
from lte_jax.data.text import Text

FLAGS = flags.FLAGS


def define_flags() -> None:
    define_path("path", None, "Documents: a file, a folder or a glob (txt, jsonl, parquet, ArrayRecord).")
    define_path("out", None, "The folder of shards to write, or to continue.")
    flags.DEFINE_multi_string("set", [], "A setting of the text, such as packing.length=4096 or heldout=0.01.")
    flags.DEFINE_integer(
        "workers", os.cpu_count() or 1, "Processes; 0 works in this one. The shards do not depend on it."
    )
    flags.DEFINE_integer("part_mb", 64, "About how many MiB of text make a shard.")
    flags.mark_flags_as_required(["path", "out"])


def main(argv: list[str]) -> None:
    with said_in_one_line(argv):
        settings = configs.override(Text(path=FLAGS.path), FLAGS.set)
        plan = corpus.make_plan(settings, FLAGS.out, FLAGS.part_mb * 2**20)
        units = [unit for part in plan.parts for unit in part]
        size = sum(unit.size for unit in units) / 2**20
        print(f"{FLAGS.path}: {len({unit.path for unit in units}):,} files, {size:,.1f} MiB of text")
        with contextlib.closing(folder_lock.take(plan.folder, "--out", DataError)):
            done = sum(corpus.is_done(plan, number) for number in range(len(plan.parts)))
            with tqdm(total=len(plan.parts), initial=done, unit="part", desc="shards") as bar:
                for _ in corpus.write_parts(plan, FLAGS.workers):
                    bar.update()
            manifest = corpus.finish(plan)
    rows, tokens = manifest["rows"], manifest["tokens"]
    filled = sum(tokens.values()) / (sum(rows.values()) * manifest["length"])
    print(
        f"{FLAGS.out}: {rows['train']:,} training rows ({tokens['train']:,} tokens), {rows['heldout']:,} held-out rows "
        f"({tokens['heldout']:,} tokens), {filled:.1%} of the places filled"
    )


if __name__ == "__main__":
    define_flags()
    app.run(main)
