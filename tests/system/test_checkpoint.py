"""Does a checkpoint come back bit for bit, on any layout, and is every way of breaking it noticed and survived?"""

import os
import re
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lte_jax import damage
from lte_jax.checkpoint import CheckpointError, Checkpoints, DamagedError
from lte_jax.checksums import checksums

ROOT = Path(__file__).parents[2]


def tree(step=1):
    rng = np.random.default_rng(step)
    return {
        "w/kernel": jnp.asarray(rng.normal(size=(8, 6)), jnp.float32),
        "half": jnp.asarray(rng.normal(size=16), jnp.bfloat16),
        "count": jnp.int32(step),
        "key": jnp.asarray([1, 2**32 - 1], jnp.uint32),
    }


def save(folder, steps, **kwargs):
    checkpoints = Checkpoints(folder, **{"keep": 9, "asynchronous": False, **kwargs})
    for step in steps:
        checkpoints.save(step, {"params": tree(step)}, {"config": {"width": 4}, "data": {"rows": step * 10}})
    checkpoints.close()


def abstract(arrays, sharding=None):
    """What to restore: as these arrays lie, or all of them on ``sharding``."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding), arrays)


def restore(folder, sharding=None, read_only=True, **kwargs):
    checkpoints = Checkpoints(folder, read_only=read_only)
    try:
        return checkpoints.restore({"params": abstract(tree(), sharding)}, **kwargs)
    finally:
        checkpoints.close()


def assert_is(restored, step):
    assert restored.step == step and restored.meta["data"] == {"rows": step * 10}
    jax.tree.map(np.testing.assert_array_equal, restored.items["params"], tree(step))


def test_checksums_do_not_depend_on_the_layout_and_see_any_change():
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
    whole = {"w": tree()["w/kernel"]}
    spread = {"w": jax.device_put(whole["w"], NamedSharding(mesh, PartitionSpec("a", "b")))}
    assert checksums(spread) == checksums(whole)
    bits = np.asarray(whole["w"]).view(np.uint32)
    for place, bit in [((0, 0), 0), ((7, 5), 31), ((3, 2), 13)]:
        flipped = bits.copy()
        flipped[place] ^= np.uint32(1 << bit)
        assert checksums({"w": jnp.asarray(flipped.view(np.float32))}) != checksums(whole)
    swapped = np.asarray(whole["w"])[::-1]
    assert checksums({"w": jnp.asarray(swapped)}) != checksums(whole)


def test_saved_on_eight_devices_restored_on_four_and_on_one(tmp_path):
    devices = np.array(jax.devices())
    eight = NamedSharding(Mesh(devices.reshape(8), ("a",)), PartitionSpec("a"))
    four = NamedSharding(Mesh(devices[:4].reshape(2, 2), ("a", "b")), PartitionSpec("b"))
    array = tree()["w/kernel"]
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, {"params": {"w": jax.device_put(array, eight)}}, {})
    checkpoints.close()
    for place in (four, jax.sharding.SingleDeviceSharding(devices[5])):
        reader = Checkpoints(tmp_path, read_only=True)
        found = reader.restore({"params": {"w": jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place)}})
        reader.close()
        np.testing.assert_array_equal(found.items["params"]["w"], array)
        assert found.items["params"]["w"].sharding == place


def test_an_empty_folder_holds_no_checkpoint(tmp_path):
    assert restore(tmp_path) is None
    with pytest.raises(CheckpointError, match="no checkpoints there"):
        Checkpoints(tmp_path / "missing", read_only=True)


def test_a_flipped_byte_in_any_data_file_is_noticed(tmp_path, capfd):
    save(tmp_path / "good", [1, 2])
    files = [path for path in (tmp_path / "good" / "2" / "params").rglob("d/*") if path.is_file()]
    files.append(tmp_path / "good" / "2" / "meta" / "metadata")
    noticed = 0
    for number, file in enumerate(files):
        folder = tmp_path / f"case{number}"
        shutil.copytree(tmp_path / "good", folder)
        victim = folder / file.relative_to(tmp_path / "good")
        data = bytearray(victim.read_bytes())
        data[len(data) * 2 // 3] ^= 0x10
        victim.write_bytes(data)
        found = restore(folder)
        # A byte that no array is read from (alignment, an unused copy) may be harmless: then the arrays are right.
        assert_is(found, found.step)
        noticed += found.step == 1
        shutil.rmtree(folder)
    assert noticed >= 2
    assert "WARNING" in capfd.readouterr().err


@pytest.mark.parametrize("damage", ["empty", "truncated", "no meta", "missing arrays"])
def test_a_broken_newest_step_is_skipped_loudly_and_put_aside(tmp_path, damage, capfd):
    save(tmp_path, [1, 2])
    step = tmp_path / "2"
    if damage == "empty":
        shutil.rmtree(step)
        step.mkdir()
    elif damage == "truncated":
        for file in (step / "params").rglob("d/*"):
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif damage == "no meta":
        (step / "meta" / "metadata").unlink()
    else:
        shutil.rmtree(step / "params")
    assert_is(restore(tmp_path, read_only=False), 1)
    assert f"{tmp_path}/2 is skipped" in capfd.readouterr().out
    assert not step.exists() and (tmp_path / "damaged-2-0").exists()
    save(tmp_path, [2])
    assert_is(restore(tmp_path), 2)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_where_no_step_is_whole_nothing_is_renamed_and_no_run_begins_again(tmp_path):
    (tmp_path / "7").mkdir()
    for _ in range(2):  # the second start is as the first
        with pytest.raises(CheckpointError, match=r"step 7: the folder is empty.*[Nn]othing was renamed.*another"):
            restore(tmp_path, read_only=False)
        assert names(tmp_path) == ["7"]
    (tmp_path / "7").rename(tmp_path / "damaged-7-0")  # as an older version left it
    with pytest.raises(CheckpointError, match=r"put aside before: damaged-7-0.*does not begin again by itself"):
        restore(tmp_path, read_only=False)


FAILURES = {
    "memory": MemoryError("out of memory"),
    "device": jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes"),
    "disk": OSError(5, "Input/output error"),
    "stale": ValueError('UNKNOWN: Error reading "w/0.0" in OCDBT database: Stale file handle'),
    "descriptors": ValueError("RESOURCE_EXHAUSTED: Error reading local file: Too many open files"),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_what_may_be_the_machines_fault_ends_the_search_and_renames_nothing(tmp_path, monkeypatch, kind):
    save(tmp_path, [1, 2])

    def fail(*args, **kwargs):
        raise FAILURES[kind]

    with monkeypatch.context() as patch:
        patch.setattr(ocp.StandardCheckpointHandler, "restore", fail)
        with pytest.raises(CheckpointError, match=r"2 could not be read.*Nothing was renamed") as caught:
            restore(tmp_path, read_only=False)
    assert not isinstance(caught.value, DamagedError) and caught.value.__cause__ is FAILURES[kind]
    assert names(tmp_path) == ["1", "2"]
    assert_is(restore(tmp_path, read_only=False), 2)


def test_a_model_with_another_tree_renames_nothing(tmp_path):
    save(tmp_path, [1, 2])
    checkpoints = Checkpoints(tmp_path)
    for other in ({**tree(), "new": jnp.zeros(3)}, {**tree(), "half": jnp.zeros(17, jnp.bfloat16)}):
        with pytest.raises(CheckpointError, match="code whose parameters have other shapes"):
            checkpoints.restore({"params": abstract(other)})
    checkpoints.close()
    assert names(tmp_path) == ["1", "2"]


def test_a_file_of_settings_that_cannot_be_read_is_no_proof(tmp_path, monkeypatch):
    save(tmp_path, [1, 2])

    read = Path.read_text

    def fail(self, *args, **kwargs):
        if self.parent.name == "meta":
            raise OSError(116, "Stale file handle", str(self))
        return read(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", fail)
        with pytest.raises(CheckpointError, match=r"OSError: .*Stale file handle.*Nothing was renamed"):
            restore(tmp_path, read_only=False)
    assert names(tmp_path) == ["1", "2"]


def test_two_processes_skip_what_is_damaged_for_one_and_end_together_where_one_cannot_read(tmp_path):
    """No collective lies between a failure of one process and the word about it to the other."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.system.damaged_share", str(tmp_path), str(port)]
    flags = "--xla_force_host_platform_device_count=1"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    running = [subprocess.Popen([*command, str(index)], cwd=ROOT, env=environment, **pipes) for index in range(2)]
    try:
        said = [process.communicate(timeout=120)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0]
    for text in said:
        assert all(f"{kind}: step 1, the values that were saved" in text for kind in ("cut", "flip")), text
    assert f"{tmp_path}/memory/2: process 1 could not read it: MemoryError: none left" in said[0]
    assert re.search(r"memory: .*/2 could not be read.*MemoryError: none left. Nothing was renamed", said[1])
    assert [names(tmp_path / kind) for kind in ("cut", "flip")] == [["1", "damaged-2-0"]] * 2
    assert names(tmp_path / "memory") == ["1", "2"]


