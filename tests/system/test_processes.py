"""Do several processes compute what one device computes, and does a run go on with other processes after a fault?"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from lte_jax import sharding
from lte_jax.checkpoint import Checkpoints
from lte_jax.experiment import step_config
from lte_jax.metrics import read_metrics
from lte_jax.sharding import MeshConfig, make_mesh
from lte_jax.step import Builder
from lte_jax.train import _beside_params, train
from tests.system.test_launch import check_gone
from tests.system.tiny import DATA
from tests.system.worker import MIXERS, STEPS, experiment

ROOT = Path(__file__).parents[2]
SBATCH = ROOT / "experiments" / "launch" / "train.sbatch"
ONE = jax.devices()[:1]
TIMEOUT = 420
pytestmark = pytest.mark.usefixtures("shared_programs")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("xla")


@pytest.fixture(scope="module")
def single(tmp_path_factory, shared_programs):
    """The same run on one device, never stopped."""
    return on_one_device("lte", tmp_path_factory.mktemp("single") / "run")


def on_one_device(mixer, folder):
    assert train(experiment(mixer), folder, devices=ONE).finished
    return folder


def launch(workdir, cache, count, devices, *arguments, mixer="lte", fault="none:0:-1"):
    """The local launcher's result, and the seconds from the fault to its end (None without a fault)."""
    command = [*launcher(workdir, cache, count, devices, mixer), *arguments]
    environment = {**os.environ, "TEST_FAULT": fault}
    run = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    note = Path(workdir) / "fault.json"
    return run, time.time() - json.loads(note.read_text())["time"] if note.exists() else None


def launcher(workdir, cache, count, devices, mixer="lte"):
    return [
        *(sys.executable, "-m", "experiments.launch.local", f"--processes={count}", f"--simulate={devices}"),
        *("--module=tests.system.worker", f"--logs={workdir}-logs", "--"),
        *(f"--config={mixer}", f"--workdir={workdir}", f"--compilation_cache={cache}"),
    ]


def moments(folder, step, mixer):
    """Per parameter, Adam's first moment after a step, read on one device; after step 1 it is the clipped gradient."""
    state = Builder(step_config(experiment(mixer), DATA.length), make_mesh(MeshConfig(), ONE)).abstract_state()
    checkpoints = Checkpoints(folder / "checkpoints", read_only=True)
    found = checkpoints.restore({"training": _beside_params(state)}, step)
    checkpoints.close()
    assert found is not None
    leaves = jax.tree_util.tree_flatten_with_path(found.items["training"]["optimizer"])[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves if "mu" in jax.tree_util.keystr(path)}


def losses(folder):
    return {record["step"]: record["loss"] for record in read_metrics(folder)}


def check_same_run(found, expected, steps, mixer="lte"):
    """Losses of each step and the gradients of the first, to float32's rounding."""
    ours, theirs = losses(found), losses(expected)
    assert set(ours) >= set(range(1, steps + 1))
    for step in range(1, steps + 1):
        np.testing.assert_allclose(ours[step], theirs[step], rtol=3e-5)
    first = moments(expected, 1, mixer)
    assert len(first) > 8
    for name, leaf in moments(found, 1, mixer).items():
        assert np.linalg.norm(leaf - first[name]) <= 3e-5 * np.linalg.norm(first[name]) + 1e-9, name


def pids(folder):
    return [path.name.partition("-")[2] for path in folder.glob("pid-*")]


MESH = ("--set", "mesh.fsdp=2", "--set", "mesh.tensor=2")


def test_a_run_goes_through_a_killed_process_a_slurm_job_and_one_device_as_if_never_stopped(single, cache, tmp_path):
    """2 processes x 4 devices, one killed; then SLURM's 2 tasks x 1 device until SIGUSR1; then one process."""
    folder = tmp_path / "run"
    run, seconds = launch(folder, cache, 2, 4, *MESH, fault="kill:1:2")
    assert run.returncode == 137 and "process 1 ended with signal SIGKILL" in run.stderr, run.stderr[-3000:]
    assert "process 1: 4 x cpu" in run.stdout and "mesh data=2 x fsdp=2 x tensor=2 x sequence=1" in run.stdout
    assert seconds < 30, f"noticed after {seconds:.1f} s"
    print(f"\na killed process: the launch ended after {seconds:.1f} s")
    check_gone(pids(folder), 1.0)
    check_same_run(folder, single, 1)
    slurm_until_signal(folder, cache, tmp_path)
    result = train(experiment(), folder, devices=ONE)
    assert result.finished
    check_same_run(folder, single, STEPS)
    assert read_state(folder) == read_state(single) == {"rows": STEPS * 8}


def read_state(folder):
    checkpoints = Checkpoints(folder / "checkpoints", read_only=True)
    try:
        return checkpoints.read_meta(STEPS)["data"]
    finally:
        checkpoints.close()


