"""Who is at work in a folder? One process at a time, where the file system has locks."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from pathlib import Path
from typing import IO

LOCK = ".lock"


def take(folder: Path, flag: str, error: type[ValueError]) -> IO[str]:
    """The lock on a folder, until it is closed; the kernel releases it when this process ends, however.

    Args:
      flag: which names another folder, for the message.
      error: raised where another process is at work there (named).
    """
    lock = (folder / LOCK).open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip() or "another launch"
        lock.close()
        raise error(
            f"{folder} is in use by {holder}: two launches would overwrite each other; wait until that one has ended, "
            f"stop it, or name another {flag}"
        ) from None
    except OSError as failure:
        print(f"WARNING: {folder}: its file system has no locks ({failure.strerror}); start no second launch in it")
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    lock.flush()
    return lock
