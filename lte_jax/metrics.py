"""What a run reports: JSON lines, a progress bar, tokens per second, and how much of the device's arithmetic is used.

    MFU = tokens/s * flops per token / (devices * peak flops of one)
    flops per token = 6 * (weights in matrix products) + 3 * (attention and recurrence, forward)

The factor 3 stands for a backward pass that costs two forward passes; recomputation does not count. Attention costs
4 H N flops per key that a query sees (2 for q k, 2 for the weighted sum of v), the delta rule 6 N V per value head.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from lte_jax.mixers import mixer_name
from lte_jax.model_config import ModelConfig
from lte_jax.profiling import Stopwatch
from lte_jax.whole_files import write_text

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "GH200": 989e12, "B200": 2250e12, "A100": 312e12}
"""Dense bfloat16 peak of one device, by a word in its name."""


def flops_per_token(config: ModelConfig, parameters: int, length: int) -> float:
    """Flops of one training token in rows of ``length`` tokens (see the formula above)."""
    lookup = 0 if config.tie_embeddings else config.vocab_size * config.width
    repeats = config.num_layers // len(config.pattern)
    mixing = repeats * sum(_mixing_flops(mixer, config.width, length) for mixer in config.pattern)
    return 6.0 * (parameters - lookup) + 3.0 * mixing


def _mixing_flops(mixer: Any, width: int, length: int) -> float:
    """Forward flops per token of one layer's mixing over time, without its projections."""
    name = mixer_name(mixer)
    if name == "gated_deltanet":
        return 6.0 * mixer.value_heads * mixer.head_dim * mixer.value_dim
    size = mixer.num_heads * (getattr(mixer, "head_dim", None) or width // mixer.num_heads)
    average = (length + 1) / 2
    seen = average
    if name == "window_attention":
        seen = _window_average(mixer.window, length)
    elif name == "lte":
        seen = min(average, _window_average(mixer.window + 1, length) + mixer.budget)
    elif name == "nsa":
        selected = min(average, mixer.block_counts * mixer.block_size)
        seen = average / mixer.block_size + selected + _window_average(mixer.window, length)
    return 4.0 * size * seen


def _window_average(window: int, length: int) -> float:
    """Keys that a query sees on average through a window that counts itself."""
    short = min(window, length)
    return (short * (short + 1) / 2 + (length - short) * window) / length


def peak_flops(device: jax.Device) -> float | None:
    """The device's bfloat16 peak, None where it is not known."""
    words = device.device_kind.replace("-", " ").upper().split()
    return next((flops for word, flops in PEAK_FLOPS.items() if word in words), None)


class Reporter:
    """Writes ``metrics.jsonl`` and the progress bar; does nothing but measure time on other processes.

    Args:
      tokens_per_step: of the global batch.
      flops: per token, for MFU.
      start: the step that the run continues from; lines of later steps are removed.
      watch: the host's clock by what it did, for "seconds".
    """

    def __init__(
        self,
        folder: Path,
        *,
        start: int,
        total: int,
        tokens_per_step: int,
        flops: float,
        every: int,
        watch: Stopwatch | None = None,
    ):
        self._watch = watch
        self.active = jax.process_index() == 0
        self._every, self._tokens, self._flops = every, tokens_per_step, flops
        self._peak = peak_flops(jax.devices()[0])
        self._mark: tuple[int, float] | None = None
        if not self.active:
            return
        self._path = folder / "metrics.jsonl"
        _keep_until(self._path, start)
        self._file = self._path.open("a")
        self._bar = _Bar(total=total, initial=start, unit="step", dynamic_ncols=True, mininterval=1.0)

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Counts one step; every so many, fetches and writes its numbers."""
        if self.active:
            self._bar.update(step - self._bar.n)
        if step % self._every and step != 1:
            return
        record = {name: _plain(value) for name, value in jax.device_get(dict(metrics)).items() if name != "interrupted"}
        record |= {"step": step, "tokens": step * self._tokens, **self._speed(step), **_memory()}
        self.write(record)
        if self.active:
            self._bar.set_postfix_str(_short(record), refresh=False)

    def _speed(self, step: int) -> dict[str, Any]:
        now = time.perf_counter()
        before, self._mark = self._mark, (step, now)
        fresh = before is None or before[0] == step
        parts = None if self._watch is None else self._watch.read(1 if fresh else step - before[0])  # type: ignore[index]
        if before is None or fresh:
            return {}  # the first interval holds the compilation
        rate = (step - before[0]) * self._tokens / (now - before[1])
        speed: dict[str, Any] = {
            "tokens_per_second": rate,
            "seconds_per_step": (now - before[1]) / (step - before[0]),
        }
        if parts is not None:
            speed["seconds"] = parts
        if self._peak is not None:
            speed["mfu"] = rate * self._flops / (jax.device_count() * self._peak)
        return speed

    def changed(self, step: int, settings: Mapping[str, tuple[Any, Any]]) -> None:
        """Writes which settings, name -> (before, after), the run has changed from this step on, once."""
        record = {"step": step, "changed": {name: list(values) for name, values in settings.items()}}
        if settings and self.active and record not in read_metrics(self._path.parent):
            self.write(record)
            for name, (before, after) in settings.items():
                self.say(f"from step {step} on: {name} {before} -> {after}")

    def pause(self) -> None:
        """Leaves what follows (evaluation, a save) out of the next interval."""
        self._mark = None

    def write(self, record: Mapping[str, Any]) -> None:
        if self.active:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self.active:
            tqdm.write(text)

    def close(self) -> None:
        if self.active:
            with contextlib.suppress(OSError):  # as in _Bar: it ends its line
                self._bar.close()
            self._file.close()


class _Bar(tqdm):
    """A bar that a full disk under the log does not make an error, which would hide the one that is to be said."""

    def display(self, *args: Any, **kwargs: Any) -> Any:
        with contextlib.suppress(OSError):
            return super().display(*args, **kwargs)
        return None


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The records of a run, oldest first; a line that a kill cut short is left out."""
    records = []
    path = Path(folder) / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def _keep_until(path: Path, step: int) -> None:
    if path.is_file():
        kept = [record for record in read_metrics(path.parent) if record["step"] <= step]
        write_text(path, "".join(json.dumps(record) + "\n" for record in kept))


def _plain(value: Any) -> Any:
    array = np.asarray(value)
    if array.ndim == 0:
        number = array.item()
        return number if not isinstance(number, float) or math.isfinite(number) else str(number)
    return array.tolist()


def _memory() -> dict[str, int]:
    stats = jax.local_devices()[0].memory_stats()
    return {"peak_bytes": stats["peak_bytes_in_use"]} if stats and "peak_bytes_in_use" in stats else {}


def _short(record: Mapping[str, Any]) -> str:
    parts = [f"loss {record['loss']:.3f}" if isinstance(record["loss"], float) else f"loss {record['loss']}"]
    if "tokens_per_second" in record:
        parts.append(f"{record['tokens_per_second']:,.0f} tokens/s")
    if "mfu" in record:
        parts.append(f"MFU {record['mfu']:.0%}")
    if "kept" in record:
        kept = np.asarray(record["kept"])
        parts.append(f"kept {kept.min():.0f}..{kept.mean():.0f}..{kept.max():.0f}")
    if record.get("skipped"):
        parts.append(f"skipped {record['skipped']}")
    return ", ".join(parts)
