"""Minder: a small process beside a rank, for what no thread of the rank can see.

A thread that never releases the interpreter's lock keeps every other Python thread of its process from running, the
watchdog's too. So the watchdog sends a byte through a pipe now and then, and this process, when none comes for too
long, has the rank write the stacks of its threads (``faulthandler`` answers SIGUSR2 without the lock) and kills it.

Counted is time in which this process runs and the rank is not stopped: a timer within the rank has a point in time as
its end, and after a suspension ends a healthy rank before that can say a word.

It imports nothing of the project, to be there in 20 ms and in 10 MB.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time


class Minder:
    """The process, seen from the rank that it minds; SIGUSR2 must make the rank write its stacks to stderr.

    Args:
        limit: seconds without a sign of life after which the rank is killed.
        grace: seconds from its stacks to the end.
    """

    def __init__(self, limit: float, grace: float) -> None:
        theirs, self._pipe = os.pipe()
        os.set_blocking(self._pipe, False)
        words = [sys.executable, "-I", "-S", __file__, *map(str, (os.getpid(), theirs, limit, grace))]
        # A session of its own, since launchers signal whole groups of processes.
        self._process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=[theirs], start_new_session=True
        )
        os.close(theirs)

    def beat(self) -> None:
        """A sign of life: this thread has had the lock."""
        with contextlib.suppress(OSError):  # someone has killed the minder, or it is stopped
            os.write(self._pipe, b".")

    def close(self) -> None:
        """Mind no longer."""
        os.close(self._pipe)
        self._process.wait()


def stopped(pid: int) -> bool:
    """Whether a process is stopped by a signal; False where there is none, or no /proc."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            # The command's name comes before, in parentheses, and may hold blanks.
            return file.read().rpartition(")")[2].split()[0] in ("T", "t")
    except OSError:
        return False


def _mind(pid: int, pipe: int, limit: float, grace: float) -> None:
    period = min(1.0, limit / 10)
    quiet, before = 0.0, time.monotonic()
    while quiet <= limit:
        ready, _, _ = select.select([pipe], [], [], period)
        now = time.monotonic()
        if os.getppid() != pid or (ready and not os.read(pipe, 4096)):
            return  # it has ended, or wants no minder
        if ready:
            quiet = 0.0
        elif not stopped(pid):
            quiet += min(now - before, 2 * period)
        before = now
    print(
        f"process {pid}: no Python thread but one has run for {quiet:.0f} s; it is killed; where its threads are:",
        file=sys.stderr,
        flush=True,
    )
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGUSR2)
        time.sleep(grace)
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    _mind(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4]))
