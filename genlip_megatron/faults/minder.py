"""Minder: a small process next to each rank that notices when a thread holds the GIL forever.

Such a thread blocks all other Python threads of its process, including the watchdog's. So the watchdog regularly sends
a byte through a pipe to the minder. If none arrives for too long, the minder makes the rank write its stacks
(``faulthandler`` answers SIGUSR2 without the GIL) and kills it.

Only time in which the minder runs and the rank is not stopped counts. A timer in the rank would count a suspension too,
and end a healthy rank after it.

The minder imports nothing of the project, so it starts in 20 ms and needs 10 MB.
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
    """The rank's handle of its minder. SIGUSR2 must make the rank write its stacks to stderr.

    Args:
        limit: seconds without a ``beat`` after which the rank is killed.
        grace: seconds from writing the stacks to the kill.
    """

    def __init__(self, limit: float, grace: float) -> None:
        theirs, self._pipe = os.pipe()
        os.set_blocking(self._pipe, False)
        words = [sys.executable, "-I", "-S", __file__, *map(str, (os.getpid(), theirs, limit, grace))]
        # A new session, because launchers signal whole process groups.
        self._process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=[theirs], start_new_session=True
        )
        os.close(theirs)

    def beat(self) -> None:
        """Show that a Python thread has had the GIL."""
        with contextlib.suppress(OSError):  # the minder was killed or stopped
            os.write(self._pipe, b".")

    def close(self) -> None:
        """End the minder."""
        os.close(self._pipe)
        self._process.wait()


def process_facts(pid: int) -> list[str]:
    """The fields of /proc/<pid>/stat from the state on; empty if the process or /proc does not exist."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()  # the command's name, in parentheses, may contain blanks
    except OSError:
        return []


def stopped(pid: int) -> bool:
    """Whether a process is stopped by a signal; False if unknown."""
    return process_facts(pid)[:1] in (["T"], ["t"])


def _mind(pid: int, pipe: int, limit: float, grace: float) -> None:
    # Some schedulers signal every process of a job. Only the rank decides what a stop request means.
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    period = min(1.0, limit / 10)
    quiet, before = 0.0, time.monotonic()
    while quiet <= limit:
        ready, _, _ = select.select([pipe], [], [], period)
        now = time.monotonic()
        if os.getppid() != pid or (ready and not os.read(pipe, 4096)):
            return  # the rank has ended or closed the pipe
        if ready:
            quiet = 0.0
        elif not stopped(pid):
            quiet += min(now - before, 2 * period)
        before = now
    text = f"process {pid}: GIL held for {quiet:.0f} s; killing the process. Thread stacks:"
    print(text, file=sys.stderr, flush=True)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGUSR2)
        time.sleep(grace)
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    _mind(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4]))