@pytest.mark.parametrize(
    ("text", "damaged"),
    [
        ('DATA_LOSS: Error opening "zarr" driver: CRC-32C checksum verification failed', True),
        ("OUT_OF_RANGE: Requested byte range [2730, 13826) is not valid for value of size 13120", True),
        ('FAILED_PRECONDITION: Error reading "z/0.0": ZSTD_decompressStream() failed: Unknown frame descriptor', True),
        (
            'Error opening "zarr" driver: Error decoding b-tree node: ZSTD_decompressStream() failed: Data corruption',
            True,
        ),
        ("ZSTD_decompressStream() failed: Allocation error : not enough memory", False),
        ("RESOURCE_EXHAUSTED: Error decoding local file: Too many open files", False),
        ("FAILED_PRECONDITION: Error opening the driver: expected dtype float32", False),
        ("the DATA_LOSS: of another", False),
    ],
)
def test_which_words_of_tensorstore_prove_damage(text, damaged):
    outer = Exception("Encountered error while reading array index")
    outer.__cause__ = ValueError(text)
    assert (damage.proof(outer) is not None) == damaged


def test_the_newest_and_the_best_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step, metric in [(1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 1.5)]:
        checkpoints.save(step, {"params": tree(step)}, {}, metric)
    checkpoints.wait()
    assert checkpoints.steps() == [2, 4, 5] and checkpoints.best_step() == 2
    checkpoints.close()


