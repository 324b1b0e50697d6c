"""Does a launch start what was asked for, pass signals on, end as a whole, and leave no process behind?"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.launch import local
from lte_jax import processes
from lte_jax.processes import LaunchError, Place
from pallas_kernels.visible_gpus import visible_gpus

ROOT = Path(__file__).parents[2]


@pytest.fixture
def start(tmp_path):
    """Starts launchers whose processes note themselves in the test's folder; what a test leaves running is killed."""
    with contextlib.ExitStack() as launchers:

        def launch(do, count=3, program=("experiments.launch.local",), **options):
            command = [sys.executable, "-m", *program, f"--processes={count}", "--simulate=2"]
            command += [f"--{name}={value}" for name, value in options.items()]
            command += ["--module=tests.system.sleeper", f"--logs={tmp_path}/logs"]
            command += ["--", f"--do={do}", f"--folder={tmp_path}"]
            launcher = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            launchers.enter_context(launcher)  # closes its pipes and waits for it
            launchers.callback(launcher.kill)  # before that; its processes die with it
            return launcher

        yield launch


def notes(folder, count=3):
    """What each process noted, once all have."""
    deadline = time.monotonic() + 60
    while not all((folder / str(index)).exists() for index in range(count)):
        assert time.monotonic() < deadline, "the processes did not start"
        time.sleep(0.02)
    return [(folder / str(index)).read_text().splitlines() for index in range(count)]


def alive(pid):
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def check_gone(pids, seconds=10.0):
    deadline = time.monotonic() + seconds
    while any(map(alive, pids)):
        assert time.monotonic() < deadline, "a process was left behind"
        time.sleep(0.02)


def test_each_process_is_told_its_place_and_all_finish(start, tmp_path):
    launcher = start("0")
    out, err = launcher.communicate(timeout=60)
    assert launcher.returncode == 0 and out == "process 0 says 0\n", err
    assert (tmp_path / "logs" / "process-2.log").read_text() == "process 2 says 0\n"
    found = notes(tmp_path)
    assert len({flag for note in found for flag in note if flag.startswith("--coordinator=localhost:")}) == 1
    for index, note in enumerate(found):
        assert note[1].endswith("--xla_force_host_platform_device_count=2")
        assert {f"--process_id={index}", "--num_processes=3", "--set=mesh.devices=6"} <= set(note)


@pytest.mark.parametrize(
    ("do", "code", "words"),
    [("sleep,3,sleep", 3, "process 1 ended with exit code 3"), ("sleep,sleep,die", 137, "2 ended with signal SIGKILL")],
)
def test_when_one_fails_the_others_end_at_once_with_its_code(start, tmp_path, do, code, words):
    launcher = start(do)
    _, err = launcher.communicate(timeout=60)
    assert launcher.returncode == code and words in err and "says" in err  # the end of its log is shown
    check_gone([note[0] for note in notes(tmp_path)], 1.0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signals_are_passed_on_and_the_launch_says_that_all_is_saved(start, tmp_path, number):
    launcher = start("sleep", count=2)
    notes(tmp_path, 2)
    launcher.send_signal(number)
    launcher.communicate(timeout=30)
    assert launcher.returncode == 75


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize(("moment", "count"), [("none", 1), ("first", 1), ("both", 2), ("ready", 2)])
def test_a_signal_while_processes_are_started_reaches_all_of_them(start, moment, count, number):
    """Where the launcher looks only later, and where a process has no handler yet."""
    launcher = start("sleep", count=2, program=("tests.system.signalled_launch", moment, str(int(number))))
    out, err = launcher.communicate(timeout=30)
    started = [line.split()[1] for line in out.splitlines() if line.startswith("started")]
    assert launcher.returncode == 75 and not err and len(started) == count
    assert not any(map(alive, started))


def test_a_process_that_had_no_run_ends_the_launch_though_another_waits_for_it(start):
    """The first does not end by itself, as in a step; the second has no handler."""
    launcher = start("deaf,plain", count=2, program=("tests.system.signalled_launch", "ready", "15"))
    out, err = launcher.communicate(timeout=30)
    assert launcher.returncode == 75 and err == "killed the processes that waited for one without a run to save\n"
    check_gone([line.split()[1] for line in out.splitlines() if line.startswith("started")], 1.0)


def test_a_signal_between_joining_and_the_run_ends_the_process():
    """JAX's own handler would note it, for a service that nobody asks."""
    code = """
import os, signal, socket
from lte_jax import processes
with socket.socket() as found:
    found.bind(("localhost", 0))
    port = found.getsockname()[1]
processes.join(f"localhost:{port}", 1, 0)
os.kill(os.getpid(), signal.SIGTERM)
"""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=False)
    assert run.returncode == -signal.SIGTERM, run.stderr


