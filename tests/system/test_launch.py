"""Does a launch start what was asked for, pass signals on, end as a whole, and leave no process behind?"""

from __future__ import annotations

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


def start(folder, do, count=3, **options):
    extra = [f"--{name}={value}" for name, value in options.items()]
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "experiments.launch.local", f"--processes={count}", "--simulate=2", *extra),
            *("--module=tests.system.sleeper", f"--logs={folder}/logs", "--", f"--do={do}", f"--folder={folder}"),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


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


def test_each_process_is_told_its_place_and_all_finish(tmp_path):
    launcher = start(tmp_path, "0")
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
def test_when_one_fails_the_others_end_at_once_with_its_code(tmp_path, do, code, words):
    launcher = start(tmp_path, do)
    _, err = launcher.communicate(timeout=60)
    assert launcher.returncode == code and words in err and "says" in err  # the end of its log is shown
    check_gone([note[0] for note in notes(tmp_path)], 1.0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signals_are_passed_on_and_the_launch_says_that_all_is_saved(tmp_path, number):
    launcher = start(tmp_path, "sleep", count=2)
    notes(tmp_path, 2)
    launcher.send_signal(number)
    launcher.communicate(timeout=30)
    assert launcher.returncode == 75


def test_a_process_that_does_not_stop_in_time_is_killed(tmp_path):
    launcher = start(tmp_path, "sleep,deaf", count=2, grace=0.3)
    pids = [note[0] for note in notes(tmp_path, 2)]
    launcher.send_signal(signal.SIGTERM)
    _, err = launcher.communicate(timeout=30)
    assert launcher.returncode == 137 and "process 1 ended with signal SIGKILL" in err
    check_gone(pids, 1.0)


def test_a_killed_launcher_leaves_no_process_behind(tmp_path):
    launcher = start(tmp_path, "deaf", count=2)
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
