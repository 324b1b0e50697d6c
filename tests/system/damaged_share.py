"""One of two processes: saves two steps, of which process 1's share of the second is then damaged, and restores.

``python -m tests.system.damaged_share FOLDER PORT PROCESS`` prints what was found after each kind of fault.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lte_jax import agreement
from lte_jax.checkpoint import CheckpointError, Checkpoints


def damage(step: Path, kind: str) -> None:
    """Of the largest file that process 1 wrote: it holds the rows of its device."""
    files = (step / "params" / "ocdbt.process_1" / "d").iterdir()
    victim = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(victim.read_bytes())
    if kind == "cut":
        data = data[:-100]
    elif kind == "flip":
        data[len(data) // 2] ^= 1
    victim.write_bytes(data)


def try_kind(folder: Path, kind: str) -> str:
    """What this process finds after such a fault of process 1."""
    process = jax.process_index()
    place = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
    values = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    tree = {"w": jax.make_array_from_callback(values.shape, place, lambda index: values[index])}
    checkpoints = Checkpoints(folder)
    for step in (1, 2):
        checkpoints.save(step, {"params": tree}, {})
    checkpoints.wait()
    with contextlib.ExitStack() as stack:
        if process == 1 and kind == "memory":
            failing = mock.patch.object(ocp.StandardCheckpointHandler, "restore", side_effect=MemoryError("none left"))
            stack.enter_context(failing)
        elif process == 1:
            damage(folder / "2", kind)
        agreement.exchange("damaged")
        try:
            wanted = jax.ShapeDtypeStruct(values.shape, values.dtype, sharding=place)
            found = checkpoints.restore({"params": {"w": wanted}})
        except CheckpointError as error:
            return str(error)
        finally:
            checkpoints.close()
    assert found is not None
    shards = found.items["params"]["w"].addressable_shards
    same = all(np.array_equal(shard.data, values[shard.index]) for shard in shards)
    return f"step {found.step}, {'the values that were saved' if same else 'other values'}"


def main() -> None:
    folder, port, process = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    jax.distributed.initialize(f"localhost:{port}", 2, process, heartbeat_timeout_seconds=10)
    for kind in ("cut", "flip", "memory"):
        print(f"{kind}: {try_kind(folder / kind, kind)}", flush=True)


if __name__ == "__main__":
    main()
