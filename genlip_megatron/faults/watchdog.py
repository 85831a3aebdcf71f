"""Watchdog: if no step finishes for too long, every rank writes its stacks and the run ends with status 20.

Parts of the set-up and batches of a validation count as steps.

A rank that waits in a collective waits in C, where no exception reaches it. So a thread of each rank watches the time
since the last ``beat``. After the limit it writes the stacks of all threads to stderr, waits until the other ranks have
done the same, and ends the process.

A rank cannot do this itself in two cases:

* A thread holds the GIL forever. Then the minder (``faults/minder.py``), a process next to the rank that expects
  regular beats from the watching thread, makes the rank write its stacks and kills it.
* SIGSTOP stopped the rank. The ranks of a machine know each other's processes. The lowest running rank finds the
  stopped ones, sends them SIGUSR2 and wakes them, so they write their stacks.

Time in which this process did not run at all (the machine slept, a scheduler suspended the job) does not count.
SIGUSR2 writes the stacks of a rank at any time, even without a limit.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import socket
import tempfile
import threading
import time
from dataclasses import dataclass
from typing import Any

import torch

from genlip_megatron.faults.exits import EXIT_HUNG, start_ticks, tell_torchrun
from genlip_megatron.faults.minder import Minder, stopped
from genlip_megatron.log import to_stderr

_STDERR = 2  # the file descriptor, because tests and libraries may replace sys.stderr
_GRACE = 5.0  # seconds from the stacks to the end; more than the ranks' last beats are apart


@dataclass(frozen=True)
class Sibling:
    """A rank's process. ``started`` tells it from a later process, or one of another container, with the same pid."""

    rank: int
    host: str
    pid: int
    started: int


def _signal_main_thread(pid: int, number: int) -> None:
    """Send a signal to a process's main thread, if the C library can.

    A signal to the whole process may reach another thread first, and the main thread may move on meanwhile.
    """
    tgkill = getattr(ctypes.CDLL(None), "tgkill", None)  # glibc 2.30
    if tgkill is None or tgkill(pid, pid, number):
        os.kill(pid, number)


def _this_process(rank: int) -> Sibling:
    return Sibling(rank, socket.gethostname(), os.getpid(), start_ticks(os.getpid()))


def stacks(title: str) -> bytes:
    """The stacks of all threads of this process, with ``title`` at the beginning of each line."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return b"".join(f"[{title}] ".encode() + line for line in file)


class Watchdog:
    """Ends this process if nothing calls ``beat`` for ``minutes``; 0 disables it. Call ``listen`` first.

    Until ``meet`` it knows only this process.

    Args:
        minutes: the limit.
        grace: seconds from the stacks to the end.
    """

    def __init__(self, minutes: float, grace: float = _GRACE) -> None:
        self._limit, self._grace = 60 * minutes, grace
        self._mine = _this_process(int(os.environ.get("RANK", "0")))
        self._processes = [self._mine]
        self._quiet = 0.0
        self._ended, self._expired = threading.Event(), False
        self._thread: threading.Thread | None = None
        if minutes:
            minder = Minder(self._limit + self._grace, self._grace)
            self._thread = threading.Thread(target=self._watch, args=[minder], name="watchdog", daemon=True)
            self._thread.start()

    @staticmethod
    def listen() -> None:
        """Make SIGUSR2 write this process's stacks to stderr."""
        faulthandler.register(signal.SIGUSR2, file=_STDERR, all_threads=True)

    def meet(self) -> None:
        """Learn of the processes of all ranks. A collective over them."""
        self._mine = _this_process(torch.distributed.get_rank())
        everyone: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, self._mine)
        self._processes = everyone

    def beat(self) -> None:
        """Report progress. After the limit it never returns: the process is being ended and must not continue."""
        if self._expired:
            self._ended.wait()
        self._quiet = 0.0

    def _watch(self, minder: Minder) -> None:
        period = min(1.0, self._limit / 10)
        before = time.monotonic()
        while not self._ended.wait(period):
            now = time.monotonic()
            self._quiet += min(now - before, 2 * period)
            before = now
            minder.beat()
            if self._quiet > self._limit:
                self._expire()
        minder.close()

    def _expire(self) -> None:
        self._expired = True
        title = f"rank {self._mine.rank} {self._mine.host}:{self._mine.pid}"
        head = f"[{title}] no step finished for {self._quiet:.0f} s (faults.step_timeout). Thread stacks:\n"
        os.write(_STDERR, head.encode() + stacks(title))
        tell_torchrun(f"no step finished for {self._quiet:.0f} s (faults.step_timeout); the log shows the stacks")
        self._wake_stopped()
        time.sleep(self._grace)
        os._exit(EXIT_HUNG)

    def _wake_stopped(self) -> None:
        """Make the stopped ranks of this machine write their stacks, if this is its lowest running rank."""
        here = [p for p in self._processes if p.host == self._mine.host and start_ticks(p.pid) == p.started]
        asleep = [p for p in here if p.pid != self._mine.pid and stopped(p.pid)]
        running = [p.rank for p in here if p not in asleep]
        if self._mine.rank != min(running, default=self._mine.rank):
            return
        for process in asleep:
            where = f"rank {process.rank} {process.host}:{process.pid}"
            to_stderr(f"{where} is stopped (SIGSTOP); waking it to show its stacks")
            _signal_main_thread(process.pid, signal.SIGUSR2)
            os.kill(process.pid, signal.SIGCONT)

    def close(self) -> None:
        """End the watching thread."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(5)
