"""How is the cost of whole models written down? Lines of JSON, one a case, and a page with tables and pictures of them.

Lines come from several runs; the newest of a case counts. The page keeps what people wrote around the tables.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments.benchmarks import report
from experiments.benchmarks.models import check_lines
from lte_jax.whole_files import write_text

TITLE = "What inference costs"
LEGEND = """Random weights, bfloat16, greedy. *prompt*: read in chunks of 4096 tokens of each row, compiled before;
"(4 of 32)" means that so many chunks, spread over the prompt, were timed and that their mean counts for all. *token*:
one step of the compiled loop for the whole batch, median of three calls; for a batch the cache of one sequence is
repeated. *memory*: the compiler's plan of the larger of the two programs (arguments, results, temporaries), for torch
the allocator's peak. *cache*: of all rows, as it lies between two calls. A dash: not measured."""
Line = dict[str, Any]


def read_lines(path: str | Path) -> list[Line]:
    """The JSON lines of a file; other lines (a log's) are left out.

    Raises:
      ValueError: there is no such file, or no line of a model's cost in it.
    """
    if not Path(path).is_file():
        raise ValueError(f"--lines={path}: no such file")
    found = [json.loads(line) for line in Path(path).read_text().splitlines() if line.startswith("{")]
    found = [line for line in found if {"who", "model", "size", "length", "batch"} <= set(line)]
    if not found:
        raise ValueError(f"--lines={path}: it holds no line of a model's cost")
    return found


def write(lines: Sequence[Line], folder: str | Path) -> list[Path]:
    """Adds lines to ``inference_cost.jsonl`` and makes ``inference_cost.md`` and its pictures anew."""
    folder = Path(folder)
    store = folder / "inference_cost.jsonl"
    old = read_lines(store) if store.exists() else []
    merged = check_lines([*old, *lines])
    write_text(store, "".join(json.dumps(line) + "\n" for line in merged))
    pictures = [_picture(merged, size, folder) for size in dict.fromkeys(line["size"] for line in merged)]
    page = folder / "inference_cost.md"
    shown = "\n".join(f"![{path.stem}]({path.name})" for path in pictures)
    report.write_page(page, TITLE, LEGEND, f"{table(merged)}\n\n{shown}\n")
    return [store, page, *pictures]


def table(lines: Sequence[Line]) -> str:
    """Markdown: a section for each size and batch, a row for each model and length."""
    parts = []
    for size, batch in dict.fromkeys((line["size"], line["batch"]) for line in lines):
        chosen = [line for line in lines if (line["size"], line["batch"]) == (size, batch)]
        parts.append(f"### {size}, batch {batch}\n")
        parts.append(
            "| model | tokens before | prompt | token | tokens/s | memory | cache | run |\n" + "|---" * 8 + "|"
        )
        parts += [_row(line) for line in chosen]
        parts.append("")
    return "\n".join(parts)


def _row(line: Line) -> str:
    prompt = "-" if "prompt" not in line else _seconds(line["prompt"])
    chunks, timed = line.get("chunks"), line.get("timed_chunks")
    if timed is not None and timed != chunks:
        prompt += f" ({timed} of {chunks})"
    if "prompt_missing" in line:
        prompt = line["prompt_missing"]
    token = line.get("token")
    rate = "-" if token is None else f"{line['batch'] / token:,.0f}"
    memory = max(line.get("prompt_bytes", 0), line.get("token_bytes", 0))
    name = line["model"] if line["who"] == "ours" else f"{line['model']}, {line['who']}"
    cells = [
        name,
        f"{line['length']:,}",
        prompt,
        line.get("missing", "-") if token is None else f"{token * 1e3:.2f} ms",
        rate,
        _gib(memory),
        _gib(line.get("cache_bytes", 0)),
        line.get("run", ""),
    ]
    return "| " + " | ".join(cells) + " |"


def _seconds(value: float) -> str:
    return f"{value * 1e3:.0f} ms" if value < 1 else f"{value:.2f} s"


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size else "-"


def _picture(lines: Iterable[Line], size: str, folder: Path) -> Path:
    """Prompt time, time per token and memory over the tokens before: a row of panels for batches of several models."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [line for line in lines if line["size"] == size]
    models = list(dict.fromkeys(line["model"] for line in lines))
    batches = sorted({line["batch"] for line in lines})
    several = [b for b in batches if len({line["model"] for line in lines if line["batch"] == b}) > 1]
    batches = several or batches
    figure, axes = plt.subplots(len(batches), 3, figsize=(13, 3.4 * len(batches)), squeeze=False)
    panels = (
        ("prompt (s)", lambda line: line.get("prompt")),
        ("time per token (ms)", lambda line: None if line.get("token") is None else line["token"] * 1e3),
        ("memory (GiB)", lambda line: max(line.get("prompt_bytes", 0), line.get("token_bytes", 0)) / 2**30 or None),
    )
    names = dict.fromkeys((line["model"], line["who"]) for line in lines)
    for row, batch in zip(axes, batches, strict=True):
        for axis, (label, value) in zip(row, panels, strict=True):
            for model, who in names:
                mine = [x for x in lines if (x["model"], x["who"], x["batch"]) == (model, who, batch)]
                points = [(x["length"], value(x)) for x in mine if value(x) is not None]
                if points:
                    style, name = ("o-", model) if who == "ours" else ("x", f"{model}, {who}")
                    colour = f"C{models.index(model)}"  # the same in every panel, whoever is in it
                    axis.plot(*zip(*sorted(points), strict=True), style, color=colour, label=name, markersize=4)
            axis.set(xscale="log", yscale="log", xlabel="tokens before", ylabel=label, title=f"batch {batch}")
    found = {name: handle for axis in axes.flat for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(found.values(), found.keys(), loc="upper right", ncols=len(found), fontsize=8)
    figure.suptitle(size, x=0.02, ha="left")
    figure.tight_layout()
    path = folder / f"inference_cost_{size}.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