def test_what_a_killed_run_was_deleting_is_deleted_at_the_next_start(tmp_path):
    save(tmp_path, [1])
    (tmp_path / "deleted-0" / "params").mkdir(parents=True)
    assert_is(restore(tmp_path), 1)
    assert (tmp_path / "deleted-0").exists(), "a reader changes nothing"
    assert_is(restore(tmp_path, read_only=False), 1)
    assert names(tmp_path) == ["1"]


def test_stray_folders_never_push_out_a_whole_step(tmp_path):
    save(tmp_path, [1])
    for stray in (5, 6, 7):
        (tmp_path / str(stray)).mkdir()
    checkpoints = Checkpoints(tmp_path, keep=2, asynchronous=False)
    checkpoints.save(8, {"params": tree(8)}, {})
    assert checkpoints.steps() == [1, 8]
    checkpoints.close()


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_save_that_fails_is_reported_before_the_next_one_and_the_last_good_step_stays(tmp_path, asynchronous):
    checkpoints = Checkpoints(tmp_path, asynchronous=asynchronous)
    checkpoints.save(1, {"params": tree(1)}, {"data": {"rows": 10}})
    checkpoints.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # a write beyond it fails as on a full disk
    try:
        with pytest.raises(CheckpointError, match=r"saving step 2 .* failed.*the last good step is 1"):
            big = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(512, 512)), jnp.float32)}
            checkpoints.save(2, {"params": big}, {})
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoints.steps() == [1]
    checkpoints.close()
    assert_is(restore(tmp_path), 1)


def test_what_the_check_raises_ends_the_search(tmp_path):
    save(tmp_path, [1, 2])

    def check(meta):
        assert meta["config"] == {"width": 4}
        raise ValueError("another model")

    with pytest.raises(ValueError, match="another model"):
        restore(tmp_path, check=check)
