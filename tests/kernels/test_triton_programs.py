"""Are compiled Triton kernels kept on disk, found again only where they are the same, and mended where damaged?"""

import concurrent.futures
import errno
import json
import logging
import multiprocessing
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import triton_call, triton_launch, triton_programs
from pallas_kernels.triton_call import jit, tl
from tests.kernels import needs_triton

pytestmark = needs_triton

OFFSET = tl.constexpr(3) if tl else None


@jit
def _shift(x, BY: tl.constexpr):
    return x + BY + OFFSET


@jit
def _kernel(x_ptr, y_ptr, count, o_ptr, SIZE: tl.constexpr, BY: tl.constexpr):
    i = tl.arange(0, SIZE)
    x = tl.load(x_ptr + i, mask=i < count, other=0.0) + tl.load(y_ptr + i, mask=i < count, other=0.0)
    tl.store(o_ptr + i, _shift(x, BY), mask=i < count)


@jit
def _other(x_ptr, y_ptr, count, o_ptr, SIZE: tl.constexpr, BY: tl.constexpr):
    i = tl.arange(0, SIZE)
    x = tl.load(x_ptr + i, mask=i < count, other=0.0) * tl.load(y_ptr + i, mask=i < count, other=0.0)
    tl.store(o_ptr + i, _shift(x, BY), mask=i < count)


def source(kernel=None, dtype=jnp.float32, count=13, size=16, by=2, warps=4, stages=3, capability=90):
    array = jax.ShapeDtypeStruct((16,), dtype)
    constexprs = (("SIZE", size), ("BY", by))
    return triton_launch.source(kernel or _kernel, (array, array, count, array), constexprs, warps, stages, capability)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """JAX's folder of compiled programs, empty; nothing is known from earlier."""
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setattr(triton_programs, "_programs", {})
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    yield tmp_path / triton_programs.FOLDER
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture
def forget(monkeypatch):
    """Makes the process forget its programs and fail where it would compile one."""

    def forbidden(_):
        raise AssertionError("compiled again")

    def call(compile_again=False):
        monkeypatch.setattr(triton_programs, "_programs", {})
        monkeypatch.setattr(triton_programs, "translate", REAL if compile_again else forbidden)

    return call


REAL = triton_programs.translate


def test_a_kept_program_is_the_compiled_one_and_nothing_is_compiled(folder, forget):
    made = triton_programs.program(source())
    assert made.name == "_kernel" and ".target sm_90a" in made.ptx
    (path,) = folder.iterdir()
    forget()
    assert triton_programs.program(source()) == made
    with pytest.raises(AssertionError, match="compiled again"):
        triton_programs.program(source(by=5))
    assert [path] == list(folder.iterdir())


@pytest.mark.parametrize(
    "change",
    [
        dict(kernel=_other),
        dict(dtype=jnp.bfloat16),
        dict(count=1),
        dict(size=32),
        dict(by=2.0),
        dict(by=True),
        dict(warps=8),
        dict(stages=2),
        dict(capability=80),
    ],
    ids=lambda change: "-".join(change),
)
def test_whatever_changes_the_program_changes_its_name(change):
    assert triton_programs.key(source(**change)) != triton_programs.key(source())


def test_equal_numbers_of_other_types_are_other_constants():
    """1 == True == 1.0 in Python, but not in a kernel."""
    keys = {triton_programs.key(source(by=by)) for by in (1, True, 1.0)}
    assert len(keys) == 3


def test_a_value_that_the_program_does_not_know_does_not_change_its_name():
    assert triton_programs.key(source(count=13)) == triton_programs.key(source(count=14))


def test_the_name_is_that_of_another_process_and_knows_triton_and_its_settings(monkeypatch):
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        other = pool.submit(_name).result()
    assert other == _name()
    monkeypatch.setenv("TRITON_DISABLE_LINE_INFO", "1")
    with_setting = _name()
    monkeypatch.delenv("TRITON_DISABLE_LINE_INFO")
    monkeypatch.setattr(triton_programs.triton, "__version__", "0")
    assert len({with_setting, _name(), other}) == 3


def _name():
    return triton_programs.key(source())


def test_a_function_that_the_kernel_calls_is_part_of_its_name(tmp_path, monkeypatch):
    text = "from pallas_kernels.triton_call import jit, tl\n@jit\ndef inner(x):\n    return x {}\n"
    text += "@jit\ndef outer(x_ptr, o_ptr):\n    tl.store(o_ptr, inner(tl.load(x_ptr)))\n"
    monkeypatch.syspath_prepend(tmp_path)
    array, keys = jax.ShapeDtypeStruct((16,), jnp.float32), set()
    for name, tail in (("first_kernels", "+ 1"), ("second_kernels", "+ 2")):
        (tmp_path / f"{name}.py").write_text(text.format(tail))
        keys.add(triton_programs.key(triton_launch.source(__import__(name).outer, (array, array), (), 4, 3, 90)))
    assert len(keys) == 2


