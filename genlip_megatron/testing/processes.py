"""Training runs as real processes that start in milliseconds, forked from a process that has imported everything.

Importing torch and Megatron-Core takes seconds, too long for tests that kill hundreds of runs. A *zygote* is a process
that has only imported them. It has one thread, no process group and no DALI pipeline, because these do not survive a
fork (``reliability/test_processes.py`` checks this). It forks the ranks of a run on demand. Each rank has its own
session, its own output file and the environment that torchrun sets, and ends like any script.

Differences from torchrun: ranks share the hash seed and the random state after the imports, and rank 0 serves the
rendezvous, which under torchrun outlives the ranks.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import multiprocessing.connection
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from genlip_megatron.testing import CHECKOUT

TRAINING = "pretrain_genlip:main"
# Modules that training and its tests import late. Megatron-Core must come after ``megatron_patches.install``.
_IMPORTS = ("pytest", "torch.utils.tensorboard", "torch._dynamo", "pretrain_genlip", "genlip_megatron.train.loop")

_PORTS = range(15_000, 32_000)
_next_port = _PORTS.start + os.getpid() * 61 % len(_PORTS)


class Ended(NamedTuple):
    """How a process ended: its exit status, or minus the signal that ended it, and its output."""

    code: int
    output: str


@dataclass
class Job:
    """The ranks of one run, by rank."""

    zygote: Zygote
    pids: list[int]
    outputs: list[Path]
    codes: dict[int, int] = field(default_factory=dict)  # by rank; only ranks that have ended

    def output(self, rank: int) -> str:
        """The output of a rank so far."""
        return self.outputs[rank].read_text(errors="replace")

    def signal(self, rank: int, number: int) -> None:
        """Send a signal to a rank, unless it has ended."""
        self.zygote.receive(0)
        if rank not in self.codes:
            with contextlib.suppress(ProcessLookupError):  # it has ended since
                os.kill(self.pids[rank], number)

    def wait_for(self, text: str, rank: int = 0, timeout: float = 60) -> None:
        """Wait until a rank has printed ``text``.

        Raises:
            AssertionError: it ended first, or ``timeout`` seconds passed.
        """
        deadline = time.monotonic() + timeout
        while text not in self.output(rank):
            self.zygote.receive(0.02)
            late = time.monotonic() > deadline
            if (late or rank in self.codes) and text not in self.output(rank):
                self.kill()
                raise AssertionError(f"rank {rank} never printed {text!r}:\n{self.output(rank)}")

    def kill(self) -> None:
        """End all ranks at once."""
        for rank in range(len(self.pids)):
            self.signal(rank, signal.SIGKILL)

    def wait(self, timeout: float = 120, end_others: float | None = None) -> list[Ended]:
        """Wait until all ranks have ended; returns how each ended.

        Args:
            end_others: as torchrun does, end the other ranks this many seconds after one has ended with an error: by
                SIGTERM, and as long after that by SIGKILL. None: they keep running.

        Raises:
            AssertionError: ranks still run after ``timeout`` seconds; all are then killed.
        """
        deadline = time.monotonic() + timeout
        failed, terminated = 0.0, False
        while len(self.codes) < len(self.pids):
            self.zygote.receive(0.02)
            now = time.monotonic()
            if now > deadline:
                left = sorted(set(range(len(self.pids))) - self.codes.keys())
                self.kill()
                text = "\n".join(f"rank {rank}:\n{self.output(rank)}" for rank in range(len(self.pids)))
                raise AssertionError(f"ranks {left} still run after {timeout} s\n{text}")
            if end_others is not None and any(self.codes.values()):
                failed = failed or now
                if now > failed + 2 * end_others:
                    self.kill()
                elif now > failed + end_others and not terminated:
                    terminated = True
                    for rank in range(len(self.pids)):
                        self.signal(rank, signal.SIGTERM)
        return [Ended(self.codes[rank], self.output(rank)) for rank in range(len(self.pids))]


class Zygote:
    """The parent process of test runs, which starts ranks by forking.

    Args:
        folder: for the output files of ranks.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        ours, theirs = socket.socketpair()
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",  # numpy's OpenBLAS starts its threads at import
            "PYTHONPATH": os.pathsep.join([str(CHECKOUT), os.environ.get("PYTHONPATH", "")]),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "genlip_megatron.testing.processes", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            cwd=CHECKOUT,
            env=environment,
        )
        theirs.close()
        self._pipe = multiprocessing.connection.Connection(ours.detach())
        self.pid = self._process.pid
        self._started = 0
        self._jobs: dict[int, tuple[Job, int]] = {}  # by pid: its job and rank

    def start(
        self,
        world_size: int,
        argv: Sequence[str],
        env: dict[str, str] | None = None,
        target: str = TRAINING,
        restart: int = 0,
    ) -> Job:
        """Start ``world_size`` ranks that run ``target`` ("module:function", its result the exit status).

        Args:
            argv: the command line after the script's name.
            env: further environment variables of every rank.
            restart: torchrun's TORCHELASTIC_RESTART_COUNT.
        """
        port, job = free_port(), Job(self, [], [])
        for rank in range(world_size):
            self._started += 1
            output = self.folder / f"{self._started:05d}-rank{rank}.txt"
            output.touch()
            variables = {
                **rank_environment(rank, world_size, port),
                "LOCAL_WORLD_SIZE": str(world_size),
                "GROUP_RANK": "0",
                "TORCHELASTIC_RESTART_COUNT": str(restart),
                **(env or {}),
            }
            self._pipe.send((target, list(argv), variables, str(output)))
            while (pid := self._next()) is None:
                pass
            job.pids.append(pid)
            job.outputs.append(output)
            self._jobs[pid] = job, rank
        return job

    def run(
        self,
        world_size: int,
        argv: Sequence[str],
        env: dict[str, str] | None = None,
        timeout: float = 120,
        target: str = TRAINING,
        restart: int = 0,
        end_others: float | None = 1.0,
    ) -> list[Ended]:
        """Start ranks and wait for them; returns how each ended. See ``start`` and ``Job.wait``."""
        return self.start(world_size, argv, env, target, restart).wait(timeout, end_others)

    def _next(self) -> int | None:
        """Take one message: the pid of a started rank; or record the end of one and return None."""
        pid, code = self._pipe.recv()
        if code is None:
            return pid
        job, rank = self._jobs.pop(pid)
        job.codes[rank] = code
        return None

    def receive(self, timeout: float) -> None:
        """Record which ranks have ended; wait for the first at most ``timeout`` seconds."""
        while self._pipe.poll(timeout):
            self._next()
            timeout = 0

    def close(self) -> None:
        """End the zygote and all its ranks."""
        self._pipe.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What ``init_process_group`` reads, for ranks of one machine."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def free_port() -> int:
    """A free TCP port below the system's range for connections, and not one returned recently."""
    global _next_port
    while True:
        _next_port = _PORTS.start + (_next_port + 1 - _PORTS.start) % len(_PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("0.0.0.0", _next_port))
            except OSError:
                continue
        return _next_port


