"""Watchdog: a run that makes no step for too long says where each rank stands, and ends. A part of the start and a
validated batch count as a step does.

A rank that waits in a collective for one that has gone astray waits in C, where no exception reaches it, so a thread
of each rank watches the time since its last sign of life. When that is over it writes the stacks of all threads to
stderr, waits until the other ranks have done so too, and ends the process with status 20.

Two things keep a rank from doing this itself:

* A thread that never releases the interpreter's lock. Then a process beside this one (``faults/minder.py``), to which
  the watching thread shows signs of life, has the stacks written and kills it.
* SIGSTOP. The ranks of a machine know each other's processes; the lowest one that runs finds those that are stopped,
  and wakes them with SIGUSR2 waiting for them, which makes them write their stacks.

Time in which this process did not run at all (the machine slept, a scheduler suspended the whole job) does not count.
SIGUSR2 writes the stacks of a rank at any time, whether or not there is a limit.
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

from genlip_megatron.faults.exits import EXIT_HUNG, tell_torchrun
from genlip_megatron.faults.minder import Minder, stopped
from genlip_megatron.log import to_stderr

_STDERR = 2  # the descriptor, which a test or a library cannot have replaced
_GRACE = 5.0  # seconds from the stacks to the end; ranks' last signs of life are no further apart than this


@dataclass(frozen=True)
class Sibling:
    """A rank's process. ``started`` tells it from a later one with its number, or one of another container."""

    rank: int
    host: str
    pid: int
    started: int


def _started(pid: int) -> int:
    """When a process started, in clock ticks since boot; 0 where there is none or no /proc."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            # The command's name comes before, in parentheses, and may hold blanks.
            return int(file.read().rpartition(")")[2].split()[19])
    except OSError:
        return 0


def _signal_main_thread(pid: int, number: int) -> None:
    """Send a signal that a process's main thread takes before anything else, where the C library can.

    One that is sent to the whole process is taken by any thread, while the main one may be gone from where it stood.
    """
    tgkill = getattr(ctypes.CDLL(None), "tgkill", None)  # glibc 2.30
    if tgkill is None or tgkill(pid, pid, number):
        os.kill(pid, number)


def _this_process(rank: int) -> Sibling:
    return Sibling(rank, socket.gethostname(), os.getpid(), _started(os.getpid()))


def stacks(title: str) -> bytes:
    """The stacks of all threads of this process, each line marked with ``title``."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return b"".join(f"[{title}] ".encode() + line for line in file)


class Watchdog:
    """Ends this process when nothing calls ``beat`` for ``minutes``; 0 never ends it. Call ``listen`` before.

    It knows this process alone until ``meet`` tells it of the others.

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
        """From now on SIGUSR2 writes this process's stacks to stderr."""
        faulthandler.register(signal.SIGUSR2, file=_STDERR, all_threads=True)

    def meet(self) -> None:
        """Learn of the processes of all ranks. A collective over them."""
        self._mine = _this_process(torch.distributed.get_rank())
        everyone: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, self._mine)
        self._processes = everyone

    def beat(self) -> None:
        """A sign of life: something that counts as progress has been finished. Too late, it never returns: what was
        found hanging must not go on while it is being ended."""
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
        head = f"[{title}] no step finished for {self._quiet:.0f} s (faults.step_timeout); where its threads are:\n"
        os.write(_STDERR, head.encode() + stacks(title))
        tell_torchrun(f"no step finished for {self._quiet:.0f} s (faults.step_timeout); the stacks are in the log")
        self._wake_stopped()
        time.sleep(self._grace)
        os._exit(EXIT_HUNG)

    def _wake_stopped(self) -> None:
        """Let the ranks of this machine that are stopped write their stacks, if no lower one runs to see to it."""
        here = [p for p in self._processes if p.host == self._mine.host and _started(p.pid) == p.started]
        asleep = [p for p in here if p.pid != self._mine.pid and stopped(p.pid)]
        running = [p.rank for p in here if p not in asleep]
        if self._mine.rank != min(running, default=self._mine.rank):
            return
        for process in asleep:
            to_stderr(
                f"rank {process.rank} {process.host}:{process.pid} is stopped (SIGSTOP): woken to show its stacks"
            )
            _signal_main_thread(process.pid, signal.SIGUSR2)
            os.kill(process.pid, signal.SIGCONT)

    def close(self) -> None:
        """Watch no longer."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(5)
