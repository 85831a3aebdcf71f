"""Requests to stop: a signal, a stop file, or the end of the time a run may take. A run that is told to stop saves.

What this rank has seen goes into the one all-reduce of each step (``train/guard.py``), so that all ranks stop after the
same step; they save and exit with status 17. From the request to the exit it takes at most the step in flight and a
save (with the file, a second more); a validation that is under way is finished first. A request that is there before
the first step ends the run without one.

A second signal ends its process at once, without saving, even where the main thread waits in a collective: the signal
number comes through a pipe to a thread of its own. Launchers and schedulers both pass signals on, so that what comes
within a second of the first is the same request.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from genlip_megatron.config import RunConfig
from genlip_megatron.faults.exits import age_of_launch

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_SAME_REQUEST = 1.0  # seconds
_FILE_INTERVAL = 1.0
REASONS = ("a signal", "the stop file", "train.exit_duration_in_mins")


def told_by(wishes: Iterable[Any]) -> str:
    """Those of ``REASONS`` that are wished for, in words; empty for none.

    >>> told_by([1.0, 0.0, 1.0])
    'a signal, train.exit_duration_in_mins'
    """
    return ", ".join(reason for reason, wish in zip(REASONS, wishes, strict=True) if wish)


def stop_file(config: RunConfig) -> Path | None:
    """The file whose appearance stops the run; None where there is neither a name nor a folder for it."""
    if config.faults.stop_file:
        return Path(config.faults.stop_file)
    return Path(config.checkpoint.save) / "stop" if config.checkpoint.save else None


class StopRequest:
    """What this rank has been told; takes over SIGTERM and SIGUSR1 until it is closed. In the main thread only."""

    def __init__(self, config: RunConfig) -> None:
        minutes = config.train.exit_duration_in_mins
        self._deadline = time.monotonic() + 60 * minutes - age_of_launch() if minutes else float("inf")
        # One process a machine looks; each machine looks, since the file may be on a disk of its own.
        looks = int(os.environ.get("LOCAL_RANK", "0")) == 0
        self._file = stop_file(config) if looks else None
        self._file_seen, self._next_look = False, 0.0
        self._signalled = False
        self._pipe = os.pipe()
        for end in self._pipe:
            os.set_blocking(end, end == self._pipe[0])
        self._wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        self._handlers: dict[int, Any] = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        self._thread = threading.Thread(target=self._watch, name="stop", daemon=True)
        self._thread.start()

    def _receive(self, number: int, frame: Any) -> None:
        """Python's part of the handler, which runs when the main thread gets to it; the pipe's comes at once."""
        self._signalled = True

    def _watch(self) -> None:
        first = 0.0
        while data := os.read(self._pipe[0], 64):
            if data == b"\0":
                return
            for number in data:
                if number not in _SIGNALS:
                    continue
                if first and time.monotonic() - first > _SAME_REQUEST:
                    os._exit(128 + number)
                first = first or time.monotonic()
                self._signalled = True

    def votes(self) -> list[float]:
        """1 for each of ``REASONS`` that this rank has to stop, else 0."""
        now = time.monotonic()
        if self._file is not None and not self._file_seen and now >= self._next_look:
            self._next_look = now + _FILE_INTERVAL
            self._file_seen = self._file.exists()
        return [float(self._signalled), float(self._file_seen), float(now >= self._deadline)]

    def obey(self) -> None:
        """Rename the stop file, which would stop the next start too, to ``<name>.obeyed``, by which a launcher sees
        that the end was wanted; call when the run has saved."""
        if self._file_seen and self._file is not None:
            with contextlib.suppress(FileNotFoundError):  # another machine's process was faster
                os.replace(self._file, self._file.with_name(f"{self._file.name}.obeyed"))

    def close(self) -> None:
        """Give the signals back."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.write(self._pipe[1], b"\0")
        self._thread.join(1)
        for end in self._pipe:
            os.close(end)
