"""Exit codes of ``pretrain_genlip.py``, and how a launch that restarts its workers learns of them.

``torchrun --max-restarts`` takes every code but 0 for a failure and starts the workers again. That helps after a crash
or a hang, but a run that was told to stop, or that meets the same mistake each time, must end. So a worker that leaves
with such a code first writes it to ``<save>/final_exit``, and a worker that was started again after that leaves with
the same code before it imports torch: torchrun ends within seconds. A run that saves nothing has no such folder; then
the file is a temporary one of the machine, named after the launcher's process.

torchrun ends with a summary of its workers' ends. It shows what a worker has written to ``TORCHELASTIC_ERROR_FILE``,
and advice on tracebacks where that is missing; ``tell_torchrun`` writes the one line that matters there.

This module imports nothing of the project and no torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
import time
from pathlib import Path

from genlip_megatron import atomic_write
from genlip_megatron.log import log, to_stderr

EXIT_USER_ERROR = 2  # a setting or a file is wrong; starting again changes nothing
EXIT_PREEMPTED = 17  # told to stop, or out of time: saved, if it saves at all; start again to go on
EXIT_DATA_FAILURE = 18  # too many bad samples
EXIT_BAD_NUMBERS = 19  # NaN, Inf or spikes that rolling back did not cure
EXIT_HUNG = 20  # no step finished within faults.step_timeout
EXIT_REPLICAS_DIFFER = 21  # weights of data-parallel ranks differ
EXIT_NOT_SAVED = 22  # the last checkpoint could not be written
# Restarting the workers at once does not help after these. It does after the others: a hang, a flipped bit or a full
# disk may be gone, and the run goes on from the last good checkpoint.
FINAL = (EXIT_USER_ERROR, EXIT_PREEMPTED, EXIT_DATA_FAILURE, EXIT_BAD_NUMBERS)
FINAL_EXIT = "final_exit"
_MARK = re.compile(r"\d+ |$")
_PROG = "pretrain_genlip.py"
_reason = ""  # why this worker ends, as torchrun was told


class LeaveRun(Exception):
    """All ranks leave together, and nothing is saved.

    Attributes:
        status: the exit status, one of those above.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def tell_torchrun(reason: str, first: bool = True) -> None:
    """Have torchrun's summary give ``reason`` for this worker's end; the first one given stands.

    Args:
        reason: one line.
        first: False where another worker gives the same reason, whose end is then the root cause.
    """
    global _reason
    name = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if _reason or not name:
        return
    _reason, file = reason, Path(name)
    # torchrun takes the earliest for the root cause, by the second.
    when = str(int(time.time()) + (not first))
    message = reason if first else "the same error as another worker"
    content = json.dumps({"message": {"message": message, "extraInfo": {"timestamp": when}}})
    with contextlib.suppress(OSError):  # half a file would make torchrun itself crash
        atomic_write.write(file, content, sync=False)


def say_error(text: str, first: bool) -> None:
    """Say why the run ends: on stderr, if this process is the ``first`` to say so, and in torchrun's summary."""
    line = f"{_PROG}: error: {text}"
    if first:
        to_stderr(line)
    tell_torchrun(line, first)


def first_of_machine(text: str) -> bool:
    """Whether this worker is the first of its launch on this machine to ask this about ``text``.

    Needs no process group: torchrun's folders of workers are side by side.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if error_file is None:
        return int(os.environ.get("LOCAL_RANK", "0")) == 0
    said = Path(error_file).parent.parent / f"said_{hashlib.sha256(text.encode()).hexdigest()}"
    try:
        said.touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        pass  # better said twice than not at all
    return True


def mark_of(save: str | Path, launcher: int) -> Path:
    """The file that says how a launch ended: in the run's folder, or without one, of this machine and its launcher."""
    if save:
        return Path(save) / FINAL_EXIT
    return Path(tempfile.gettempdir()) / f"genlip_{FINAL_EXIT}.{os.getuid()}.{launcher}"


def mark_final(save: str | Path, code: int, stop_requested: bool = False) -> None:
    """Write that this launch is over with ``code``, if it is one of ``FINAL``.

    Every worker calls it before it leaves: torchrun acts on the first that is gone, on each node. Without torchrun it
    does nothing, since nobody restarts the worker.

    Args:
        save: the run's folder; empty when it saves nothing.
        stop_requested: end the launch whatever the code.
    """
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    if run_id is None or not (stop_requested or code in FINAL):
        return
    file = mark_of(save, os.getppid())
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists() and not _MARK.match(file.read_text(errors="replace")):
            raise FileExistsError("another program's file is in its place")
        atomic_write.write(file, f"{code} {run_id}\n{_reason}\n", os.environ.get("RANK", "0"), sync=False)
    except OSError as error:
        # The code itself matters more; the price is that torchrun restarts the workers in vain.
        log(f"{file} could not be written ({error}): torchrun may restart the workers", every_rank=True)


def final_exit(save: str | Path) -> int | None:
    """The code that workers of this same launch left with for good, or None if this worker is to run.

    torchrun is told their reason. The first worker of a new launch removes what an earlier launch left.
    """
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    if run_id is None:
        return None
    file = mark_of(save, os.getppid())
    try:
        mark, _, reason = file.read_text().partition("\n")
        code, _, marked_by = mark.strip().partition(" ")
        if not code.isdecimal():
            return None  # another program's file
        restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
        if marked_by == run_id and (restarted or _launcher_is_older_than(file)):
            status = int(code)
            tell_torchrun(reason.strip() or f"this launch is over with status {status}")
            return status
        if int(os.environ.get("RANK", "0")) == 0:
            file.unlink(missing_ok=True)
    except (OSError, ValueError):
        pass  # no such file, as is usual; one that says nothing keeps no run from starting
    return None


def age(pid: int) -> float:
    """Seconds since a process started, exact to 0.01; 0 where that cannot be known (not Linux)."""
    try:
        started = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, IndexError):
        return 0.0


def age_of_launch() -> float:
    """Seconds since torchrun started, or without it this process: restarts of workers do not begin anew."""
    return age(os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else os.getpid())


def _launcher_is_older_than(file: Path) -> bool:
    """Whether the process that started this one was there before ``file`` was written.

    On several nodes torchrun does not count a restart that another node asked for, so the restart count may be 0; and
    by hand every launch may have the same run id. Ages are compared, not times of day.
    """
    return age(os.getppid()) > time.time() - file.stat().st_mtime
