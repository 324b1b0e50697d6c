"""A process for the launcher's tests: notes its number and flags, then does what ``--do`` says, without JAX."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path


def main() -> None:
    flags = dict(argument.removeprefix("--").split("=", 1) for argument in sys.argv[1:] if "=" in argument)
    index, folder = int(flags["process_id"]), Path(flags["folder"])
    behaviour = flags["do"].split(",")
    what = behaviour[min(index, len(behaviour) - 1)]
    signal.signal(signal.SIGTERM, signal.SIG_IGN if what == "deaf" else lambda *_: sys.exit(75))
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
    note = folder / f".{index}"
    note.write_text("\n".join([str(os.getpid()), os.environ.get("XLA_FLAGS", ""), *sys.argv[1:]]))
    note.rename(folder / str(index))
    print(f"process {index} says {what}", flush=True)
    if what.isdigit() or what == "die":
        while len([path for path in folder.iterdir() if path.name.isdigit()]) < int(flags["num_processes"]):
            time.sleep(0.01)  # the others are all there, and none has ended
        if what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        sys.exit(int(what))
    time.sleep(60)


if __name__ == "__main__":
    main()