def test_a_second_signal_that_ends_a_process_before_it_has_saved_is_no_success(start, tmp_path):
    launcher = start("once", count=2)
    notes(tmp_path, 2)
    launcher.send_signal(signal.SIGTERM)
    while not all((tmp_path / f"{index}.told").exists() for index in range(2)):
        assert launcher.poll() is None
        time.sleep(0.02)
    launcher.send_signal(signal.SIGTERM)
    _, err = launcher.communicate(timeout=30)
    assert launcher.returncode == 143 and "ended with signal SIGTERM; the others were stopped" in err


def test_a_process_that_does_not_stop_in_time_is_killed(start, tmp_path):
    launcher = start("sleep,deaf", count=2, grace=0.3)
    pids = [note[0] for note in notes(tmp_path, 2)]
    launcher.send_signal(signal.SIGTERM)
    _, err = launcher.communicate(timeout=30)
    assert launcher.returncode == 137
    assert "process 1 ended with signal SIGKILL: killed, as it had not ended 0.3 s after a signal" in err
    check_gone(pids, 1.0)


def test_a_killed_launcher_leaves_no_process_behind(start, tmp_path):
    launcher = start("deaf", count=2)
    pids = [note[0] for note in notes(tmp_path, 2)]
    launcher.send_signal(signal.SIGKILL)
    launcher.communicate()
    check_gone(pids)


@pytest.mark.parametrize(
    ("count", "simulate", "gpus", "message"),
    [
        (0, 0, (), "shows 0 GPUs"),
        (3, 0, ("0", "1"), r"--processes=3, but this machine shows 2 GPUs \(0, 1\)"),
        (0, 2, (), "at least one process"),
    ],
)
def test_launches_that_cannot_work_are_refused(count, simulate, gpus, message):
    with pytest.raises(ValueError, match=message):
        local.check(local.Launch(count, simulate, ()), gpus)


SLURM = {"SLURM_PROCID": "9", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_LOCALID": "1", "SLURM_NTASKS": "16"}


@pytest.mark.parametrize(
    ("environment", "gpus", "devices"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_NODEID": "1"}, 8, [1]),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_GPUS_PER_TASK": "1"}, 1, []),  # each task sees its own
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)"}, 1, []),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x8)"}, 8, [4, 5, 6, 7]),
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_LOCALID": "0"}, 8, []),  # one per node: all GPUs
        ({"SLURM_STEP_TASKS_PER_NODE": "2,1", "SLURM_NODEID": "1", "SLURM_LOCALID": "0"}, 4, []),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)"}, 0, []),
    ],
)
def test_a_slurm_task_takes_its_share_of_the_gpus(environment, gpus, devices):
    place = processes.find_place({**SLURM, **environment})
    assert place is not None and place.launcher == "slurm"
    assert processes.local_devices(place, gpus) == devices


def test_gpus_that_the_tasks_cannot_share_are_refused():
    with pytest.raises(LaunchError, match="3 tasks on this node see 8 GPUs"):
        processes.local_devices(Place("slurm", 0, 3, bound=False), 8)
    with pytest.raises(LaunchError, match="not a count"):
        processes.find_place({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "eight"})
    for flags in (("h:1", None, None), (None, 2, None), ("h:1", 2, None)):
        with pytest.raises(LaunchError, match="is missing: give --coordinator, --num_processes, --process_id together"):
            processes.join(*flags)
    with pytest.raises(LaunchError, match=r"the id lies in \[0, num_processes\)"):
        processes.join("h:1", 2, 2)


def test_gpus_are_counted_as_the_process_sees_them():
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "0, 3,-1"}) == ["0", "3"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == visible_gpus({"JAX_PLATFORMS": "cpu"}) == []


def test_the_launcher_itself_does_without_jax():
    code = "import sys, experiments.launch.local; print('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).stdout == b"False\n"


def test_deterministic_sets_the_compilers_option(tmp_path):
    """Read back from the options that each program is compiled with."""
    code = """
import sys
from absl import flags
from experiments import train
train.define_flags()
flags.FLAGS(["train", "--config=x", "--workdir=x", "--compilation_cache="] + sys.argv[1:])
train._prepare()
import jax
from jax._src.lib import xla_client
options = xla_client.CompileOptions()
print(str(options.executable_build_options.debug_options))
"""
    for arguments, expected in ((["--deterministic"], True), ([], False)):
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        run = subprocess.run(
            [sys.executable, "-c", code, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        assert bool(re.search(r"xla_gpu_deterministic_ops: true", run.stdout)) == expected