def _cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _exchange(path):
    """Another program's content, whole in itself."""
    entry = json.loads(path.read_text())
    entry["shared_bytes"] += 16
    path.write_text(json.dumps(entry))


DAMAGES = {
    "cut": _cut,
    "flipped": _flip,
    "changed": _exchange,
    "empty": lambda path: path.write_bytes(b""),
    "not a record": lambda path: path.write_text("[]"),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_program_is_reported_and_compiled_again(damage, folder, forget, caplog):
    made = triton_programs.program(source())
    (path,) = folder.iterdir()
    damage(path)
    forget(compile_again=True)
    with caplog.at_level(logging.WARNING, logger=triton_programs.__name__):
        assert triton_programs.program(source()) == made
    assert "compiling a Triton kernel again" in caplog.text and path.name in caplog.text
    if path.is_file():
        forget()
        assert triton_programs.program(source()) == made, "it was not mended"


def test_a_folder_that_cannot_be_written_is_reported_and_the_program_is_compiled(folder, caplog):
    folder.parent.mkdir(exist_ok=True)
    folder.write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING, logger=triton_programs.__name__):
        assert triton_programs.program(source()).name == "_kernel"
    assert "is not kept" in caplog.text


def test_whoever_shares_the_folder_may_read_a_program(folder):
    before = os.umask(0o022)
    try:
        triton_programs.program(source())
    finally:
        os.umask(before)
    (path,) = folder.iterdir()
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_full_disk_leaves_nothing_behind(folder, monkeypatch, caplog):
    def full(*_):
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(triton_programs.json, "dump", full)
    with caplog.at_level(logging.WARNING, logger=triton_programs.__name__):
        assert triton_programs.program(source()).name == "_kernel"
    assert "is not kept" in caplog.text and not list(folder.iterdir())


def test_nothing_is_kept_where_jax_keeps_nothing(folder):
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        assert triton_programs.disk() is None
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    assert triton_programs.disk() == folder
    for elsewhere in (None, "", "gs://bucket/programs"):
        jax.config.update("jax_compilation_cache_dir", elsewhere)
        assert triton_programs.disk() is None


def _write_often(path, number):
    made = triton_programs.Program("_kernel", number, str(number) * 100_000)
    for _ in range(100):
        triton_programs._write(path, made)


def test_many_writers_and_a_reader_never_meet_half_a_program(tmp_path, caplog):
    path = tmp_path / "program.json"
    _write_often(path, 0)
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(3, mp_context=spawn) as pool:
        writers = [pool.submit(_write_often, path, number) for number in range(3)]
        while not all(writer.done() for writer in writers):
            found = triton_programs._read(path)
            assert found is not None and set(found.ptx) == {str(found.shared_bytes)}
        assert all(writer.result() is None for writer in writers)
    assert not caplog.text and os.listdir(tmp_path) == ["program.json"]


@pytest.mark.parametrize("value", [2**31, 1.5, False, np.int32(3)])
def test_a_value_that_the_launcher_would_misread_is_refused(value):
    with pytest.raises(TypeError, match="cannot be passed by value"):
        source(count=value)


# --------------------------------------------------------------------------------------------------------- on a GPU


@jit
def _everything(x_ptr, absent_ptr, n, scale, one, sum_ptr, o_ptr, SIZE: tl.constexpr):
    """o = scale * x + one, row by row; sum += x (an output cleared before)."""
    row, plane = tl.program_id(0), tl.program_id(1)
    i = tl.arange(0, SIZE)
    at = (plane * tl.num_programs(0) + row) * n + i
    x = tl.load(x_ptr + at, mask=i < n, other=0.0)
    tl.store(o_ptr + at, scale * x + one, mask=i < n)
    tl.atomic_add(sum_ptr + i, x, mask=i < n)


def _run(x, scale):
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    total = jax.ShapeDtypeStruct(x.shape[2:], x.dtype)
    return triton_call.triton_call(
        _everything,
        x,
        None,
        x.shape[2],
        scale,
        1,
        out_shape=(total, shape),
        grid=x.shape[1::-1],
        zeroed_outputs=(0,),
        input_output_aliases={0: 1},
        SIZE=16,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_scalars_absent_arrays_aliases_and_cleared_outputs_arrive(scale):
    x = np.random.default_rng(0).integers(-8, 8, (3, 5, 13)).astype(np.float32)
    run = jax.jit(lambda x: _run(x + 1, scale))
    for _ in range(3):  # the sums would grow if they were not cleared
        total, o = run(x)
        np.testing.assert_array_equal(o, scale * (x + 1) + 1)
        np.testing.assert_array_equal(total, (x + 1).sum((0, 1)))


@pytest.mark.gpu
def test_a_second_program_around_the_same_kernel_compiles_no_kernel(folder, forget):
    x = np.ones((3, 5, 13), np.float32)
    first = jax.jit(lambda x: _run(x + 1, 0.25))(x)
    assert len(list(folder.iterdir())) == 1
    forget()
    for found, expected in zip(jax.jit(lambda x: _run(x * 2, 0.25))(x), first, strict=True):
        np.testing.assert_array_equal(found, expected)
