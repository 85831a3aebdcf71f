"""Crash points: a process is killed, or its disk fails, at the n-th file operation below a folder.

Python's file operations are counted where they reach the operating system: opening for writing, each ``write`` (a
buffered file writes when its buffer is full, flushed or closed), truncating, closing, syncing, creating folders,
renaming and removing. All threads count. The disk does not change between two operations, so killing after each of
them covers every state that a save passes through.

Not counted: other ways to write (descriptors of ``os.open``, links, C libraries). ``unseen_files`` finds them.
"""

from __future__ import annotations

import builtins
import errno
import functools
import io
import json
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from genlip_megatron.checkpoint import paths as checkpoints

VARIABLE = "TEST_CRASH_PLAN"
# os.makedirs, pathlib and shutil end up in these functions of os.
_KINDS = {
    "mkdir": "mkdir",
    "rmdir": "rmdir",
    "unlink": "remove",
    "remove": "remove",
    "rename": "rename",
    "replace": "rename",
    "fsync": "sync",
}
_WITH_TARGET = ("rename", "exchange")
_FREES_SPACE = ("remove", "rmdir")
# A full disk refuses operations that may need a block; with delayed writes also sync and close.
_SPARED_BY_A_FULL_DISK = (*_FREES_SPACE, *_WITH_TARGET)


@dataclass(frozen=True)
class Plan:
    """What happens to file operations in or below ``folder``.

    Attributes:
        log: a file that gets one line of JSON per operation.
        action: "count"; "kill": SIGKILL after operation ``at``; "tear": SIGKILL before it, but half of a write arrives;
            "fail": it raises OSError; a write does so after its first half.
        at: the number of the operation, from 1.
        error: "ENOSPC" (only operations that may need space fail) or "EIO".
        lasting: with fail, later operations fail too; on a full disk until something is removed.
        rank: only on this rank.
    """

    folder: str
    log: str
    action: str = "count"
    at: int = 0
    error: str = "ENOSPC"
    lasting: bool = False
    rank: int = 0

    def env(self) -> dict[str, str]:
        """The environment variable that gives a process this plan."""
        return {VARIABLE: json.dumps(asdict(self))}

    def operations(self) -> list[Operation]:
        """The operations of the log, in order."""
        lines = Path(self.log).read_text().splitlines() if Path(self.log).exists() else []
        return [Operation(**json.loads(line)) for line in lines]


@dataclass(frozen=True)
class Operation:
    """One file operation; paths are relative to the plan's folder.

    >>> str(Operation("write", "iter_1/common.pt", size=4096))
    'write 4096 bytes of iter_1/common.pt'
    """

    kind: str
    path: str
    size: int = 0
    target: str = ""

    def __str__(self) -> str:
        if self.kind == "write":
            return f"write {self.size} bytes of {self.path}"
        return f"{self.kind} {self.path}" + (f" to {self.target}" if self.target else "")


def unseen_files(folder: Path, operations: list[Operation]) -> list[str]:
    """Files now in or below ``folder`` whose size differs from what the operations wrote, so the hooks missed a write.

    Follows renames. The folder must have been empty when counting began.
    """
    written: dict[str, int] = {}
    for operation in operations:
        if operation.kind in ("create", "truncate"):
            written[operation.path] = operation.size
        elif operation.kind == "write":
            written[operation.path] = written.get(operation.path, 0) + operation.size
        elif operation.kind == "rename":
            source, target = operation.path, operation.target
            for path in [path for path in written if path == source or path.startswith(f"{source}/")]:
                written[target + path[len(source) :]] = written.pop(path)
    found = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    return sorted(path for path, size in found.items() if written.get(path) != size)


def can_fail(error: str, kind: str) -> bool:
    """Whether an operation of this kind can fail with this error."""
    return error != "ENOSPC" or kind not in _SPARED_BY_A_FULL_DISK


def install_from_environment() -> None:
    """Install the plan of the environment permanently, if it has one for this rank."""
    text = os.environ.get(VARIABLE)
    if text and (plan := Plan(**json.loads(text))).rank == int(os.environ.get("RANK", "0")):
        guard = _Guard(plan)
        for name, kind in _KINDS.items():
            _hook(guard, os, name, kind)
        _hook(guard, checkpoints, "exchange", "exchange")
        _hook_open(guard)


