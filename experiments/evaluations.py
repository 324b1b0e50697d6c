"""What does each kind of evaluation (of data, our own tasks, the harness's, what LTE keeps) read, print and write?

Each writes its JSON, and a picture beside it, whole or not at all, and returns what it wrote.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lte_jax import configs, restore
from lte_jax.data.sources import find_units, read_documents
from lte_jax.evaluate import heldout, inspection, own
from lte_jax.evaluate.pictures import result_picture, scores_picture
from lte_jax.evaluate.probe import probe
from lte_jax.generate import generate
from lte_jax.model import LanguageModel
from lte_jax.sampling import Sampling
from lte_jax.sharding import rows_mesh
from lte_jax.whole_files import check_target, write_json

TASK_KINDS = {"needles": ("TextNeedles", "SymbolNeedles"), "mqar": ("MQARMix", "MQAR"), "copying": ("Copying",)}
"""The data sets that a task of our own can be asked on; the first is the default."""

DRAWN = {"seed": "--seed", "heldout_rows": "--num_samples", "depth": "--depths"}
"""Settings of these that flags say here."""


def _target(output: str | None, place: restore.Place, name: str) -> Path:
    """The JSON file to write, known to be writable before anything is computed."""
    target = Path(output) if output else place.folder / name
    if target.suffix == ".png":
        raise ValueError(f"--output={output}: the name of the JSON file; the picture beside it takes .png")
    check_target(target)
    return target


def _write(target: Path, record: dict[str, Any], named: bool) -> None:
    """Writes a result. One of before with this name, unless the caller has ``named`` it, gets a number and stays."""
    if target.exists() and not named:
        number = next(n for n in itertools.count(1) if not target.with_stem(f"{target.stem}-{n}").exists())
        for old in (target.with_suffix(suffix) for suffix in (".json", ".png", ".samples.jsonl")):
            if old.exists():
                old.rename(old.with_name(old.name.replace(target.stem, f"{target.stem}-{number}", 1)))
    write_json(target, record)


def evaluate_data(
    checkpoint: str,
    output: str | None = None,
    *,
    step: int | None = None,
    kind: str | None = None,
    assignments: Sequence[str] = (),
    types: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Scores a data set, writes JSON and a picture, and returns what was written.

    Args:
      kind, assignments: the data set, and settings such as "length=512"; default the run's own.

    Raises:
      ValueError: as ``heldout.data_set`` and ``heldout.score``.
    """
    place = restore.find(checkpoint)
    target = _target(output, place, "evaluation.json")
    settings, tokenizer = restore.read_settings(place, step), restore.find_tokenizer(place)
    data = heldout.data_set(settings, kind, assignments, tokenizer)
    loaded = restore.load(checkpoint, step=step, **(types or {}))
    scores = heldout.score(loaded.model, data, **options)
    chance = getattr(data, "chance", None)
    record = {
        "checkpoint": str(checkpoint),
        "step": loaded.step,
        "data": {"kind": type(data).__name__, **configs.to_dict(data)},
        **options,
        **scores.to_dict(),
        **({} if chance is None else {"chance": chance}),
    }
    _write(target, record, output is not None)
    scores_picture(scores, target.with_suffix(".png"), type(data).__name__)
    print(f"loss {scores.loss:.4f}, perplexity {scores.perplexity:.4g}, accuracy {scores.accuracy:.4f}", end="")
    print(f" ({scores.targets:,} targets{'' if chance is None else f', chance {chance:.4f}'})")
    for bucket in scores.by_distance:
        print(f"  answers {bucket.low}-{bucket.high} tokens back: {bucket.accuracy:.4f} of {bucket.queries:,}")
    print(f"{target}, {target.with_suffix('.png')}")
    return record


def texts(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    **options: Any,
) -> list[str]:
    """What the harness adapter calls to continue prompts."""
    found = generate(model, prompts, sampling=Sampling(temperature, top_k, top_p), **options)
    return [generation.text or "" for generation in found]


