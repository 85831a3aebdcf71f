"""Exit codes of ``pretrain_genlip.py``, and how they reach torchrun.

``torchrun --max-restarts`` restarts the workers after every code but 0. That helps after a crash or a hang. It does
not help after a requested stop or a wrong setting. So a worker that leaves with such a final code first writes it to
``<save>/final_exit``. A restarted worker finds the file and leaves with the same code before it imports torch;
torchrun then ends within seconds. Without ``--save`` the file is in the machine's temporary folder, named after the
launcher's process.

With ``torchrun --nnodes 1:2`` a host may join. torchrun then ends the workers by SIGTERM, as for a stop, and starts
them again on more hosts. So the file also has the number of hosts, and a stop by fewer hosts does not end the launch.

torchrun ends with a traceback and a summary. The summary shows the text that a worker wrote to
``TORCHELASTIC_ERROR_FILE``, or advice on tracebacks if there is none. ``tell_torchrun`` writes one line there, and has
it printed once more as the last line.

This module imports no torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import subprocess
import tempfile
import time
from pathlib import Path

from genlip_megatron import atomic_write
from genlip_megatron.faults.minder import process_facts
from genlip_megatron.log import log, to_stderr

EXIT_USER_ERROR = 2  # a setting or a file is wrong; a restart changes nothing
EXIT_PREEMPTED = 17  # a stop was requested or time ran out; saved if --save is set; a new start resumes
EXIT_DATA_FAILURE = 18  # too many bad samples
EXIT_BAD_NUMBERS = 19  # NaN, Inf or spikes remain after rollbacks
EXIT_HUNG = 20  # no step finished within faults.step_timeout
EXIT_REPLICAS_DIFFER = 21  # weights of data-parallel ranks differ
EXIT_NOT_SAVED = 22  # the last checkpoint could not be written
# A restart does not help after these. It may after the others: the run resumes from the last good checkpoint, and a
# hang, a flipped bit or a full disk may be gone.
FINAL = (EXIT_USER_ERROR, EXIT_PREEMPTED, EXIT_DATA_FAILURE, EXIT_BAD_NUMBERS)
FINAL_EXIT = "final_exit"
_MARK = re.compile(r"\d+ |$")
_PROG = "pretrain_genlip.py"
# A launcher whose parent reads this shell's output before it reaps the launcher stays a zombie (Z).
_WAIT_AND_SAY = """
while state=$(sed -n 's/^State:.//p' "/proc/$1/status" 2>/dev/null) && [ -n "$state" ] && [ "${state#Z}" = "$state" ]
do sleep 0.05; done
echo "ended: $2" >&2
"""
_reason = ""  # the reason that torchrun's summary gives for this worker's end


class LeaveRun(Exception):
    """All ranks leave together without saving.

    Attributes:
        status: the exit status, one of those above.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def tell_torchrun(reason: str, first: bool = True) -> None:
    """Show ``reason`` for this worker's end in torchrun's summary; only the first call counts.

    Args:
        reason: one line.
        first: False if another worker gives the same reason; torchrun then names that worker as the root cause.
    """
    global _reason
    name = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if _reason or not name:
        return
    _reason, file = reason, Path(name)
    # torchrun takes the earliest timestamp, in seconds, as the root cause.
    when = str(int(time.time()) + (not first))
    message = reason if first else "the same error as another worker"
    content = json.dumps({"message": {"message": message, "extraInfo": {"timestamp": when}}})
    with contextlib.suppress(OSError):  # torchrun crashes on a partial file
        atomic_write.write(file, content, sync=False)
    if first:
        _say_last(reason.removeprefix(f"{_PROG}: error: "))


def _say_last(reason: str) -> None:
    """Print ``reason`` once more when torchrun has ended, below its traceback; one worker of the machine does it.

    torchrun cannot be told to print less, so a small shell waits for its end.
    """
    launcher, said = os.getppid(), Path(os.environ["TORCHELASTIC_ERROR_FILE"]).parents[2] / "said_last"
    try:
        if not re.search(rb"torchrun|torch\.distributed\.run", Path(f"/proc/{launcher}/cmdline").read_bytes()):
            return  # another launcher, which may live on
        said.touch(exist_ok=False)
        command = ["sh", "-c", _WAIT_AND_SAY, "sh", str(launcher), reason]
        subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    except OSError:
        pass  # the reason stands above the traceback too


