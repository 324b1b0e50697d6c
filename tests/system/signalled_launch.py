"""The local launcher, with a signal to itself at one moment of its start: MOMENT NUMBER, then its own arguments.

none    before any process is there
first   while the first is started
both    while the second is started: the launcher has not noted it
ready   the same, when both wait for signals
"""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

from absl import app

from experiments.launch import local


def main() -> None:
    moment, number = sys.argv[1], int(sys.argv[2])
    begin = local._start

    def and_signal(launch: local.Launch, gpus: object, index: int, *rest: object):
        if moment == "none":
            signal.raise_signal(number)
        process = begin(launch, gpus, index, *rest)
        print("started", process.pid, flush=True)
        if index == {"first": 0, "both": 1, "ready": 1}.get(moment):
            folder = Path(launch.arguments[-1].partition("=")[2])
            while moment == "ready" and not all((folder / str(index)).exists() for index in range(2)):
                time.sleep(0.01)
            signal.raise_signal(number)
        return process

    local._start, local.ALONE_SECONDS = and_signal, 1.0
    local.define_flags()
    app.run(local.main, sys.argv[:1] + sys.argv[3:])


if __name__ == "__main__":
    main()