def slurm_until_signal(folder, cache, tmp_path):
    """The sbatch file's own command, with srun and scontrol that do here what SLURM's do on a cluster."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, line in (
        ("srun", f'exec {sys.executable} {ROOT}/tests/system/fake_srun.py "$@"'),
        ("scontrol", f'echo "$@" >> {tmp_path}/scontrol'),
    ):
        (tools / name).write_text(f"#!/bin/bash\n{line}\n")
        (tools / name).chmod((tools / name).stat().st_mode | stat.S_IXUSR)
    job = str(socket_number())
    environment = {
        **os.environ,
        **{"PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": sys.executable, "SLURM_JOB_ID": job},
        **{"SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "2", "FAKE_TASKS": "2", "FAKE_DEVICES": "1"},
        **{"FAKE_MODULE": "tests.system.worker", "TEST_FAULT": "usr1:1:2"},
    }
    run = subprocess.run(
        ["bash", str(SBATCH), "--config=lte", f"--workdir={folder}", f"--compilation_cache={cache}"],
        **{"cwd": ROOT, "env": environment, "capture_output": True, "text": True, "timeout": TIMEOUT, "check": False},
    )
    assert run.returncode == 75, run.stdout[-2000:] + run.stderr[-3000:]
    assert "continuing" in run.stdout and "stopped by a signal" in run.stdout
    assert (tmp_path / "scontrol").read_text() == f"requeue {job}\n"


def socket_number():
    """A job number whose port, as JAX derives it, is free."""
    for number in range(1, 4096):
        with socket.socket() as found:
            if found.connect_ex(("localhost", number % 4096 + 61440)):
                return number
    raise AssertionError("no free port")


def test_the_sbatch_file_asks_slurm_for_what_its_command_uses():
    text = SBATCH.read_text()
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(\S*)$", text, flags=re.MULTILINE))
    assert len(options) == text.count("\n#SBATCH ")
    assert options["ntasks-per-node"] == options["gpus-per-node"] == "8"
    assert options["signal"] == "USR1@300"  # no B: SLURM sends it to the processes and not to the shell
    assert {"requeue", "open-mode", "time", "output", "nodes"} <= set(options)
    assert not text.startswith("#SBATCH") and text.index("#SBATCH") < text.index("\nset -u")
    subprocess.run(["bash", "-n", str(SBATCH)], check=True)


def test_devices_other_than_those_asked_for_are_refused():
    with pytest.raises(ValueError, match=r"mesh.devices=16, and this launch has 8 .*: check the launcher"):
        sharding.make_mesh(MeshConfig(devices=16))


@pytest.mark.exhaustive
@pytest.mark.parametrize("mixer", list(MIXERS))
@pytest.mark.parametrize("mesh", [{"fsdp": 4}, {"tensor": 2, "sequence": 2}, {"fsdp": 2, "tensor": 2}], ids=str)
def test_two_processes_of_four_give_the_steps_of_one_device_for_every_mixer(cache, tmp_path, mixer, mesh):
    expected = on_one_device(mixer, tmp_path / "single")
    flags = [part for name, size in mesh.items() for part in ("--set", f"mesh.{name}={size}")]
    run, _ = launch(tmp_path / "run", cache, 2, 4, *flags, mixer=mixer)
    assert run.returncode == 0, run.stderr[-3000:]
    check_same_run(tmp_path / "run", expected, STEPS, mixer)


@pytest.mark.exhaustive
def test_two_processes_stopped_and_continued_give_the_same_bits(cache, tmp_path):
    sums = []
    for name, fault in (("whole", "none:0:-1"), ("stopped", "usr1:0:2")):
        run, _ = launch(tmp_path / name, cache, 2, 4, *MESH, fault=fault)
        assert run.returncode == (0 if name == "whole" else 75), run.stderr[-3000:]
        if run.returncode:
            assert launch(tmp_path / name, cache, 2, 4, *MESH)[0].returncode == 0
        checkpoints = Checkpoints(tmp_path / name / "checkpoints", read_only=True)
        sums.append(checkpoints.read_meta(STEPS)["checksums"])
        checkpoints.close()
    assert sums[0] == sums[1]


@pytest.mark.exhaustive
@pytest.mark.parametrize(("count", "devices"), [(4, 2), (8, 1), (2, 2)])
def test_a_run_of_two_processes_goes_on_in_any_other_number(single, cache, tmp_path, count, devices):
    folder = tmp_path / "run"
    run, _ = launch(folder, cache, 2, 4, *MESH, fault="term:0:2")
    assert run.returncode == 75, run.stderr[-3000:]
    run, _ = launch(folder, cache, count, devices, "--set", "mesh.fsdp=2")
    assert run.returncode == 0, run.stderr[-3000:]
    check_same_run(folder, single, STEPS)
    assert read_state(folder) == read_state(single)


@pytest.mark.exhaustive
def test_an_error_in_one_process_ends_the_launch_at_once(cache, tmp_path):
    run, seconds = launch(tmp_path / "run", cache, 2, 4, *MESH, fault="error:1:2")
    assert run.returncode == 1 and "error: a bad record on one process" in run.stderr
    assert seconds < 30
    print(f"\nan error in one process: the launch ended after {seconds:.1f} s")


@pytest.mark.exhaustive
@pytest.mark.parametrize("process", [0, 1])
def test_a_full_disk_under_one_process_ends_the_launch_and_leaves_the_last_step(single, cache, tmp_path, process):
    """Though Orbax lets the processes wait for one another for ten minutes."""
    folder = tmp_path / "run"
    run, seconds = launch(folder, cache, 2, 4, *MESH, fault=f"disk:{process}:3")
    assert run.returncode == 1 and f"process {process} ended with exit code 1" in run.stderr, run.stderr[-3000:]
    assert process or re.search(r"error: saving step \d to .* failed", run.stderr)  # the other's log is full too
    assert seconds < 60
    print(f"\na full disk under process {process} of two: the launch ended after {seconds:.1f} s")
    assert train(experiment(), folder, devices=ONE).finished
    check_same_run(folder, single, STEPS)


@pytest.mark.exhaustive
def test_two_processes_agree_to_skip_a_truncated_step(single, cache, tmp_path):
    folder = tmp_path / "run"
    assert launch(folder, cache, 2, 4, *MESH, fault="kill:0:4")[0].returncode == 137
    newest = max(
        (path for path in (folder / "checkpoints").iterdir() if path.name.isdigit()), key=lambda x: int(x.name)
    )
    for file in (newest / "params").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:-20])
    run, _ = launch(folder, cache, 2, 4, *MESH)
    assert run.returncode == 0, run.stderr[-3000:]
    assert f"from step {int(newest.name) - 1}" in run.stdout and list(newest.parent.glob(f"damaged-{newest.name}-*"))
    check_same_run(folder, single, STEPS)


@pytest.mark.exhaustive
def test_without_a_launcher_the_heartbeat_ends_the_others(cache, tmp_path):
    """One of two processes is killed; the other ends by itself, and the last step is intact."""
    folder, port = tmp_path / "run", socket_number() % 4096 + 61440
    command = [sys.executable, "-m", "tests.system.worker", "--config=lte", f"--workdir={folder}"]
    command += [f"--compilation_cache={cache}", f"--coordinator=localhost:{port}", "--num_processes=2"]
    command += ["--heartbeat_seconds=6"]
    flags = "--xla_force_host_platform_device_count=1"
    environment = {**os.environ, "TEST_FAULT": "kill:1:3", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    with (tmp_path / "log").open("w") as log:
        running = [
            subprocess.Popen([*command, f"--process_id={index}"], cwd=ROOT, env=environment, stdout=log, stderr=log)
            for index in range(2)
        ]
        try:
            assert running[1].wait(TIMEOUT) == -signal.SIGKILL
            killed = time.monotonic()
            assert running[0].wait(120) != 0
            print(f"\nwithout a launcher, heartbeat 6 s: noticed after {time.monotonic() - killed:.1f} s")
        finally:
            for process in running:
                process.kill()
    checkpoints = Checkpoints(folder / "checkpoints", read_only=True)
    assert checkpoints.steps()[-1] in (2, 3)
    checkpoints.close()
    assert train(experiment(), folder, devices=ONE).finished


@pytest.mark.exhaustive
def test_a_signal_at_any_instant_ends_the_launch_and_nothing_is_lost(single, cache, tmp_path):
    """One run, stopped sixteen times: while Python starts, processes join, programs are restored, steps run, or end."""
    folder, second, rng = tmp_path / "run", tmp_path / "run-logs" / "process-1.log", np.random.default_rng(0)
    step = 0
    for seconds in [*rng.uniform(0, 6, 10), *rng.uniform(6, 20, 6)]:
        number = rng.choice([signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
        second.unlink(missing_ok=True)
        with (
            (tmp_path / "log").open("w") as log,
            subprocess.Popen(launcher(folder, cache, 2, 1), cwd=ROOT, stdout=log, stderr=log) as run,
        ):
            while not second.exists():
                assert run.poll() is None
                time.sleep(0.001)
            time.sleep(seconds)
            run.send_signal(number)
            told = time.monotonic()
            code = run.wait(150)
        before, step = step, max((int(path.name) for path in (folder / "checkpoints").glob("[0-9]*")), default=0)
        print(f"signal {number} after {seconds:.1f} s: {code} after {time.monotonic() - told:.1f} s, step {step}")
        assert step >= before and code in (75, 0 if step == STEPS else 75), (tmp_path / "log").read_text()[-3000:]
    assert launch(folder, cache, 2, 1)[0].returncode == 0
    check_same_run(folder, single, STEPS)
