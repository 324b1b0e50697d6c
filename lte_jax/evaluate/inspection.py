"""How is what an LTE model keeps shown: four pictures, and one page in which the text can be looked through by head?"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from lte_jax.evaluate.probe import MASSES, Found

PICTURES = {
    "kept": "Which tokens each head holds at the end of the text",
    "counts": "Slots filled at the end, by layer and head",
    "lives": "How long tokens live",
    "mass": "Where attention falls",
}


def write(found: Found, folder: str | Path, title: str, pieces: Sequence[str]) -> list[Path]:
    """Writes ``kept.png``, ``counts.png``, ``lives.png``, ``mass.png``, ``inspect.json`` and ``index.html``.

    Args:
      pieces: the text of each token.
    """
    matplotlib.use("Agg")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, draw in (("kept", _kept), ("counts", _counts), ("lives", _lives), ("mass", _mass)):
        paths.append(folder / f"{name}.png")
        figure = draw(found)
        figure.tight_layout()
        figure.savefig(paths[-1], dpi=110)
        matplotlib.pyplot.close(figure)
    paths.append(folder / "inspect.json")
    paths[-1].write_text(json.dumps(summary(found), indent=1) + "\n")
    paths.append(folder / "index.html")
    paths[-1].write_text(_page(found, title, pieces, folder), encoding="utf-8")
    return paths


def summary(found: Found) -> dict[str, Any]:
    """The numbers behind the pictures, by layer and head."""
    lives, tokens = found.lives, len(found.tokens)
    layers = []
    for row, layer in enumerate(found.layers):
        beyond = np.arange(tokens) < tokens - 1 - found.window[row]
        layers.append(
            {
                "layer": layer,
                "window": found.window[row],
                "budget": found.budget[row],
                "sinks": found.sinks[row],
                "held": found.counts[row].tolist(),
                "stayed_beyond_window": (lives[row][beyond] > found.window[row]).mean(0).round(5).tolist(),
                "mass": {name: found.mass[row][:, part].round(5).tolist() for part, name in enumerate(MASSES)},
            }
        )
    return {"tokens": tokens, "layers": layers}


def table(found: Found) -> str:
    """The same as text: a line for each layer, averaged over heads."""
    lines = [f"{'layer':>6}{'held':>10}{'of':>6}" + "".join(f"{name:>10}" for name in MASSES) + "   (attention mass)"]
    for row, layer in enumerate(found.layers):
        mass = "".join(f"{value:10.3f}" for value in found.mass[row].mean(0))
        lines.append(f"{layer:>6}{found.counts[row].mean():>10.1f}{found.budget[row]:>6}{mass}")
    return "\n".join(lines)


def _axes(found: Found, height: float, width: float = 10.0) -> tuple[Any, Any]:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(found.layers), 1, figsize=(width, height * len(found.layers) + 0.8), squeeze=False)
    return figure, axes[:, 0]


def _kept(found: Found) -> Any:
    heads = found.held.shape[2]
    figure, axes = _axes(found, 0.5 + 0.16 * heads)
    for row, axis in enumerate(axes):
        limit = float(np.abs(found.scores[row]).max()) or 1.0
        image = axis.imshow(
            found.scores[row].T, aspect="auto", cmap="coolwarm", vmin=-limit, vmax=limit, interpolation="nearest"
        )
        token, head = np.nonzero(found.held[row])
        axis.plot(token, head, "k.", markersize=3)
        axis.axvline(len(found.tokens) - 1 - found.window[row] - 0.5, color="green", linewidth=1)
        axis.set_ylabel(f"layer {found.layers[row]}\nhead")
        axis.set_yticks(range(heads))
        figure.colorbar(image, ax=axis, label="score")
    axes[-1].set_xlabel("token (dot: held at the end; right of the line: in the window)")
    return figure


def _counts(found: Found) -> Any:
    import matplotlib.pyplot as plt

    counts = found.counts
    figure, axis = plt.subplots(figsize=(2 + 0.5 * counts.shape[1], 1.5 + 0.4 * counts.shape[0]))
    image = axis.imshow(counts, aspect="auto", cmap="viridis", vmin=0, vmax=max(found.budget))
    for (row, head), count in np.ndenumerate(counts):
        color = "black" if count > max(found.budget) / 2 else "white"
        axis.text(head, row, str(count), ha="center", va="center", color=color, fontsize=7)
    axis.set_xticks(range(counts.shape[1]))
    axis.set_yticks(range(len(found.layers)), [str(layer) for layer in found.layers])
    axis.set(xlabel="head", ylabel="layer")
    figure.colorbar(image, ax=axis, label="slots filled")
    return figure


def _lives(found: Found) -> Any:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4))
    for row, layer in enumerate(found.layers):
        axis.plot(found.alive(row), label=f"layer {layer}", linewidth=1)
    axis.axvline(found.window[0], color="gray", linestyle=":", label="window")
    axis.set(xlabel="tokens after the token", ylabel="share still seen (all heads)", ylim=(0, 1.02))
    axis.legend(fontsize=7, ncols=2)
    return figure


def _mass(found: Found) -> Any:
    heads = found.mass.shape[1]
    figure, axes = _axes(found, 1.6)
    for row, axis in enumerate(axes):
        bottom = np.zeros(heads)
        for part, name in enumerate(MASSES):
            values = np.nan_to_num(found.mass[row][:, part])
            axis.bar(range(heads), values, bottom=bottom, label=name)
            bottom += values
        axis.set(ylim=(0, 1), ylabel=f"layer {found.layers[row]}")
    axes[0].legend(fontsize=7, ncols=3)
    axes[-1].set_xlabel("query head (queries that have a past beyond their window)")
    return figure


def _page(found: Found, title: str, pieces: Sequence[str], folder: Path) -> str:
    """One file that needs no other: pictures inside, and the text coloured by what a head keeps."""
    figures = []
    for name, caption in PICTURES.items():
        data = base64.b64encode((folder / f"{name}.png").read_bytes()).decode()
        figures.append(f'<h2>{caption}</h2>\n<img alt="{caption}" src="data:image/png;base64,{data}">')
    lives = found.lives
    heads = []
    for row, layer in enumerate(found.layers):
        for head in range(lives.shape[2]):
            stayed = np.flatnonzero(lives[row, :, head] > found.window[row])
            held = set(np.flatnonzero(found.held[row, :, head]).tolist())
            heads.append(
                {
                    "name": f"layer {layer}, head {head}",
                    "life": {int(at): [int(lives[row, at, head]), int(at in held)] for at in stayed},
                }
            )
    data = json.dumps({"pieces": list(pieces), "heads": heads}, ensure_ascii=False).replace("</", "<\\/")
    return _TEMPLATE.format(
        title=html.escape(title), figures="\n".join(figures), data=data, table=html.escape(table(found))
    )


_TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font-family: sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em; }}
img {{ max-width: 100%; }}
#text {{ font-family: monospace; white-space: pre-wrap; line-height: 1.6; border: 1px solid #ccc; padding: 1em; }}
.stayed {{ background: #ffe9b0; }}
.held {{ background: #f2a65a; }}
</style></head><body>
<h1>{title}</h1>
<pre>{table}</pre>
<h2>The text, by head</h2>
<p><select id="head"></select>
<span class="held">held at the end</span> <span class="stayed">stayed beyond the window for a while</span>;
point at a token to see for how many tokens it was seen.</p>
<div id="text"></div>
{figures}
<script>
const found = {data};
const choice = document.getElementById("head"), text = document.getElementById("text");
const all = {{name: "all heads: held by any", life: {{}}}};
for (const head of found.heads)
  for (const [at, [life, held]] of Object.entries(head.life)) {{
    const old = all.life[at] || [0, 0];
    all.life[at] = [Math.max(old[0], life), Math.max(old[1], held)];
  }}
const heads = [all, ...found.heads];
heads.forEach((head, index) => choice.add(new Option(head.name, index)));
const spans = found.pieces.map((piece, at) => {{
  const span = document.createElement("span");
  span.textContent = piece;
  text.append(span);
  return span;
}});
function show() {{
  const life = heads[choice.value].life;
  spans.forEach((span, at) => {{
    span.className = life[at] ? (life[at][1] ? "held" : "stayed") : "";
    span.title = life[at] ? `token ${{at}}: seen for ${{life[at][0]}} tokens` : `token ${{at}}`;
  }});
}}
choice.onchange = show;
show();
</script></body></html>
"""