def _serve(descriptor: int) -> tuple[str, list[str], dict[str, str], str] | None:
    """Fork ranks on demand. Returns the order to run in each rank; at the end returns None in the zygote."""
    pipe = multiprocessing.connection.Connection(descriptor)
    ranks: dict[int, int] = {}  # pid by its pidfd, which is readable once the process has ended
    while True:
        for ready in multiprocessing.connection.wait([pipe, *ranks]):
            if ready is not pipe:
                pid = ranks.pop(typing.cast(int, ready))
                os.close(typing.cast(int, ready))
                _kill_group(pid)  # its helper processes; before waitpid, which frees the pid for others
                pipe.send((pid, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))
                continue
            try:
                order = pipe.recv()
            except EOFError:  # the tests have ended
                for pid in ranks.values():
                    _kill_group(pid)
                return None
            pid = os.fork()
            if not pid:
                os.setsid()
                pipe.close()
                for other in ranks:
                    os.close(other)
                return order
            ranks[os.pidfd_open(pid)] = pid
            pipe.send((pid, None))


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _become(target: str, argv: list[str], variables: dict[str, str], output: str) -> Callable[[], Any]:
    """Turn a forked process into a rank; returns the function that it runs."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    module, name = target.split(":")
    os.environ.update(variables)
    sys.argv = [f"{module}.py", *argv]
    return getattr(importlib.import_module(module), name)


def import_training() -> None:
    """Import all that ranks need, on one thread, and exclude it from garbage collection."""
    import torch

    torch.set_num_threads(1)
    from genlip_megatron import megatron_patches

    megatron_patches.install()
    for name in _IMPORTS:
        importlib.import_module(name)
    gc.freeze()  # a collection would copy the pages of modules that forked ranks share


def _main() -> int:
    import_training()
    order = _serve(int(sys.argv[1]))
    if order is not None:
        _end(_status_of(_become(*order)))
    return 0


def _status_of(function: Callable[[], Any]) -> int:
    """The exit status of a script that ends with ``sys.exit(function())``."""
    try:
        status = function()
    except SystemExit as leave:
        status = leave.code
    except BaseException:
        traceback.print_exc()
        return 1
    if status is None or isinstance(status, int):
        return status or 0
    print(status, file=sys.stderr)
    return 1


def _end(status: int) -> NoReturn:
    """End as a script does: join threads and run exit handlers. Skip the unloading of modules, which takes a second."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status & 0xFF)


if __name__ == "__main__":
    sys.exit(_main())
