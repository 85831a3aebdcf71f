"""How the project's tools end: a user's error and Ctrl-C are one line each, everything unforeseen is a traceback.

A program imports this module first: until its ``main`` runs there is nothing to clean up, and Ctrl-C ends it at once.
As an exception it would be turned into an ImportError by NumPy, or swallowed, while they are imported.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import sys
import sysconfig
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn

# What a user's wrong path comes to; other OSErrors, of a full disk say, may be gone the next time.
FILE_ERRORS = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
_ROOT = Path(__file__).parent.parent
_PROGRAMS = (_ROOT, _ROOT / "tools", _ROOT / "tools" / "benchmarks")
_USER_ERROR = 2
_PACKAGE = str(Path(__file__).parent)
_GRACE = 5.0  # seconds that a worker has to remove what it has half written


def command(main: Callable[..., int | None]) -> Callable[..., int]:
    """A tool's ``main``, in which an OSError and a ValueError that this project raises are one line and status 2.

    A ValueError of Python's or a library's own is a fault of the program, and keeps its traceback.

    SIGINT and SIGTERM are exceptions in it, so that what is half written is removed and workers are ended; a second one
    ends the process at once. The exit status is then that of the signal: in a shell 130 and 143.
    """
    prog = Path(main.__code__.co_filename).name

    @functools.wraps(main)
    def run(*args: Any, **kwargs: Any) -> int:
        with _signals_raise():
            try:
                return main(*args, **kwargs) or 0
            except BrokenPipeError:
                # The reader of the output has left, as ``head`` does. Python would write the rest again at exit.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return 128 + signal.SIGPIPE
            except (ValueError, OSError) as error:
                if isinstance(error, ValueError) and not _is_users(error):
                    raise
                print(f"{prog}: error: {one_line(error)}", file=sys.stderr)
                return _USER_ERROR

    return run


def _is_users(error: ValueError) -> bool:
    """Whether a ``raise`` statement of this project or of a tool made the error, not a call that failed."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    libraries = tuple(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))
    ours = frame.filename.startswith(_PACKAGE) or not frame.filename.startswith(libraries)
    return ours and (frame.line or "").startswith("raise ")


def one_line(error: BaseException) -> str:
    """An error as a user reads it: a system's error as ``file: what is wrong``, others as they say."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    def interrupt(number: int, _: FrameType | None) -> NoReturn:
        signal.signal(number, signal.SIG_DFL)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + number)

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say_interrupted() -> None:
    start = "\n" if sys.stderr.isatty() else ""  # after the terminal's ^C
    print(f"{start}{Path(sys.argv[0]).name}: interrupted", file=sys.stderr, flush=True)


def _end_at_once(number: int, _: FrameType | None) -> None:
    _say_interrupted()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _on_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Python itself ends by SIGINT after a KeyboardInterrupt, so that a shell's loop ends as well."""
    if issubclass(kind, KeyboardInterrupt):
        _say_interrupted()
    else:
        sys.__excepthook__(kind, error, trace)


if Path(sys.argv[0]).resolve().parent in _PROGRAMS and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _end_at_once)
sys.excepthook = _on_error

_ending = False  # in a worker that is to end


class WorkerPool(ProcessPoolExecutor):
    """Processes that end with the block, also when it fails or is interrupted: then at once.

    They are spawned, since clients of remote stores and the locks of threads do not survive a fork, and do not see
    Ctrl-C, which a terminal sends to all: who uses them ends them.
    """

    def __init__(self, workers: int) -> None:
        super().__init__(workers, multiprocessing.get_context("spawn"), _end_on_sigterm)

    def submit(self, task: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """As of any executor; the first one starts the workers."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # which children inherit
        try:
            return super().submit(_ending_after, task, *args, **kwargs)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> bool | None:
        if kind is not None:
            workers = list((self._processes or {}).values())
            self.shutdown(wait=False, cancel_futures=True)
            for worker in workers:
                worker.terminate()
            end = time.monotonic() + _GRACE
            for worker in workers:
                worker.join(max(0.0, end - time.monotonic()))
                if worker.is_alive():
                    worker.kill()
        return super().__exit__(kind, *rest)


def _end_on_sigterm() -> None:
    def end(number: int, _: FrameType | None) -> None:
        global _ending
        if not _ending:
            _ending = True
            sys.exit(128 + number)

    signal.signal(signal.SIGTERM, end)


def _ending_after(task: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The executor would hand SIGTERM's exception to the parent and go on with the next task."""
    try:
        return task(*args, **kwargs)
    finally:
        if _ending:
            os._exit(128 + signal.SIGTERM)
