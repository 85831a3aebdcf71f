"""The lock of a folder of checkpoints: one run at a time saves to it, and all its ranks see the same folder."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from genlip_megatron.checkpoint.paths import NotSaved

LOCK = "run.lock"


def acquire(
    root: str | Path, patience: float = 0.0, log: Callable[[str], None] = lambda text: None
) -> tuple[IO[str], str]:
    """Create the folder and lock it; returns (lock file, its text). The lock ends when the file is closed.

    On a file system without locks other processes are not kept out.

    Args:
        patience: seconds to wait for another process to release the folder.

    Raises:
        NotSaved: another process holds the lock.
        OSError: the folder cannot be written to.
    """
    Path(root).mkdir(parents=True, exist_ok=True)
    file = open(Path(root) / LOCK, "a+", errors="replace")  # noqa: SIM115
    try:
        _lock(file, root, patience, log)
        file.seek(0)
        if (found := file.read()) and not re.match(r"\S+ process \d|\0", found):  # \0 after a power cut
            raise NotSaved(f"{Path(root) / LOCK} was not written by a run. Move it, or choose another folder")
        text = f"{socket.gethostname()} process {os.getpid()} {secrets.token_hex(8)}\n"
        file.truncate(0)
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    except BaseException:
        file.close()
        raise
    return file, text


def _lock(file: IO[str], root: str | Path, patience: float, log: Callable[[str], None]) -> None:
    end, logged = time.monotonic() + patience, False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            file.seek(0)
            owner = file.read().rpartition(" ")[0] or "another process"
            if time.monotonic() >= end:
                raise NotSaved(f"{owner} is saving to {root}. End it, or choose another folder") from None
            if not logged:
                log(f"waiting up to {patience:.0f} s for {owner}, which is saving to {root}")
                logged = True
            time.sleep(0.2)
        except OSError:  # no locks here
            return


def why_not_shared(root: str | Path, text: str) -> str | None:
    """Why this process does not see the folder whose lock file says ``text``, or None if it does."""
    try:
        found = (Path(root) / LOCK).read_text()
    except OSError as error:
        found = str(error)
    return None if found == text else f"{socket.gethostname()} does not see rank 0's folder. All ranks must share it"
