"""Starts one training run as several processes on this machine, one per GPU, or on simulated CPU devices.

    python -m experiments.launch.local -- --config=lalte_1p4b --workdir=runs/lalte --set mesh.fsdp=8
    python -m experiments.launch.local --processes=2 --simulate=4 -- --config=text --workdir=runs/text

What follows ``--`` goes to ``experiments.train``. SIGTERM, SIGUSR1 and Ctrl-C are passed on, whenever they come: the
run saves and exits with 75; what has not ended after ``--grace`` seconds is killed. When one process fails, the others
are ended at once; when this one is killed, none stays behind. Exit codes: 0 all finished, 75 stopped by a signal with
everything saved, otherwise that of the first process that failed (128 + n after signal n). Process 0 writes here,
process i into ``LOGS/process-i.log``.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags

from pallas_kernels.visible_gpus import visible_gpus

INTERRUPTED = 75
ALONE_SECONDS = 10.0
"""How long the others may go on after a signal has ended a process that had no run to save: they may wait for it."""

FLAGS = flags.FLAGS


@dataclasses.dataclass(frozen=True)
class Launch:
    """What is started."""

    processes: int
    simulate: int
    """CPU devices of each process; 0 gives each a GPU."""
    arguments: tuple[str, ...]
    module: str = "experiments.train"
    logs: Path | None = None
    grace: float = 120.0
    """Seconds that processes have to save after a signal."""


def define_flags() -> None:
    flags.DEFINE_integer("processes", None, "How many; default the GPUs of this machine.")
    flags.DEFINE_integer("simulate", 0, "Give each process so many simulated CPU devices instead of a GPU.")
    flags.DEFINE_string("module", "experiments.train", "The program: it takes --coordinator, --process_id and so on.")
    flags.DEFINE_string("logs", None, "Folder of the other processes' output; default a temporary one.")
    flags.DEFINE_float("grace", 120.0, "Seconds to save in after a signal, then the processes are killed.")


def main(argv: list[str]) -> None:
    try:
        gpus = visible_gpus(os.environ)
        launch = Launch(
            processes=len(gpus) if FLAGS.processes is None else FLAGS.processes,
            simulate=FLAGS.simulate,
            arguments=tuple(argv[1:]),
            module=FLAGS.module,
            logs=Path(FLAGS.logs) if FLAGS.logs else None,
            grace=FLAGS.grace,
        )
        check(launch, gpus)
    except ValueError as error:
        sys.exit(f"error: {error}")
    sys.exit(run(launch, gpus))


def check(launch: Launch, gpus: Sequence[str]) -> None:
    """Raises ValueError where the launch cannot work on this machine."""
    if launch.processes < 1 and not launch.simulate:
        raise ValueError(f"this machine shows {len(gpus)} GPUs: give --processes and --simulate to run on its CPU")
    if launch.processes < 1 or launch.simulate < 0:
        raise ValueError(
            f"--processes={launch.processes} --simulate={launch.simulate}: at least one process, no fewer than 0 "
            "devices; change them"
        )
    if not launch.simulate and launch.processes > len(gpus):
        raise ValueError(
            f"--processes={launch.processes}, but this machine shows {len(gpus)} GPUs ({', '.join(gpus)}): "
            "lower it, set CUDA_VISIBLE_DEVICES, or give each process a CPU device by --simulate=1"
        )


def run(launch: Launch, gpus: Sequence[str]) -> int:
    """Starts the processes and stays until all have ended; returns the exit code."""
    logs = launch.logs or Path(tempfile.mkdtemp(prefix="lte_jax-logs-"))
    logs.mkdir(parents=True, exist_ok=True)
    group = _Group(launch.grace)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, group.note)
    coordinator = f"localhost:{_free_port()}"
    for index in range(launch.processes):
        if group.received:
            break  # those that are there wait for the others, and end by the signal
        group.processes.append(_start(launch, gpus, index, coordinator, logs))
    code = group.wait()
    if group.failed is not None:
        index, status, why = group.failed
        print(f"process {index} ended with {_describe(status)}{why}; the others were stopped", file=sys.stderr)
        if index:
            tail = (logs / f"process-{index}.log").read_text(errors="replace").splitlines()[-20:]
            print("\n".join([f"--- end of {logs}/process-{index}.log", *tail]), file=sys.stderr, flush=True)
    return code


def _start(launch: Launch, gpus: Sequence[str], index: int, coordinator: str, logs: Path) -> subprocess.Popen[bytes]:
    environment = dict(os.environ)
    devices = launch.processes * max(launch.simulate, 1)
    if launch.simulate:
        environment["JAX_PLATFORMS"] = "cpu"
        others = [flag for flag in environment.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in flag]
        environment["XLA_FLAGS"] = " ".join([*others, f"--xla_force_host_platform_device_count={launch.simulate}"])
    else:
        environment["CUDA_VISIBLE_DEVICES"] = gpus[index]
        environment.setdefault("JAX_PLATFORMS", "cuda")  # a process without its GPU fails instead of taking the CPU
    command = [
        *(sys.executable, "-m", launch.module, f"--coordinator={coordinator}"),
        *(f"--num_processes={launch.processes}", f"--process_id={index}", f"--set=mesh.devices={devices}"),
        *launch.arguments,
    ]
    with contextlib.ExitStack() as stack:
        output = stack.enter_context((logs / f"process-{index}.log").open("wb")) if index else None
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if index else None,
            start_new_session=True,  # Ctrl-C reaches the processes once, through this one
            preexec_fn=functools.partial(_die_with_parent, os.getpid()),
        )


def _die_with_parent(parent: int) -> None:
    """In the child: the kernel kills it when this launcher is gone, however that ended."""
    set_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
    ctypes.CDLL(None, use_errno=True).prctl(set_death_signal, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # it was gone before


class _Group:
    """The processes of one launch.

    Signals are only noted when they come, which may be while a process starts, and passed on by ``wait``, which knows
    all processes. One that a signal ends by its usual effect, passed on once, had no run to save: it has not begun one,
    or has left it saved.
    """

    def __init__(self, grace: float):
        self.processes: list[subprocess.Popen[bytes]] = []
        self.received: list[int] = []
        self.failed: tuple[int, int, str] | None = None
        """The process that explains how the launch ended, its exit code as Popen gives it, and words about it."""
        self._grace = grace
        self._passed_on: list[int] = []
        self._deadline = math.inf

    def note(self, number: int, _frame: object) -> None:
        self.received.append(number)

    def wait(self) -> int:
        """Returns when all have ended, with the exit code of the launch."""
        stopped = False
        while True:
            self._pass_on()
            codes = [process.poll() for process in self.processes]
            if not stopped and any(map(self._had_no_run, codes)):
                stopped = True
                self._deadline = min(self._deadline, time.monotonic() + ALONE_SECONDS)
            failed = [
                (index, code) for index, code in enumerate(codes) if code is not None and code not in (0, INTERRUPTED)
            ]
            if failed and self.failed is None and not stopped:
                # A process that died by a signal explains the others; they wait for it inside a step and are killed.
                self.failed = (*min(failed, key=lambda found: found[1] > 0), "")
                self._kill()
            if None not in codes:
                break
            if time.monotonic() > self._deadline:
                self._deadline = math.inf
                if stopped:
                    print("killed the processes that waited for one without a run to save", file=sys.stderr, flush=True)
                elif self.failed is None:
                    why = f": killed, as it had not ended {self._grace:g} s after a signal"
                    self.failed = codes.index(None), -signal.SIGKILL, why
                self._kill()
            time.sleep(0.05)
        if self.failed is not None:
            code = self.failed[1]
            return 128 - code if code < 0 else code
        return INTERRUPTED if stopped or INTERRUPTED in codes or not codes else 0

    def _pass_on(self) -> None:
        """Tells every process to save and stop."""
        while self.received:
            number = self.received.pop(0)
            told = signal.SIGTERM if number == signal.SIGINT else number
            self._passed_on.append(told)
            for process in self.processes:
                process.send_signal(told)  # if it has not ended
            self._deadline = min(self._deadline, time.monotonic() + self._grace)

    def _had_no_run(self, code: int | None) -> bool:
        return code is not None and self._passed_on.count(-code) == 1

    def _kill(self) -> None:
        for process in self.processes:
            process.kill()  # if it has not ended


def _describe(status: int) -> str:
    return f"exit code {status}" if status >= 0 else f"signal {signal.Signals(-status).name}"


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


if __name__ == "__main__":
    define_flags()
    app.run(main)
