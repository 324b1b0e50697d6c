"""How do the processes of a launch find one another, and which of a node's GPUs does each take?

One process per GPU and one per node both work, under SLURM, Open MPI, or by plain flags. JAX by itself gives each
process of a SLURM or Open MPI job one device, the one with its local rank: a process per node would silently train on
one GPU of eight, and a task that SLURM has bound to its GPU would ask for one that it cannot see. So the share is
worked out here, from the tasks on this node and the GPUs that this process sees:

    one task on the node, or fewer GPUs than tasks, or GPUs bound per task:  all that it sees
    otherwise:                                                              its equal share, in local order
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any

import jax

from pallas_kernels.visible_gpus import visible_gpus

HEARTBEAT_SECONDS = 60
"""After so long without a sign of life from one process, the others end."""


class LaunchError(ValueError):
    """A launch whose processes or devices do not fit; one line: the value, the rule, the fix."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where this process stands on its node."""

    launcher: str
    """"slurm" or "ompi", as JAX calls them."""
    local_rank: int
    tasks: int
    """Processes on this node."""
    bound: bool
    """The launcher shows each process its own GPUs alone."""


def join(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    heartbeat_seconds: int = HEARTBEAT_SECONDS,
    timeout_seconds: int = 300,
) -> None:
    """Joins the other processes; to be called before JAX sees a device.

    Args:
      coordinator, num_processes, process_id: "host:port" of process 0, and so on; all or none. With none, SLURM or Open
        MPI say them.
      heartbeat_seconds: see ``HEARTBEAT_SECONDS``.
      timeout_seconds: how long to wait for the others at the start.

    Raises:
      LaunchError: some flags without the others, no launcher to ask, or GPUs that the tasks cannot share.
    """
    # Its handler would swallow a SIGTERM that comes before the run's own (``signals.py``): the process would not end.
    jax.config.update("jax_enable_preemption_service", False)
    given = {"--coordinator": coordinator, "--num_processes": num_processes, "--process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    options: Any = {"heartbeat_timeout_seconds": heartbeat_seconds, "initialization_timeout": timeout_seconds}
    if not missing:
        assert coordinator is not None and num_processes is not None and process_id is not None
        if not 0 <= process_id < num_processes or not re.fullmatch(r".+:\d+", coordinator):
            raise LaunchError(
                f"--coordinator={coordinator}, --process_id={process_id}, --num_processes={num_processes}: the "
                "coordinator is host:port, and the id lies in [0, num_processes); change them"
            )
        # An empty list: this process takes every device that it sees (None would let a launcher around it decide).
        jax.distributed.initialize(coordinator, num_processes, process_id, local_device_ids=[], **options)
        return
    if len(missing) < len(given):
        raise LaunchError(f"{', '.join(missing)} is missing: give {', '.join(given)} together, or none of them")
    place = find_place(os.environ)
    if place is None:
        raise LaunchError(
            "--distributed, and neither SLURM nor Open MPI started this process: use srun or mpirun, "
            "`python -m experiments.launch.local`, or give --coordinator, --num_processes and --process_id"
        )
    devices = local_devices(place, len(visible_gpus(os.environ)))
    jax.distributed.initialize(cluster_detection_method=place.launcher, local_device_ids=devices, **options)


def find_place(environment: Mapping[str, str]) -> Place | None:
    """What SLURM or Open MPI say about this process; None without either."""
    if "SLURM_PROCID" in environment and "SLURM_STEP_NODELIST" in environment:
        node = int(environment.get("SLURM_NODEID", "0"))
        tasks = _tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", environment["SLURM_NTASKS"]))
        bound = any(name in environment for name in ("SLURM_GPUS_PER_TASK", "SLURM_STEP_GPUS_PER_TASK"))
        if "gpu" in environment.get("SLURM_TRES_PER_TASK", ""):
            bound = True
        return Place("slurm", int(environment["SLURM_LOCALID"]), tasks[min(node, len(tasks) - 1)], bound)
    if "OMPI_COMM_WORLD_RANK" in environment:
        tasks_here = int(environment.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1"))
        return Place("ompi", int(environment["OMPI_COMM_WORLD_LOCAL_RANK"]), tasks_here, bound=False)
    return None


def _tasks_per_node(text: str) -> list[int]:
    """SLURM's "8(x2),4" as [8, 8, 4]."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise LaunchError(f"SLURM_STEP_TASKS_PER_NODE={text!r}: not a count such as 8(x2),4; unset or correct it")
        found += [int(match[1])] * int(match[2] or 1)
    return found


def local_devices(place: Place, gpus: int) -> list[int]:
    """The numbers, among the visible ones, of the GPUs that this process takes; [] for all of them.

    Raises:
      LaunchError: the GPUs cannot be shared equally.
    """
    if not gpus or place.tasks == 1 or place.bound or gpus < place.tasks:
        return []
    if gpus % place.tasks:
        raise LaunchError(
            f"{place.tasks} tasks on this node see {gpus} GPUs: their number must divide the GPUs; change "
            "--ntasks-per-node, or bind the GPUs with --gpus-per-task"
        )
    share = gpus // place.tasks
    return list(range(place.local_rank * share, (place.local_rank + 1) * share))
