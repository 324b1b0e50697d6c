"""How does a large corpus become shards of packed rows, in parallel, so that a kill costs at most the parts in work?

The corpus is cut into parts (consecutive units of about ``part_bytes`` of text). Each part is tokenised, split and
packed by itself into at most one training and one held-out shard, so the shards do not depend on the number of workers
or on restarts. ``plan.json`` is written first, ``parts/NNNNN.json`` after the shards of a part, ``manifest.json``
last; every file appears whole, by a rename.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lte_jax.data.packing import DataError
from lte_jax.data.pipeline import exit_with_parent
from lte_jax.data.shards import FORMAT, MANIFEST, Shard, check_shard, write_shard
from lte_jax.data.sources import Unit, find_units, read_documents
from lte_jax.data.tasks import SPLITS, Split
from lte_jax.data.text import Text, padding_id
from lte_jax.data.tokenizer import load_tokenizer
from lte_jax.whole_files import partial_of, write_json

PLAN = "plan.json"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is written into ``folder``: the settings, and the units of each part."""

    settings: Text
    folder: Path
    parts: tuple[tuple[Unit, ...], ...]


def make_plan(settings: Text, folder: str | Path, part_bytes: int = 64 * 2**20) -> Plan:
    """Plans the shards and records the plan, or finds that it is the one recorded there.

    Raises:
      DataError: for bad settings or data, a split that would be empty, or a folder that holds something else or
        another plan.
    """
    settings.check()
    if part_bytes < 1:
        raise DataError(f"part_bytes={part_bytes}: a part holds at least 1 byte; raise it")
    if settings.heldout and settings.heldout_by != "document":
        raise DataError(
            "heldout_by='row': shards hold out whole documents; set heldout_by=document, or heldout=0 here and the "
            "fraction where the shards are read"
        )
    folder, source = Path(folder).expanduser(), Path(settings.path).expanduser()
    if source.is_dir() and folder.resolve().is_relative_to(source.resolve()):
        raise DataError(
            f"out={str(folder)!r}: it lies in path={settings.path!r}, where its shards would be read as documents; use "
            "another folder"
        )
    units = find_units(settings.path, min(part_bytes, 32 * 2**20))
    groups: list[list[Unit]] = [[]]
    for unit in units:
        if groups[-1] and sum(other.size for other in groups[-1]) + unit.size > part_bytes:
            groups.append([])
        groups[-1].append(unit)
    plan = Plan(settings, folder, tuple(map(tuple, groups)))
    record = _record(plan)
    if (folder / PLAN).is_file():
        if json.loads((folder / PLAN).read_text(encoding="utf-8")) != record:
            raise DataError(
                f"out={str(folder)!r}: it holds shards of other settings or of changed files; use another folder"
            )
    elif folder.exists() and any(entry != partial_of(folder / PLAN) for entry in folder.iterdir()):
        raise DataError(f"out={str(folder)!r}: it holds other files, which are never overwritten; use another folder")
    else:
        _check_splits(settings, units)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / PLAN, record)
    (folder / "parts").mkdir(exist_ok=True)
    return plan


def _check_splits(settings: Text, units: Iterable[Unit]) -> None:
    """Raises DataError where a split would be empty, before anything is packed; reads until each has a document."""
    missing, documents = set(_splits(settings)), 0
    for unit in units:
        for document in read_documents(unit, settings.field, settings.undecodable):
            documents += 1
            missing.discard("heldout" if settings.is_heldout(document) else "train")
            if not missing:
                return
    raise DataError(
        f"path={settings.path!r}, heldout={settings.heldout}: of {documents} documents none falls into the "
        f"{' and the '.join(sorted(missing))} part; give more documents, change heldout, or set heldout=0 here and "
        "data.heldout where the shards are read"
    )


def _splits(settings: Text) -> tuple[Split, ...]:
    """Those that shards of these settings have."""
    return SPLITS if settings.heldout else ("train",)


def is_done(plan: Plan, number: int) -> bool:
    """Whether a part's shards are there, of the recorded sizes."""
    path = _part_file(plan, number)
    if not path.is_file():
        return False
    try:
        for shard in json.loads(path.read_text(encoding="utf-8")).values():
            if shard:
                check_shard(plan.folder, Shard(**shard), verify=False)
    except (DataError, ValueError):
        return False
    return True


def write_part(plan: Plan, number: int) -> int:
    """Writes the shards of one part; returns its number."""
    tokenizer = load_tokenizer(plan.settings.tokenizer)
    id_bytes = 2 if tokenizer.vocab_size <= 2**16 else 4
    shards = {}
    for split, rows in plan.settings.pack_units(plan.parts[number], tokenizer).items():
        shard = write_shard(plan.folder / f"{split}-{number:05d}.array_record", rows, id_bytes)
        shards[split] = shard and dataclasses.asdict(shard)
    write_json(_part_file(plan, number), shards)
    return number


def write_parts(plan: Plan, workers: int) -> Iterator[int]:
    """Writes the parts that are not done, in ``workers`` processes (0: in this one); yields their numbers."""
    if workers < 0:
        raise DataError(f"workers={workers}: it must be at least 0; raise it")
    missing = [number for number in range(len(plan.parts)) if not is_done(plan, number)]
    if not workers or not missing:
        yield from (write_part(plan, number) for number in missing)
        return
    with concurrent.futures.ProcessPoolExecutor(
        min(workers, len(missing)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=exit_with_parent,
        initargs=(os.getpid(),),
    ) as pool:
        futures = [pool.submit(write_part, plan, number) for number in missing]
        try:
            for future in concurrent.futures.as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def finish(plan: Plan) -> dict[str, Any]:
    """Writes the tokenizer and the manifest, which makes the folder readable; returns the manifest.

    Raises:
      DataError: if a split that was asked for is empty.
    """
    tokenizer = load_tokenizer(plan.settings.tokenizer)
    parts = [json.loads(_part_file(plan, number).read_text(encoding="utf-8")) for number in range(len(plan.parts))]
    shards = {split: [part[split] for part in parts if part[split]] for split in SPLITS}
    for split in _splits(plan.settings):
        if not shards[split]:
            raise DataError(
                f"path={plan.settings.path!r}, heldout={plan.settings.heldout}: no row is in the {split} part; "
                "give more documents or change heldout"
            )
    tokenizer.save(plan.folder / "tokenizer")
    manifest = {
        "format": FORMAT,
        "length": plan.settings.length,
        "vocab_size": tokenizer.vocab_size,
        "pad_id": padding_id(tokenizer),
        "tokenizer": tokenizer.name,
        "settings": dataclasses.asdict(plan.settings),
        "rows": {split: sum(shard["rows"] for shard in shards[split]) for split in SPLITS},
        "tokens": {split: sum(shard["tokens"] for shard in shards[split]) for split in SPLITS},
        **shards,
    }
    write_json(plan.folder / MANIFEST, manifest)
    return manifest


def _part_file(plan: Plan, number: int) -> Path:
    return plan.folder / "parts" / f"{number:05d}.json"


def _record(plan: Plan) -> dict[str, Any]:
    files = sorted({unit.path for part in plan.parts for unit in part})
    return {
        "format": FORMAT,
        "settings": dataclasses.asdict(plan.settings),
        "parts": [[dataclasses.asdict(unit) for unit in part] for part in plan.parts],
        "modified": {file: Path(file).stat().st_mtime_ns for file in files},
    }