def say_error(text: str, first: bool) -> None:
    """Print why the run ends to stderr if this process is the ``first`` to do so, and to torchrun's summary."""
    line = f"{_PROG}: error: {text}"
    if first:
        to_stderr(line)
    tell_torchrun(line, first)


def first_of_machine(text: str) -> bool:
    """Whether this worker is the first of its launch on this machine to call this with ``text``.

    Needs no process group: it looks into torchrun's folder for the launch.
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
        pass  # printing twice is better than not at all
    return True


def mark_of(save: str | Path, launcher: int) -> Path:
    """The file with a launch's final code: in the run's folder, or in the temporary folder without one."""
    if save:
        return Path(save) / FINAL_EXIT
    return Path(tempfile.gettempdir()) / f"genlip_{FINAL_EXIT}.{os.getuid()}.{launcher}"


def mark_final(save: str | Path, code: int, stop_requested: bool = False) -> None:
    """Record ``code`` as the final code of this launch if it is one of ``FINAL``.

    Every worker calls it before it leaves, because torchrun acts on the first exit on each node. Without torchrun it
    does nothing.

    Args:
        save: the run's folder; empty if the run saves nothing.
        stop_requested: record any code.
    """
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    if run_id is None or not (stop_requested or code in FINAL):
        return
    file = mark_of(save, os.getppid())
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists() and not _MARK.match(file.read_text(errors="replace")):
            raise FileExistsError("it is another program's file")
        atomic_write.write(file, f"{code} {run_id} {_hosts()}\n{_reason}\n", os.environ.get("RANK", "0"), sync=False)
    except OSError as error:
        log(f"{file} could not be written: {error}. torchrun may restart the workers", every_rank=True)


def final_exit(save: str | Path) -> int | None:
    """The final code of this launch, or None if this worker must run.

    Passes the recorded reason on to torchrun. Rank 0 of a new launch, or after a host has joined, removes the file.
    """
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    if run_id is None:
        return None
    file = mark_of(save, os.getppid())
    try:
        mark, _, reason = file.read_text().partition("\n")
        code, _, launch = mark.strip().partition(" ")
        marked_by, _, hosts = launch.rpartition(" ")
        if not code.isdecimal():
            return None  # another program's file
        restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
        joined = int(code) in (EXIT_PREEMPTED, EXIT_NOT_SAVED) and _hosts() > int(hosts)
        if marked_by == run_id and not joined and (restarted or _launcher_is_older_than(file)):
            status = int(code)
            tell_torchrun(reason.strip() or f"this launch ended with status {status}")
            return status
        if int(os.environ.get("RANK", "0")) == 0:
            file.unlink(missing_ok=True)
    except (OSError, ValueError):
        pass  # usually there is no such file; an unreadable one must not prevent the run
    return None


def _hosts() -> int:
    """Hosts of this start of the workers."""
    return int(os.environ.get("GROUP_WORLD_SIZE", "1"))


def start_ticks(pid: int) -> int:
    """When a process started, in clock ticks since boot; 0 if unknown (no such process, or not Linux)."""
    facts = process_facts(pid)
    return int(facts[19]) if facts else 0


def age(pid: int) -> float:
    """Seconds since a process started, exact to 0.01; 0 if unknown."""
    ticks = start_ticks(pid)
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK") if ticks else 0.0


def age_of_launch() -> float:
    """Seconds since torchrun started, also after restarts of workers; without torchrun, since this process started."""
    return age(os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else os.getpid())


def _launcher_is_older_than(file: Path) -> bool:
    """Whether the launcher of this process started before ``file`` was written.

    With several nodes torchrun does not count a restart that another node requested, so the restart count may be 0.
    Launches by hand may share a run id. Compares ages, not times of day.
    """
    return age(os.getppid()) > time.time() - file.stat().st_mtime
