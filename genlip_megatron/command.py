"""How the project's tools end: one line for a user's error or Ctrl-C, a traceback for a bug.

Programs import this module first. Until ``main`` runs, Ctrl-C ends the process at once: as an exception during imports,
NumPy would turn it into an ImportError or swallow it.
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

# OSErrors of a wrong path. Others, such as a full disk, may not happen again.
FILE_ERRORS = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
_ROOT = Path(__file__).parent.parent
_PROGRAMS = (_ROOT, _ROOT / "tools", _ROOT / "tools" / "benchmarks")
_USER_ERROR = 2
_PACKAGE = str(Path(__file__).parent)
_GRACE = 5.0  # seconds that a worker has to remove its partial files


class UserError(ValueError):
    """A setting or a file is wrong: a run ends with one line and exit status 2.

    Other ValueErrors of a run are crashes: a restart may help, and they keep their traceback.
    """


def command(main: Callable[..., int | None]) -> Callable[..., int]:
    """Decorate a tool's ``main``: an OSError, or a ValueError that this project raises, is one line and status 2.

    A ValueError that Python or a library raises is a bug and keeps its traceback.

    SIGINT and SIGTERM raise exceptions, so that partial files are removed and workers end. A second SIGINT ends the
    process at once, a second SIGTERM is ignored. The exit status is the signal's, in a shell 130 or 143.
    """
    prog = Path(main.__code__.co_filename).name

    @functools.wraps(main)
    def run(*args: Any, **kwargs: Any) -> int:
        with _signals_raise():
            try:
                return main(*args, **kwargs) or 0
            except BrokenPipeError:
                # The reader, such as ``head``, is gone. Without this, Python would try to write the rest at exit.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return 128 + signal.SIGPIPE
            except (ValueError, OSError) as error:
                if isinstance(error, ValueError) and not _is_users(error):
                    raise
                print(f"{prog}: error: {one_line(error)}", file=sys.stderr)
                return _USER_ERROR

    return run


def _is_users(error: ValueError) -> bool:
    """Whether a ``raise`` statement of this project or a tool raised the error."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    libraries = tuple(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))
    ours = frame.filename.startswith(_PACKAGE) or not frame.filename.startswith(libraries)
    return ours and (frame.line or "").startswith("raise ")


def one_line(error: BaseException) -> str:
    """An error's text on one line; a system error as ``file: what is wrong``."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    def interrupt(number: int, _: FrameType | None) -> NoReturn:
        # Batch systems send SIGTERM twice; the second must not interrupt the clean-up.
        signal.signal(number, signal.SIG_DFL if number == signal.SIGINT else signal.SIG_IGN)
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
    """Print one line for Ctrl-C. Python then ends itself by SIGINT, which also ends a loop in a shell."""
    if issubclass(kind, KeyboardInterrupt):
        _say_interrupted()
    else:
        sys.__excepthook__(kind, error, trace)


if Path(sys.argv[0]).resolve().parent in _PROGRAMS and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _end_at_once)
sys.excepthook = _on_error

_ending = False  # in a worker that has received SIGTERM


class WorkerPool(ProcessPoolExecutor):
    """Worker processes that end with the ``with`` block; at once if it fails or is interrupted.

    Workers are spawned, because clients of remote stores and locks of threads do not survive a fork. They ignore
    Ctrl-C, which a terminal sends to every process; the parent ends them.
    """

    def __init__(self, workers: int) -> None:
        super().__init__(workers, multiprocessing.get_context("spawn"), _end_on_sigterm)

    def submit(self, task: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Submit a task; the first one starts the workers."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # workers inherit the mask
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
    """Run a task. After SIGTERM end the worker, which would otherwise take the next task."""
    try:
        return task(*args, **kwargs)
    finally:
        if _ending:
            os._exit(128 + signal.SIGTERM)
