"""Crash points: a process is killed, or its disk fails, at the n-th file operation below a folder.

Python's file operations are counted where they reach the operating system: opening for writing, each ``write`` (a
buffered file writes when its buffer is full, flushed or closed), closing, syncing, truncating, creating, renaming,
linking and removing. All threads count, and processes forked later. The disk does not change between two operations, so
killing after each of them covers every state that a save passes through.

``torch.save`` to a path writes in C++; here it gets a Python file instead. Not counted: other code that writes without
Python (safetensors' ``save_file``, C libraries), which ``unseen_files`` finds, and code that keeps an earlier reference
to a function of ``os``, as ``tempfile`` does for files that delete themselves.
"""

from __future__ import annotations

import _io
import builtins
import contextlib
import errno
import fcntl
import functools
import io
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from genlip_megatron.checkpoint import paths as checkpoints

VARIABLE = "TEST_CRASH_PLAN"
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# A full disk refuses operations that may need a block; with delayed writes also sync and close.
_SPARED_BY_A_FULL_DISK = {"remove", "rmdir", "rename", "exchange", "chmod", "touch"}
_FREES_SPACE = {"remove", "rmdir"}


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
        if not Path(self.log).exists():
            return []
        return [Operation(**json.loads(line)) for line in Path(self.log).read_text().splitlines()]


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
    thread: str = ""

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


def install_from_environment() -> None:
    """Install the plan of the environment, if it has one for this rank."""
    text = os.environ.get(VARIABLE)
    if text:
        plan = Plan(**json.loads(text))
        if plan.rank == int(os.environ.get("RANK", "0")):
            install(plan)


