"""``srun`` and ``scontrol`` for tests: starts SLURM's tasks on this machine with the variables that SLURM sets.

FAKE_TASKS tasks of FAKE_DEVICES simulated CPU devices. SIGUSR1 and SIGTERM go to all tasks, as SLURM sends them; the
exit code is the highest of theirs. ``experiments.train`` is replaced by the tests' own program.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time


def main(arguments: list[str]) -> int:
    if not arguments[0].startswith("--kill-on-bad-exit=1"):
        return 99
    count = int(os.environ["FAKE_TASKS"])
    command = [word.replace("experiments.train", os.environ["FAKE_MODULE"]) for word in arguments[1:]]
    shared = {
        **os.environ,
        "SLURM_NTASKS": str(count),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_TASKS_PER_NODE": str(count),
        "SLURM_NODEID": "0",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={os.environ['FAKE_DEVICES']}",
    }
    tasks = [
        subprocess.Popen(command, env={**shared, "SLURM_PROCID": str(index), "SLURM_LOCALID": str(index)})
        for index in range(count)
    ]

    def forward(number: int, _frame: object) -> None:
        for task in tasks:
            task.send_signal(number)

    signal.signal(signal.SIGUSR1, forward)
    signal.signal(signal.SIGTERM, forward)
    while any(task.poll() is None for task in tasks):
        if any(task.poll() not in (None, 0, 75) for task in tasks):
            for task in tasks:
                task.kill()
        time.sleep(0.05)
    return max(128 - task.returncode if task.returncode < 0 else task.returncode for task in tasks)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
