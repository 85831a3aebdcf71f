"""Stop requests: a signal, the stop file, or the time limit. The run then saves and exits with status 17.

Each rank's votes go into the one all-reduce of each step (``train/statistics.py``), so all ranks stop after the same
step. A run exits at most one step, one save and the rest of a running validation after the request; the file takes one
second longer. A request before the first step ends the run without a step.

Ctrl-C is SIGINT. A terminal sends it to plain ``python``; torchrun passes it on to its workers, which have their own
sessions.

A second signal ends its process at once without saving, even if the main thread waits in a collective: signals are
handled in their own thread. Launchers and schedulers may both pass a signal on, so one within a second of the first
counts as the same request.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from genlip_megatron.faults.exits import EXIT_PREEMPTED, age_of_launch, mark_final, tell_torchrun
from genlip_megatron.log import warn

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_SAME_REQUEST = 1.0  # seconds
_FILE_INTERVAL = 1.0
REASONS = ("a signal", "the stop file", "train.exit_duration_in_mins")
NO_STOP_VOTES = (0.0,) * len(REASONS)  # of a rank that need not stop


def describe_votes(votes: Iterable[Any]) -> str:
    """The ``REASONS`` that have a vote, in words; empty without votes.

    >>> describe_votes([1.0, 0.0, 1.0])
    'a signal, train.exit_duration_in_mins'
    """
    return ", ".join(reason for reason, vote in zip(REASONS, votes, strict=True) if vote)


def warn_if_killed_before_saving(step_seconds: float) -> None:
    """Warn if torchrun kills the workers before a step that is running when SIGTERM arrives can end."""
    given = float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30"))
    if "TORCHELASTIC_RUN_ID" in os.environ and step_seconds > given:
        warn(
            f"warning: TORCH_ELASTIC_SHUTDOWN_TIMEOUT = {given:.0f}: a step takes {step_seconds:.0f} s, and torchrun "
            f"kills the run {given:.0f} s after Ctrl-C or SIGTERM, before it can save. Export a larger value before "
            f"torchrun, such as {max(600, round(3 * step_seconds))}"
        )


class SignalThread:
    """Calls ``act`` in a separate thread for each of ``signals``: Python runs no handlers while the main thread waits
    in C. Create and close it in the main thread."""

    def __init__(self, signals: Iterable[signal.Signals], act: Callable[[int], None]) -> None:
        self._act, self._seen, self._acted = act, 0, 0
        self._pipe = os.pipe()
        for end in self._pipe:
            os.set_blocking(end, end == self._pipe[0])
        self._wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        self._handlers: dict[int, Any] = {number: signal.signal(number, self._wait) for number in signals}
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()

    def _wait(self, number: int, frame: Any) -> None:
        """Python's handler, in the main thread: waits until ``act`` has handled the signal."""
        self._seen += 1
        end = time.monotonic() + 1
        while self._acted < self._seen and time.monotonic() < end:
            time.sleep(0.001)

    def _watch(self) -> None:
        while data := os.read(self._pipe[0], 64):
            if data == b"\0":
                return
            for number in data:
                if number in self._handlers:
                    self._act(number)
                    self._acted += 1

    def close(self) -> None:
        """Restore the previous handlers."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.write(self._pipe[1], b"\0")
        self._thread.join(1)
        for end in self._pipe:
            os.close(end)


def leave_on_signal(save: str) -> SignalThread:
    """Make SIGUSR1 and Ctrl-C end this process as preempted until a ``StopRequest`` takes over.

    There is nothing to save yet, and torchrun must not take the exit for a crash. SIGTERM is not handled, because
    torchrun sends it to the other workers after one has crashed.

    Args:
        save: the run's folder; empty if the run saves nothing.
    """

    def leave(number: int) -> None:
        text = f"stop requested by {signal.Signals(number).name} outside of training: leaving at once"
        _say(text)
        tell_torchrun(text)
        mark_final(save, EXIT_PREEMPTED)
        os._exit(EXIT_PREEMPTED)

    return SignalThread((signal.SIGUSR1, signal.SIGINT), leave)


def _say(text: str) -> None:
    """Print on one process per machine. Not by ``print``, because the main thread may hold its lock."""
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        os.write(2, f"{text}\n".encode())


class StopRequest:
    """This rank's stop requests. Handles SIGTERM, SIGUSR1 and SIGINT until it is closed, in the main thread only.

    Args:
        file: stops the run when it appears; "": none.
        minutes: from the launch to the end; 0: no limit.
    """

    def __init__(self, file: str = "", minutes: float = 0.0) -> None:
        self._deadline = time.monotonic() + 60 * minutes - age_of_launch() if minutes else float("inf")
        # One process per machine looks for the file, because it may be on a local disk.
        looks = int(os.environ.get("LOCAL_RANK", "0")) == 0
        self._file = Path(file) if file and looks else None
        self._file_seen, self._next_look = False, 0.0
        self._signalled = 0.0  # when; 0: not yet
        self._signals = SignalThread(_SIGNALS, self._receive)

    def _receive(self, number: int) -> None:
        now = time.monotonic()
        if not self._signalled:
            self._signalled = now
            _say(f"stop requested by {signal.Signals(number).name}: leaving after the step in flight and a save; a "
                 "second signal ends the run at once without saving")  # fmt: skip
        elif now - self._signalled > _SAME_REQUEST:
            os._exit(128 + number)

    def votes(self) -> list[float]:
        """1.0 for each of ``REASONS`` that applies to this rank, else 0.0."""
        now = time.monotonic()
        if self._file is not None and not self._file_seen and now >= self._next_look:
            self._next_look = now + _FILE_INTERVAL
            self._file_seen = self._file.exists()
        return [float(self._signalled > 0), float(self._file_seen), float(now >= self._deadline)]

    def obey(self) -> None:
        """Rename the stop file to ``<name>.obeyed``, so it does not stop the next start. Call after the save.

        A launcher sees from the new name that the end was requested.
        """
        if self._file_seen and self._file is not None:
            with contextlib.suppress(FileNotFoundError):  # another machine's process was faster
                os.replace(self._file, self._file.with_name(f"{self._file.name}.obeyed"))

    def close(self) -> None:
        """Restore the previous signal handlers."""
        self._signals.close()
