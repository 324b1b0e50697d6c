"""A process for the launcher's tests: notes its number and flags, then does what ``--do`` says, without JAX."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path


def tell_once(note: Path) -> None:
    """As a run that goes on to the end of its step: a second signal has its usual effect."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    note.touch()


def main() -> None:
    flags = dict(argument.removeprefix("--").split("=", 1) for argument in sys.argv[1:] if "=" in argument)
    index, folder = int(flags["process_id"]), Path(flags["folder"])
    behaviour = flags["do"].split(",")
    what = behaviour[min(index, len(behaviour) - 1)]
    told = {"deaf": signal.SIG_IGN, "plain": signal.SIG_DFL, "once": lambda *_: tell_once(folder / f"{index}.told")}
    signal.signal(signal.SIGTERM, told.get(what, lambda *_: os._exit(75)))
    signal.signal(signal.SIGUSR1, lambda *_: os._exit(75))  # an exception is lost where Python ignores those
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