class _Guard:
    """Counts operations and carries out the plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.folder = plan, os.path.realpath(plan.folder)
        self.lock = threading.RLock()
        self.count, self.space_freed = 0, False
        self.log = open(plan.log, "ab", buffering=0)  # noqa: SIM115

    def inside(self, path: Any, dir_fd: int | None = None) -> str | None:
        """The path relative to the plan's folder, or None if it is outside. Also takes descriptors."""
        if isinstance(path, int):
            full = os.readlink(f"/proc/self/fd/{path}")
        else:
            base = "" if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
            head, tail = os.path.split(os.path.abspath(os.path.join(base, os.fsdecode(path))))
            full = os.path.join(os.path.realpath(head), tail)
        if full != self.folder and not full.startswith(self.folder + os.sep):
            return None
        return os.path.relpath(full, self.folder)

    def do(self, operation: Operation, perform: Callable[[], Any], half: Callable[[], Any] = lambda: None) -> Any:
        """Perform an operation, or the plan's action in its place; ``half`` performs its first half."""
        plan, kind = self.plan, operation.kind
        with self.lock:
            if kind == "mkdir" and os.path.isdir(os.path.join(self.folder, operation.path)):
                return perform()  # raises FileExistsError, as pathlib expects
            number = self.count + 1
            if plan.action == "tear" and number == plan.at:
                half()
                _die()
            if plan.action == "fail" and self.fails(number, kind):
                self.count = number
                half()
                if kind == "close":
                    perform()  # the descriptor is gone even when closing reports an error
                code = getattr(errno, plan.error)
                raise OSError(code, os.strerror(code), os.path.join(plan.folder, operation.path))
            result = perform()  # an operation that fails on its own changes nothing and is not counted
            self.count = number
            if kind == "write":
                operation = replace(operation, size=result)  # may be less than was asked for
            self.log.write((json.dumps(asdict(operation)) + "\n").encode())
            if plan.action == "kill" and number == plan.at:
                _die()
            if number > plan.at and kind in _FREES_SPACE:
                self.space_freed = True
            return result

    def fails(self, number: int, kind: str) -> bool:
        if self.space_freed or not can_fail(self.plan.error, kind):
            return False
        return number == self.plan.at or (self.plan.lasting and number > self.plan.at)


def _die() -> None:
    """Kill this process, and in a rank with its own session also its child processes."""
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()


def _hook(guard: _Guard, module: Any, name: str, kind: str) -> None:
    function = getattr(module, name)

    @functools.wraps(function)
    def hooked(path: Any, *args: Any, **kwargs: Any) -> Any:
        found = guard.inside(path, kwargs.get("dir_fd"))
        if found is None:
            return function(path, *args, **kwargs)
        target = guard.inside(args[0]) or os.fsdecode(args[0]) if kind in _WITH_TARGET else ""
        return guard.do(Operation(kind, found, target=target), lambda: function(path, *args, **kwargs))

    setattr(module, name, hooked)


def _hook_open(guard: _Guard) -> None:
    real_open = io.open

    class File(io.FileIO):
        """A raw file that counts every operation, under buffers and text layers."""

        def __init__(self, name: str, file: Any, mode: str) -> None:
            super().__init__(file, mode)
            self.path = name

        def write(self, data: Any) -> int:
            write, view = super().write, memoryview(data).cast("B")
            operation = Operation("write", self.path, size=len(view))
            return guard.do(operation, lambda: write(view), lambda: write(view[: len(view) // 2]))

        def truncate(self, size: int | None = None) -> int:
            truncate = super().truncate
            size = self.tell() if size is None else size
            return guard.do(Operation("truncate", self.path, size=size), lambda: truncate(size))

        def close(self) -> None:
            close = super().close
            if not self.closed:
                guard.do(Operation("close", self.path), close)

    @functools.wraps(real_open)
    def hooked_open(
        file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, errors: Any = None, newline: Any = None,
        closefd: bool = True, opener: Any = None,
    ) -> Any:  # fmt: skip
        name = guard.inside(file) if set(mode) & set("wax+") and not isinstance(file, int) else None
        if name is None:
            return real_open(file, mode, buffering, encoding, errors, newline, closefd, opener)
        kind = "open" if mode[0] in "ar" and os.path.exists(file) else "create"
        raw = guard.do(Operation(kind, name), lambda: File(name, file, mode.replace("b", "").replace("t", "")))
        if buffering == 0:
            return raw
        binary = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return binary if "b" in mode else io.TextIOWrapper(binary, encoding, errors, newline)

    builtins.open = io.open = hooked_open