def evaluate_tasks(
    checkpoint: str,
    tasks: Sequence[str],
    output: str | None = None,
    *,
    step: int | None = None,
    tokenizer: str | None = None,
    types: dict[str, Any] | None = None,
    adapter: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Runs tasks of the harness, writes JSON, and returns what was written.

    Raises:
      RuntimeError: the harness is not installed.
      ValueError: no tokenizer, one that does not fit, an unknown task, or a --cache of another evaluation.
    """
    try:
        from lte_jax.evaluate.harness import HarnessModel
        from lte_jax.evaluate.tasks import run_tasks, write_samples
    except ImportError as error:
        raise RuntimeError(f"--tasks needs lm-evaluation-harness ({error}): pip install -e '.[eval]'") from None
    target = _target(output, restore.find(checkpoint), "tasks.json")
    loaded = restore.load(checkpoint, tokenizer=tokenizer, needs_tokenizer=True, step=step, **(types or {}))
    settings = dict(adapter or {})
    mesh = rows_mesh(settings.pop("devices", 1))
    seed = options.get("seed", 0)
    harness = HarnessModel(loaded.model, loaded.tokenizer, texts, mesh=mesh, seed=seed, **settings)
    results = run_tasks(harness, tasks, **options)
    samples = results.pop("samples", None)
    record = {"checkpoint": str(checkpoint), "step": loaded.step, **(adapter or {}), **options, **results}
    _write(target, record, output is not None)
    if samples is not None:
        write_samples(samples, target.with_suffix(".samples.jsonl"))
    for task, numbers in results["results"].items():
        shown = ", ".join(f"{name} {value:.4f}" for name, value in numbers.items() if isinstance(value, float))
        print(f"{task}: {shown}")
    if results["truncated"]:
        print(f"warning: {results['truncated']} requests were cut at the left; raise --max_length")
    print(target)
    return results


def evaluate_own(
    checkpoint: str,
    name: str,
    output: str | None = None,
    *,
    step: int | None = None,
    kind: str | None = None,
    assignments: Sequence[str] = (),
    text: str | None = None,
    tokenizer: str | None = None,
    lengths: Sequence[int] = (),
    depths: int = 5,
    types: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Runs needles, MQAR or copying, writes JSON and a picture, and returns what was written.

    They take the settings of the run's own data where that is of their kind. Needles in text are otherwise written with
    the checkpoint's tokenizer.

    Args:
      kind, assignments: the data set, a name of ``TASK_KINDS``, and settings such as "keys=4".
      text: the haystack of needles, a file or folder; default sentences of noise.
      lengths: of the rows; default the data set's.

    Raises:
      ValueError: data of another kind, a length that cannot be had, token ids outside the model's vocabulary.
    """
    for assignment in assignments:
        flag = DRAWN.get(assignment.partition("=")[0].strip())
        if flag is not None:
            raise ValueError(f"--set {assignment}: --own draws its own samples; say {flag}")
    place, kinds = restore.find(checkpoint), TASK_KINDS[name]
    target, saved = _target(output, place, f"{name}.json"), restore.read_settings(place, step)
    known = saved.get("data", {}).get("kind")
    kind = kind or (known if known in kinds else kinds[0])
    if kind not in kinds:
        raise ValueError(f"--data={kind}: --own={name} takes {' or '.join(kinds)}")
    if text is not None and kind != "TextNeedles":
        raise ValueError(f"--text={text}: --own={name} on {kind} draws its own tokens; drop it")
    same = known == kind
    needs = kind == "TextNeedles" and not same
    loaded = restore.load(checkpoint, tokenizer=tokenizer, needs_tokenizer=needs, step=step, **(types or {}))
    if kind == "TextNeedles" and tokenizer is not None:
        assignments = [f"tokenizer={loaded.tokenizer.name}", *assignments]
    assignments = [*assignments, *([] if text is None else [f"haystack={text}"])]
    data: Any = heldout.data_set(saved if same else {}, None if same else kind, assignments, loaded.tokenizer)
    model, chosen = loaded.model, own.Options(**options)
    if name == "needles":
        result = own.needles(model, data, chosen, lengths=lengths, depths=depths)
    elif name == "copying":
        result = own.copying(model, data, chosen, lengths=lengths)
    else:
        parts = [(l, p) for l, p, _ in data.test] if kind == "MQARMix" else [(data.length, data.pairs)]
        parts = [part for part in parts if not lengths or part[0] in lengths]
        if not parts:
            raise ValueError(f"--lengths={','.join(map(str, lengths))}: the task has no such length")
        result = own.mqar(model, chosen, parts=parts, vocabulary=data.vocabulary, power=data.power)
    return _write_result(checkpoint, loaded.step, result, options, target, output is not None)


def evaluate_text(
    checkpoint: str,
    name: str,
    output: str | None = None,
    *,
    step: int | None = None,
    text: str | None = None,
    tokenizer: str | None = None,
    length: int | None = None,
    types: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Perplexity of text by position or by byte: writes JSON and a picture, and returns what was written.

    Args:
      name: "positions" or "bytes". text: a file or folder. length: of the windows; default the model's.

    Raises:
      ValueError: no text, none that is long enough, or no tokenizer that fits.
    """
    if text is None:
        raise ValueError(f"--own={name} needs --text, a file or folder of text")
    target = _target(output, restore.find(checkpoint), f"{name}.json")
    loaded = restore.load(checkpoint, tokenizer=tokenizer, needs_tokenizer=True, step=step, **(types or {}))
    task = own.positions if name == "positions" else own.bytes_perplexity
    length = loaded.model.config.max_length if length is None else length
    result = task(loaded.model, loaded.tokenizer, text, own.Options(**options), length=length)
    return _write_result(checkpoint, loaded.step, result, options, target, output is not None)


def _write_result(
    checkpoint: str, step: int | None, result: own.Result, options: dict[str, Any], target: Path, named: bool
) -> dict[str, Any]:
    record = {"checkpoint": str(checkpoint), "step": step, **options, **result.to_dict()}
    _write(target, record, named)
    result_picture(result, target.with_suffix(".png"), Path(checkpoint).name)
    print(own.table(result))
    print(f"{target}, {target.with_suffix('.png')}")
    return record


def inspect(
    checkpoint: str,
    output: str | None = None,
    *,
    step: int | None = None,
    kind: str | None = None,
    assignments: Sequence[str] = (),
    text: str | None = None,
    tokenizer: str | None = None,
    length: int | None = None,
    types: dict[str, Any] | None = None,
) -> list[Path]:
    """Writes pictures and a page on what LTE keeps of a text, or, without one, of a document that the data hold out.

    Args:
      output: the folder; default ``inspect`` in the run's folder.
      length: tokens to look at; default the text's, at most the model's ``max_length``.

    Raises:
      ValueError: no text, no tokenizer for it, no held-out row, or a model without LTE layers.
    """
    place = restore.find(checkpoint)
    folder = Path(output) if output else place.folder / "inspect"
    check_target(folder / "inspect.json")
    loaded = restore.load(checkpoint, tokenizer=tokenizer, needs_tokenizer=text is not None, step=step, **(types or {}))
    model, found = loaded.model, loaded.tokenizer
    length = length or model.config.max_length
    if text is not None:
        document = next((part for unit in find_units(text) for part in read_documents(unit) if part.strip()), None)
        if document is None:
            raise ValueError(f"--text={text}: the files hold no text; give others")
        tokens = found.encode(document, add_bos=found.bos_id is not None)[:length]
    else:
        data = heldout.data_set(restore.read_settings(place, step), kind, assignments, found)
        rows = data.rows("heldout", batch_size=1)
        if not len(rows):
            raise ValueError(f"{type(data).__name__} holds out no rows: give --text, or set heldout")
        ids, segments = rows[0]["input_ids"], rows[0].get("segment_ids")
        tokens = (ids if segments is None else ids[segments == segments[0]])[:length].tolist()
    if text is not None or (found is not None and max(tokens) < found.vocab_size):
        stream = found.stream()
        pieces = [stream.push(token) for token in tokens]
    else:
        pieces = [f"{token} " for token in tokens]
    seen = probe(model, tokens)
    written = inspection.write(seen, folder, f"{Path(checkpoint).name}: {len(tokens)} tokens", pieces)
    print(inspection.table(seen))
    print(", ".join(map(str, written)))
    return written
