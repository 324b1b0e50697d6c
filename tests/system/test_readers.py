"""Are many shards read with few files open, and is what the system cannot read told apart from what is damaged?"""

from __future__ import annotations

import concurrent.futures
import os
import resource

import numpy as np
import pytest

from lte_jax import data
from lte_jax.data import DataError, UnreadableError, pipeline, readers, shards

ROWS = 6


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Nine files; record r of file f holds the ids 100 f + r."""
    folder = tmp_path_factory.mktemp("shards")
    paths = [folder / f"train-{number:05d}.array_record" for number in range(9)]
    for number, path in enumerate(paths):
        shards.write_shard(path, ([np.full(8, 100 * number + row)] for row in range(ROWS)), 2)
    return paths


def open_files(paths):
    names = {str(path) for path in paths}
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    return sum(os.readlink(link) in names for link in links if os.path.lexists(link))


def test_threads_read_more_files_than_may_be_open(files):
    opened = readers.RecordFiles(limit=3)
    picks = np.random.default_rng(0).integers(0, (len(files), ROWS), (600, 2)).tolist()

    def read(pick):
        (ids,) = shards.decode_row(opened.read(files[pick[0]], pick[1]))
        return ids[0] == 100 * pick[0] + pick[1]

    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        assert all(threads.map(read, picks))
    assert open_files(files) == 3


def test_running_out_of_descriptors_is_no_damage_and_is_never_skipped(files, monkeypatch, capfd):
    monkeypatch.setattr(shards, "FILES", readers.RecordFiles())
    listed = [shards.Shard(path.name, ROWS, 8 * ROWS, ROWS, path.stat().st_size, "") for path in files]
    rows = data.pipeline.grain.MapDataset.source(shards.ShardRows(files[0].parent, listed, 8, 0, verify=False))
    skipping = data.ReadingConfig(threads=0, bad_rows="skip")
    source = pipeline.Batches(rows, 2, reading=skipping)
    next(source)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # As many as are open: the next open fails.
    used = {int(name) for name in os.listdir("/proc/self/fd")}
    lowest_free = next(number for number in range(len(used) + 2) if number not in used)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    monkeypatch.setattr(readers.resource, "getrlimit", lambda kind: (10**6, 10**6))
    try:
        with pytest.raises(UnreadableError, match=r"array_record: cannot be read \(Too many open files\).*ulimit -n"):
            for _ in range(8):
                next(source)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    source.close()
    assert "left out" not in capfd.readouterr().out
    found = list(pipeline.Batches(rows, 2, reading=skipping))
    assert [batch["input_ids"][0, 0] for batch in found[::3]] == [100 * number for number in range(9)]


def test_a_file_that_is_gone_and_an_input_error_are_no_damage(files, tmp_path):
    with pytest.raises(UnreadableError, match=r"No such file.*nothing says that it is damaged"):
        readers.open_records(tmp_path / "gone.array_record")

    class Reader:
        def read(self, start, stop):
            raise RuntimeError("pread() failed: Input/output error; reading a.array_record; at byte 199")

    with pytest.raises(UnreadableError, match=r"a.array_record: cannot be read \(Input/output error\)"):
        readers.read_records(Reader(), "a.array_record", 3, 4)
    (tmp_path / "cut.array_record").write_bytes(files[0].read_bytes()[:-9])
    with pytest.raises(DataError, match="not a whole ArrayRecord file") as caught:
        readers.open_records(tmp_path / "cut.array_record")
    assert not isinstance(caught.value, UnreadableError)


class Damaged:
    """Every ``period``-th row is damaged."""

    def __init__(self, period):
        self._period = period

    def __len__(self):
        return 4000

    def __getitem__(self, index):
        if index % self._period == self._period - 1:
            raise DataError(f"a.array_record: records from {index} on are damaged; copy the file again")
        return {"labels": np.ones(2, np.int32)}

    def __repr__(self):
        return "Damaged"


@pytest.mark.parametrize(
    ("period", "share", "rows", "left_out"),
    [(200, 0.01, 4000, 20), (50, 0.01, 840, 16), (50, 0.03, 4000, 80), (1, 1.0, 0, 1)],
)
def test_only_so_large_a_share_of_rows_is_left_out(period, share, rows, left_out, capfd):
    reading = data.ReadingConfig(threads=0, bad_rows="skip", bad_share=share)
    source = pipeline.Batches(pipeline.grain.MapDataset.source(Damaged(period)), 10, reading=reading)
    read = 0
    with pytest.raises((DataError, StopIteration)) as ended:
        while True:
            next(source)
            read += 10
    assert read == rows
    if rows == 840:
        assert "17 of 850 rows cannot be read, more than reading.bad_share=0.01" in str(ended.value)
    assert capfd.readouterr().out.count("left out") == left_out
