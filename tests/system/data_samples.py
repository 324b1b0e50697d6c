"""Which small corpora do the data tests share?"""

import json

import numpy as np

from lte_jax import data
from lte_jax.data import pipeline

WORDS = ["alpha", "naïve", "日本語", "😀👩‍👩‍👧", "tab\tline\n", "x" * 40, "Ω≈ç√"]


def documents(count, seed=0):
    rng = np.random.default_rng(seed)
    return [f"{number}: " + " ".join(rng.choice(WORDS, rng.integers(1, 30))) for number in range(count)]


def write_jsonl(path, texts, field="text"):
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts), encoding="utf-8")
    return path


def small_text(folder):
    """A corpus of 120 documents as one jsonl file."""
    path = write_jsonl(folder / "a.jsonl", documents(120))
    return data.Text(path=str(path), packing=data.Packing(64), heldout=0.2)


def same(left, right):
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


def batches(count, rows, size, **options):
    source = pipeline.Batches(rows, size, **options)
    found = [next(source) for _ in range(count)]
    source.close()
    return found
