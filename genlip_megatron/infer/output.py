"""Files of results, which appear when they are complete or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from genlip_megatron.convert.new_folder import hidden_folder


def check_output(target: Path) -> None:
    """Raise ValueError when a file could not be written there in the end: found before there is anything to lose."""
    if target.is_dir():
        raise ValueError(f"--output {target}: it is a folder; name a file")
    if not target.parent.is_dir():
        raise ValueError(f"--output {target}: there is no folder {target.parent}; make it first")
    if not os.access(target.parent, os.W_OK):
        raise ValueError(f"--output {target}: {target.parent} cannot be written to")


@contextlib.contextmanager
def new_file(target: Path) -> Iterator[TextIO]:
    """A file to write text to, which takes ``target``'s place when the block ends well; else nothing is left.

    What a killed process left of its own is removed by the next; SIGTERM ends as a failure does.

    Raises:
        ValueError: the disk cannot be written to.
    """
    try:
        with hidden_folder(target) as partial:
            with open(partial / target.name, "w", encoding="utf-8") as out:
                yield out
                out.flush()
                os.fsync(out.fileno())
            os.replace(partial / target.name, target)
    except OSError as error:
        raise ValueError(f"--output {target}: could not be written: {error}; nothing was left behind") from error
