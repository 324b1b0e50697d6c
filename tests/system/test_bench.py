"""Does the benchmark program measure what it says, and refuse what it must?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from experiments.benchmarks import (
    authors_model,
    clock,
    gate,
    model_page,
    models,
    operations,
    report,
    training,
    window_attention,
)
from experiments.benchmarks.cases import Options
from experiments.benchmarks.peers import PEERS, PeerMissing, authors_file


def run(operation, patterns):
    return operations.run(
        operation,
        patterns,
        ["xla"],
        PEERS,
        tiny=True,
        options=Options(),
        errors=True,
        rounds=2,
        say=lambda line: None,
        copy_bytes=2**16,
    )


@pytest.mark.rotating(2)
@pytest.mark.parametrize(
    "operation, patterns, outputs",
    [
        ("gated_delta_rule", ["*-backward", "decode*"], {"o", "dq", "dk", "dv", "dg", "dbeta"}),
        ("window_attention", ["train-12.5%", "decode-2"], {"o", "dq", "dk", "dv", "dscores"}),
        ("block_attention", ["tiny-forward", "decode*"], {"o"}),
        ("short_convolution", ["backward", "packed-forward"], {"y", "dx", "dweight"}),
        ("rms_norm", ["*-backward", "plain"], {"y", "dx", "dweight", "dgate"}),
    ],
)
def test_tiny_shapes_run_with_xla(operation, patterns, outputs):
    whole, step = run(operation, patterns)
    (ours,) = whole["contenders"]
    assert set(ours["errors"]) == outputs
    # bfloat16 against float32: rounding is seen, and nothing else is
    assert all(0 <= error < 1e-2 for error in ours["errors"].values()), ours["errors"]
    assert ours["errors"]["o" if "o" in outputs else "y"] > 1e-4
    assert ours["calls"] > 0 and ours["busy"] is None and ours["best"] == ours["calls"] and not ours["peer"]
    assert whole["copy_gbps"] > 0 and whole["bytes"] > 0 and step["contenders"][0]["calls"] > 0
    assert whole["missing"], "without a GPU every peer says why it is missing"
    assert all(reason for reason in whole["missing"].values())


@pytest.mark.parametrize("T, window, kept", [(10, 4, 10), (10, 4, None), (7, 9, 3)])
def test_the_work_of_a_query_is_the_mean_row_of_the_mask(T, window, kept):
    size = window_attention.Size(1, T, 1, 1, 64, window, kept)
    near = [min(i + 1, window) for i in range(T)]
    far = [max(i + 1 - window, 0) for i in range(T)]
    assert size.seen() == pytest.approx((sum(near) + (kept or 0) / T * sum(far)) / T)


def test_cases_have_names_of_their_own_and_patterns_must_match():
    for operation in operations.OPERATIONS:
        for tiny in (False, True):
            names = [case.name for case in operations.cases(operation, tiny)]
            assert len(set(names)) == len(names) > 2
    with pytest.raises(ValueError, match=r"--shapes=nonsense: no case has this name; there are window, "):
        run("window_attention", ["nonsense"])
    with pytest.raises(ValueError, match="--operation=softmax"):
        operations.cases("softmax", tiny=True)


def test_busy_time_is_the_union_of_what_ran_inside_each_stretch():
    def event(name, start, end):
        return SimpleNamespace(name=name, start_ns=start * 1e6, duration_ns=(end - start) * 1e6)

    streams = [
        SimpleNamespace(name="Stream #1(Compute)", events=[event("a", 1, 3), event("b", 20, 24)]),
        SimpleNamespace(name="Stream #2(Compute)", events=[event("c", 2, 4), event("d", 30, 31)]),
        SimpleNamespace(name="XLA Ops", events=[event("a", 0, 9)]),
    ]
    host = SimpleNamespace(
        name="python",
        events=[event("bench:x", 0.5, 10), event("bench:y", 19, 25), event("bench:x", 29, 32), event("other", 0, 40)],
    )
    planes = [SimpleNamespace(name="/device:GPU:0", lines=streams), SimpleNamespace(name="/host:CPU", lines=[host])]
    found = clock.busy_times(SimpleNamespace(planes=planes))
    assert found == {"x": pytest.approx([3.0, 1.0]), "y": pytest.approx([4.0])}
    assert clock.busy_times(SimpleNamespace(planes=planes[1:])) == {}


def test_the_timeline_of_a_step_is_what_streams_ran_by_start():
    def event(name, start, duration, **stats):
        return SimpleNamespace(name=name, start_ns=start, duration_ns=duration, stats=list(stats.items()))

    lines = [
        SimpleNamespace(name="Stream #2(Memcpy)", events=[event("copy", 3000, 500)]),
        SimpleNamespace(name="Stream #1(Compute)", events=[event("k", 4000, 1), event("k", 1000, 250, hlo_op="f")]),
        SimpleNamespace(name="XLA Ops", events=[event("f", 1000, 250)]),
    ]
    planes = [SimpleNamespace(name="/device:GPU:0", lines=lines), SimpleNamespace(name="/host:CPU", lines=lines)]
    assert training.device_events(SimpleNamespace(planes=planes)) == [
        (1.0, 0.25, "Stream #1(Compute)", "k", "f"),
        (3.0, 0.5, "Stream #2(Memcpy)", "copy", ""),
        (4.0, 0.001, "Stream #1(Compute)", "k", ""),
    ]


@pytest.fixture
def record(tmp_path):
    path = tmp_path / "gpu_tests.json"
    counts = dict(passed=3, failed=0, skipped=0)
    gate.write_record({"test_window_attention": counts, "test_window_attention_arguments": counts}, "a GPU", path)
    return path


def test_gate_wants_green_tests_of_this_very_code(record, monkeypatch):
    assert gate.require_green("window_attention", record)["passed"] == 6
    with pytest.raises(gate.TestsRed, match="gated_delta_rule: no GPU tests are recorded"):
        gate.require_green("gated_delta_rule", record)
    monkeypatch.setattr(gate, "digest", lambda operation: "other")
    with pytest.raises(gate.TestsRed, match="its code has changed"):
        gate.require_green("window_attention", record)


@pytest.mark.parametrize("counts", [dict(passed=3, failed=1, skipped=0), dict(passed=0, failed=0, skipped=2)])
def test_gate_is_closed_by_a_failure_and_by_nothing_run(record, counts):
    gate.write_record({"test_window_attention": counts}, "a GPU", record)
    with pytest.raises(gate.TestsRed, match=f"{counts['failed']} of its GPU tests failed and {counts['passed']}"):
        gate.require_green("window_attention", record)


def test_digest_follows_the_code_of_what_an_operation_runs(tmp_path, monkeypatch):
    for name in ("window_attention", "block_attention"):
        (tmp_path / "pallas_kernels" / name).mkdir(parents=True)
        (tmp_path / "pallas_kernels" / name / "api.py").write_text(name)
    for name in ("dispatch.py", "tiles.py", "triton_call.py"):
        (tmp_path / "pallas_kernels" / name).write_text(name)
    monkeypatch.setattr(gate, "ROOT", tmp_path)
    before = gate.digest("window_attention"), gate.digest("block_attention")
    (tmp_path / "pallas_kernels/block_attention/api.py").write_text("changed")
    between = gate.digest("window_attention"), gate.digest("block_attention")
    assert between[0] == before[0] and between[1] != before[1]
    (tmp_path / "pallas_kernels/window_attention/api.py").write_text("changed")  # the window branch is part of NSA
    assert gate.digest("block_attention") != between[1]


def test_the_tests_write_the_record_and_the_program_obeys_it(tmp_path):
    path = tmp_path / "gpu_tests.json"
    tests = ["-m", "pytest", "-q", "-n", "0", "-x", "-m", "gpu", f"--record_gpu_tests={path}"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}

    def python(*words):
        return subprocess.run([sys.executable, *words], cwd=gate.ROOT, env=environment, capture_output=True, text=True)

    python(*tests, "tests/kernels/test_gated_delta_rule.py")  # without a GPU the first one fails
    entry = json.loads(path.read_text())["gated_delta_rule"]
    assert (entry["passed"], entry["failed"], entry["device"]) == (0, 1, "cpu")
    partial = python(*tests, "-k", "grad", "tests/kernels/test_gated_delta_rule.py")
    assert "records whole test files" in partial.stderr
    bench = python(
        "-m", "experiments.bench", "--operation=gated_delta_rule", "--implementations=triton", f"--results={tmp_path}"
    )
    assert bench.returncode == 1 and bench.stderr.startswith("refused: gated_delta_rule: 1 of its GPU tests failed")
    assert not list(tmp_path.glob("*.md"))


def row(case, best, run):
    contenders = [
        dict(
            name="triton", peer=False, comparable=False, note="", best=best, busy=best, calls=best, errors={"o": 2e-3}
        ),
        dict(name="fla", peer=True, comparable=True, note="n", best=4.0, busy=4.0, calls=4.1, errors={}),
        dict(name="cudnn", peer=True, comparable=False, note="", best=0.5, busy=0.5, calls=0.6, errors={}),
    ]
    return dict(
        case=case, shape="S", dtype="bfloat16", bytes=10**9, copy_gbps=1000.0, contenders=contenders,
        missing={"flex": "not here"}, run=run,
    )  # fmt: skip


def test_pages_keep_prose_and_new_rows_replace_old_ones(tmp_path):
    run = dict(date="D", commit="c1", hardware="GPU", versions={"jax": "1"}, tests=None, verified=True)
    page, path = tmp_path / "op.md", tmp_path / "op.json"
    page.write_text("# op\n\nWritten by hand.\n")
    report.merge(path, [row("a", 3.0, run), row("b", 3.0, run)])
    rows = report.merge(path, [row("b", 2.0, {**run, "commit": "c2"})])
    for _ in range(2):
        report.write_page(page, "op", "Legend.", report.table(rows))
    text = page.read_text()
    assert (
        text.startswith("# op\n\nWritten by hand.\n")
        and text.count("Legend.") == text.count("### GPU, D UTC, commit c2") == 1
    )
    # 1 ms of floor; the ratio is to the peer that computes the same
    assert (
        "| **a**: S, bfloat16; floor 1.000 ms at 1000 GB/s | triton | 3.0000 | 3.0000 | 0.75 | 3.0 | 2.0e-03 (o) |"
        in text
    )
    assert (
        "| **b**: S, bfloat16; floor 1.000 ms at 1000 GB/s | triton | 2.0000 | 2.0000 | 0.50 | 2.0 | 2.0e-03 (o) |"
        in text
    )
    assert "|  | flex | | | | | | not timed: not here |" in text


def test_unverified_rows_count_once_their_code_is_green(tmp_path):
    path = tmp_path / "gpu_tests.json"
    about = dict(verified=False, tests=None, digest=gate.digest("rms_norm"))
    rows = [row("a", 1.0, about), row("b", 1.0, about)]
    with pytest.raises(gate.TestsRed, match="no GPU tests are recorded"):
        gate.verified("rms_norm", rows, path)
    gate.write_record({"test_rms_norm": dict(passed=3, failed=0, skipped=0)}, "GPU", path)
    with pytest.raises(gate.TestsRed, match="other code was timed"):
        gate.verified("rms_norm", [*rows, row("c", 1.0, {**about, "digest": "other"})], path)
    found = gate.verified("rms_norm", rows, path)
    assert [(x["case"], x["run"]["verified"], x["run"]["tests"]["passed"]) for x in found] == [
        ("a", True, 3),
        ("b", True, 3),
    ]
    assert gate.verified("rms_norm", found, tmp_path / "absent.json") == found


def test_missing_authors_are_explained(tmp_path):
    with pytest.raises(PeerMissing, match="--authors_path"):
        authors_file(None, "x.py")
    with pytest.raises(PeerMissing, match="there is no x"):
        authors_file(str(tmp_path), "x.py")


def test_the_authors_model_needs_their_checkout(tmp_path):
    with pytest.raises(ValueError, match=r"there is no fla/layers/lte.py in it"):
        authors_model.prepare(str(tmp_path), 3)


def test_whole_models_are_timed_at_every_length_and_batch(monkeypatch):
    monkeypatch.setattr(models, "WHOLE", 100)  # the batched prompts of 96 tokens are sampled
    monkeypatch.setattr(models, "SAMPLES", 2)
    bench = models.Bench(models.Plan("lalte", "tiny", (16, 48), (1, 3), chunk=16, steps=2, rounds=1))
    bench.compile()
    bench.allocate()
    rows = list(bench.rows())
    assert [(row["length"], row["batch"]) for row in rows] == [(16, 1), (16, 3), (48, 1), (48, 3)]
    assert [(row["timed_chunks"], row["chunks"]) for row in rows] == [(1, 1), (1, 1), (3, 3), (2, 3)]
    for row in rows:
        assert row["prompt"] > 0 and row["token"] > 0 and row["who"] == "ours"
        assert row["token_bytes"] > row["weights_bytes"] + row["cache_bytes"]
    assert rows[1]["cache_bytes"] == 3 * rows[0]["cache_bytes"] == 3 * rows[2]["cache_bytes"]
    known = frozenset({(16, 1), (16, 3), (48, 1)})
    assert models.Plan("lalte", "tiny", (16, 48), (1, 3), chunk=16, done=known).cases() == [(48, [3])]
    with pytest.raises(ValueError, match="--model=gdm: there is gdn, gdn_swa"):
        models.Plan("gdm", "0.4B")
    with pytest.raises(ValueError, match="--lengths=5000: it must be a multiple of --chunk=4096"):
        models.Plan("gdn", "0.4B", lengths=(5000,))


def test_what_cannot_fit_is_said_and_not_compiled(monkeypatch):
    """By the bytes of weights and cache: the compiler would search for minutes for a plan that there is not."""
    bench = models.Bench(models.Plan("transformer", "tiny", (16, 48), (1, 64), chunk=16, steps=2, rounds=1))
    most, few = (models._bytes(bench._shapes) + models._bytes(bench._shape_of_cache(64, T)) for T in (48, 16))
    bench._limit = (most + few) / 2
    monkeypatch.setattr(models, "_program", lambda future: models.Program(future.result(), 1))  # a small plan
    bench.compile()
    assert {(kind, batch) for kind, batch, _ in bench._programs} == {
        (kind, batch) for kind in ("prompt", "token") for batch in (1, 64)
    } and len(bench._programs) == 6, "none of 64 rows of 48 tokens"
    bench.allocate()
    rows = list(bench.rows())
    large = [row for row in rows if "token" not in row]
    assert [(row["length"], row["batch"]) for row in large] == [(48, 64)] and len(rows) == 4
    assert large[0]["missing"] == large[0]["prompt_missing"] == "needs over 0 GiB"
    alone = models.Bench(models.Plan("transformer", "tiny", (48,), (64,), chunk=16, steps=2, rounds=1))
    alone._limit = bench._limit
    alone.compile()
    assert not alone._programs and [row["missing"] for row in alone.rows()] == ["needs over 0 GiB"]


def test_a_killed_table_goes_on(tmp_path):
    known = {"who": "ours", "model": "gdn", "size": "tiny", "length": 16, "batch": 2, "token": 1.0}
    path = tmp_path / "cost.jsonl"
    path.write_text(json.dumps(known) + "\n")
    command = [sys.executable, "-m", "experiments.bench", "--model=gdn", "--lengths=16,32", "--batches=2"]
    subprocess.run([*command, "--commit=x", f"--json={path}"], check=True, capture_output=True)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0] == known and [line["length"] for line in lines] == [16, 32]


def test_costs_of_models_make_a_page_and_the_newest_line_counts(tmp_path):
    case = {"who": "ours", "model": "lalte", "size": "0.4B", "length": 4096, "batch": 16, "run": "a GPU"}
    old = {**case, "prompt": 9.0, "token": 1.0, "chunks": 1, "timed_chunks": 1}
    new = {**case, "prompt": 0.25, "token": 0.002, "chunks": 4, "timed_chunks": 2, "token_bytes": 3 * 2**30}
    theirs = {**case, "who": "authors", "prompt": 0.5, "token": 0.02}
    wide = {**case, "model": "transformer", "length": 131072, "missing": "needs 210 GiB"}
    log = tmp_path / "log.txt"
    log.write_text("".join(f"{text}\n" for text in ("READY", json.dumps(theirs), json.dumps(new), json.dumps(wide))))
    model_page.write([old], tmp_path)
    page = tmp_path / "inference_cost.md"
    page.write_text(page.read_text().replace("# What", "Words of a person.\n\n# What"))
    written = model_page.write(model_page.read_lines(log), tmp_path)
    text = page.read_text()
    assert "| lalte | 4,096 | 250 ms (2 of 4) | 2.00 ms | 8,000 | 3.00 GiB | - | a GPU |" in text
    assert "| lalte, authors | 4,096 | 500 ms | 20.00 ms | 800 | - | - | a GPU |" in text
    assert "| transformer | 131,072 | - | needs 210 GiB | - |" in text and "9.00 s" not in text
    assert text.startswith("Words of a person.") and text.count("### 0.4B, batch 16") == 1
    assert "![inference_cost_0.4B](inference_cost_0.4B.png)" in text and written[-1].read_bytes()[1:4] == b"PNG"
    with pytest.raises(ValueError, match="no line of a model's cost"):
        (tmp_path / "none.txt").write_text("READY\n")
        model_page.read_lines(tmp_path / "none.txt")
