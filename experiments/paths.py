"""How is a flag read that names a file or a folder?"""

from __future__ import annotations

import os

from absl import flags

flags.disclaim_key_flags()  # --help lists a flag with the module that asks for it


class _Path(flags.ArgumentParser):
    """With ``~`` as the home folder: shells leave it as it is inside ``--workdir=~/runs``."""

    def parse(self, argument: str) -> str:
        return os.path.expanduser(argument)


def define_path(name: str, default: str | None, help: str) -> None:
    """A flag that names a file or a folder."""
    flags.DEFINE(_Path(), name, default, help)