class _Guard:
    """Counts operations and carries out the plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.folder = plan, os.path.realpath(plan.folder)
        self.leader = os.getpid()
        # Shared with forked children: operations so far, and whether a failed disk works again.
        self.state = multiprocessing.get_context("fork").Array("q", 2)
        self.local = threading.local()
        self.log = os.open(plan.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.write = os.write

    def inside(self, path: Any, dir_fd: int | None = None) -> str | None:
        """The path relative to the plan's folder, or None if it is outside. Also takes descriptors."""
        if getattr(self.local, "busy", False):
            return None
        if isinstance(path, int):
            try:
                full = os.readlink(f"/proc/self/fd/{path}").removesuffix(" (deleted)")
            except OSError:
                return None
        else:
            full = os.fsdecode(path)
            if dir_fd is not None:
                full = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), full)
            head, tail = os.path.split(os.path.abspath(full))
            full = os.path.join(os.path.realpath(head), tail)
        if full != self.folder and not full.startswith(self.folder + os.sep):
            return None
        return os.path.relpath(full, self.folder)

    def do(self, operation: Operation, perform: Callable[[], Any], half: Callable[[], Any] = lambda: None) -> Any:
        """Perform an operation, or the plan's action in its place; ``half`` performs its first half."""
        plan = self.plan
        with self.state.get_lock():
            self.local.busy = True
            try:
                if operation.kind == "mkdir" and os.path.isdir(os.path.join(self.folder, operation.path)):
                    return perform()  # raises FileExistsError, as pathlib expects
                number = self.state[0] + 1
                if plan.action == "tear" and number == plan.at:
                    half()
                    self.die()
                if plan.action == "fail" and self.fails(number, operation.kind):
                    self.state[0] = number
                    half()
                    if operation.kind == "close":
                        perform()  # the descriptor is gone even when closing reports an error
                    code = getattr(errno, plan.error)
                    raise OSError(code, os.strerror(code), os.path.join(plan.folder, operation.path))
                result = perform()  # an operation that fails on its own changes nothing and is not counted
                self.state[0] = number
                line = {**asdict(operation), "thread": threading.current_thread().name}
                if operation.kind == "write":
                    line["size"] = result  # may be less than was asked for
                self.write(self.log, (json.dumps(line) + "\n").encode())
                if plan.action == "kill" and number == plan.at:
                    self.die()
                if number > plan.at and operation.kind in _FREES_SPACE:
                    self.state[1] = 1
                return result
            finally:
                self.local.busy = False

    def fails(self, number: int, kind: str) -> bool:
        if self.state[1] or not can_fail(self.plan.error, kind):
            return False
        return number == self.plan.at or (self.plan.lasting and number > self.plan.at)

    def die(self) -> None:
        """Kill this process, and in a rank with its own session also its forked processes."""
        if os.getpgrp() == self.leader:
            os.killpg(self.leader, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
        signal.pause()


def can_fail(error: str, kind: str) -> bool:
    """Whether an operation of this kind can fail with this error."""
    return error != "ENOSPC" or kind not in _SPARED_BY_A_FULL_DISK


def install(plan: Plan) -> None:
    """Install a plan in this process permanently."""
    guard = _Guard(plan)
    _hook_paths(guard)
    _hook_descriptors(guard)
    _hook_open(guard)
    _hook_torch_save(guard)


def _hook_paths(guard: _Guard) -> None:
    # os.makedirs, os.removedirs, pathlib and shutil end up in these functions.
    kinds = {
        "mkdir": "mkdir", "mkfifo": "create", "mknod": "create", "rmdir": "rmdir", "unlink": "remove",
        "remove": "remove", "truncate": "truncate", "chmod": "chmod", "chown": "chmod", "lchown": "chmod",
        "utime": "touch", "setxattr": "chmod", "removexattr": "chmod",
    }  # fmt: skip

    def one(kind: str, function: Callable) -> Callable:
        @functools.wraps(function)
        def hooked(path: Any, *args: Any, **kwargs: Any) -> Any:
            name = guard.inside(path, kwargs.get("dir_fd"))
            if name is None:
                return function(path, *args, **kwargs)
            size = (args or tuple(kwargs.values()))[0] if kind == "truncate" else 0
            return guard.do(Operation(kind, name, size=size), lambda: function(path, *args, **kwargs))

        return hooked

    def two(kind: str, function: Callable) -> Callable:
        @functools.wraps(function)
        def hooked(source: Any, target: Any, *args: Any, **kwargs: Any) -> Any:
            at = kwargs.get("dst_dir_fd", kwargs.get("dir_fd"))
            into = guard.inside(target, at)
            name = None if kind == "symlink" else guard.inside(source, kwargs.get("src_dir_fd"))
            if into is None and name is None:
                return function(source, target, *args, **kwargs)
            operation = Operation(kind, name or os.fsdecode(source), target=into or os.fsdecode(target))
            return guard.do(operation, lambda: function(source, target, *args, **kwargs))

        return hooked

    for name, kind in kinds.items():
        setattr(os, name, one(kind, getattr(os, name)))
    for name, kind in {"rename": "rename", "replace": "rename", "link": "link", "symlink": "symlink"}.items():
        setattr(os, name, two(kind, getattr(os, name)))
    checkpoints.exchange = two("exchange", checkpoints.exchange)


def _hook_descriptors(guard: _Guard) -> None:
    # The argument that is the descriptor written to, and the kind of operation.
    kinds = {
        "write": (0, "write"), "pwrite": (0, "write"), "writev": (0, "write"), "pwritev": (0, "write"),
        "sendfile": (0, "write"), "copy_file_range": (1, "write"), "splice": (1, "write"),
        "fsync": (0, "sync"), "fdatasync": (0, "sync"), "ftruncate": (0, "truncate"),
        "posix_fallocate": (0, "allocate"), "fchmod": (0, "chmod"), "fchown": (0, "chmod"),
    }  # fmt: skip

    def hook(place: int, kind: str, function: Callable) -> Callable:
        @functools.wraps(function)
        def hooked(*args: Any, **kwargs: Any) -> Any:
            name = guard.inside(args[place]) if len(args) > place else None
            if name is None:
                return function(*args, **kwargs)
            size = args[1] if kind == "truncate" else 0
            half: Callable[[], Any] = lambda: None  # noqa: E731
            if function.__name__ in ("write", "pwrite"):
                data = memoryview(args[1]).cast("B")
                half = lambda: function(args[0], data[: len(data) // 2], *args[2:])  # noqa: E731
            return guard.do(Operation(kind, name, size=size), lambda: function(*args, **kwargs), half)

        return hooked

    for name, (place, kind) in kinds.items():
        setattr(os, name, hook(place, kind, getattr(os, name)))

    close = os.close

    @functools.wraps(close)
    def hooked_close(fd: int) -> None:
        name = guard.inside(fd)
        if name is None or not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE:
            return close(fd)
        return guard.do(Operation("close", name), lambda: close(fd))

    os.close = hooked_close


def _hook_open(guard: _Guard) -> None:
    real_open, os_open = io.open, os.open

    class File(io.FileIO):
        """A raw file that counts every operation, under buffers and text layers."""

        def __init__(self, name: str, file: Any, mode: str, opener: Any = None, closefd: bool = True) -> None:
            super().__init__(file, mode, opener=opener, closefd=closefd)
            self.path = name

        def write(self, data: Any) -> int:
            size = memoryview(data).nbytes
            write = super().write
            operation = Operation("write", self.path, size=size)
            return guard.do(operation, lambda: write(data), lambda: write(memoryview(data).cast("B")[: size // 2]))

        def truncate(self, size: int | None = None) -> int:
            truncate = super().truncate
            size = self.tell() if size is None else size
            return guard.do(Operation("truncate", self.path, size=size), lambda: truncate(size))

        def close(self) -> None:
            close = super().close
            if self.closed:
                return
            guard.do(Operation("close", self.path), close)

    @functools.wraps(real_open)
    def hooked_open(
        file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, errors: Any = None,
        newline: Any = None, closefd: bool = True, opener: Any = None,
    ) -> Any:  # fmt: skip
        name = guard.inside(file) if set(mode) & set("wax+") else None
        if name is None:
            return real_open(file, mode, buffering, encoding, errors, newline, closefd, opener)
        raw_mode = "".join(letter for letter in mode if letter not in "bt")
        if isinstance(file, int) or opener is not None:  # counted where the descriptor is opened
            raw = File(name, file, raw_mode, opener, closefd)
            raw.path = guard.inside(raw.fileno()) or name
        else:
            kind = "open" if mode[0] in "ar" and os.path.exists(file) else "create"
            raw = guard.do(Operation(kind, name), lambda: File(name, file, raw_mode))
        if buffering == 0:
            return raw
        if "+" in mode:
            binary: Any = io.BufferedRandom(raw)
        else:
            binary = io.BufferedWriter(raw, buffering if buffering > 1 else io.DEFAULT_BUFFER_SIZE)
        if "b" in mode:
            return binary
        text = io.TextIOWrapper(binary, encoding, errors, newline, line_buffering=buffering == 1)
        text.mode = mode
        return text

    @functools.wraps(os_open)
    def hooked_os_open(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        name = guard.inside(path, dir_fd) if flags & _WRITING else None
        if name is None:
            return os_open(path, flags, mode, dir_fd=dir_fd)
        fresh = flags & os.O_TRUNC or not os.path.lexists(os.path.join(guard.folder, name))
        operation = Operation("create" if fresh else "open", name)
        return guard.do(operation, lambda: os_open(path, flags, mode, dir_fd=dir_fd))

    for module in (builtins, io, _io):  # tempfile asks the last
        module.open = hooked_open
    os.open = hooked_os_open


def _hook_torch_save(guard: _Guard) -> None:
    try:
        from torch import serialization
    except ImportError:
        return
    writer = serialization._open_zipfile_writer

    class ToFile(serialization._open_zipfile_writer_buffer):
        def __init__(self, path: Any) -> None:
            super().__init__(builtins.open(path, "wb"))  # noqa: SIM115

        def __exit__(self, *args: Any) -> None:
            with contextlib.closing(self.buffer):
                super().__exit__(*args)

    def hooked(target: Any) -> Any:
        is_path = isinstance(target, (str, os.PathLike))
        return ToFile(target) if is_path and guard.inside(target) is not None else writer(target)

    serialization._open_zipfile_writer = hooked
