"""A folder or a file of results that appears all at once, or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import re
import secrets
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TextIO

from genlip_megatron.checkpoint import folder
from genlip_megatron.outputs import Recognise, check_file

_REST = re.compile(r"[0-9a-f]{8}")


@contextlib.contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """Within the block SIGTERM ends the process, with status 143, as an error does: what was begun is removed."""

    def end(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second one does not interrupt the removal
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def hidden_folder(target: Path) -> Iterator[Path]:
    """A hidden folder beside ``target`` to prepare it in, removed when the block ends; what a killed process left of
    its own is removed first, or by the next."""
    with ending_on_sigterm():
        _remove_rests(target)
        partial, descriptor = _make_partial(target)
        try:
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            os.close(descriptor)


@contextlib.contextmanager
def new_file(target: Path, recognise: Recognise) -> Iterator[TextIO]:
    """A file to write text to, which takes ``target``'s place when the block ends well; else nothing is left.

    What a killed process left of its own is removed by the next; SIGTERM ends as a failure does.

    Raises:
        ValueError: as ``check_file``, when the block ends; or the disk cannot be written to.
    """
    try:
        with hidden_folder(target) as partial:
            with open(partial / target.name, "w", encoding="utf-8") as out:
                yield out
                out.flush()
                os.fsync(out.fileno())
            check_file(target, recognise)  # another may have come first
            os.replace(partial / target.name, target)
    except OSError as error:
        raise ValueError(f"--output {target}: could not be written: {error}; nothing was left behind") from error


@contextlib.contextmanager
def new_folder(target: Path, size: int, overwrite: bool, foreign: Callable[[Path], str]) -> Iterator[Path]:
    """A hidden sibling folder to write to, which takes ``target``'s place when the block ends well.

    A folder that is replaced goes in the same step, where the file system can exchange two. When the block fails, what
    was written is removed; what a killed process left is removed by the next. Of processes that write at once, each has
    a folder of its own, and the last one's stands, or is refused without ``overwrite``. SIGTERM is a failure.

    Args:
        target: missing, or an empty folder; another is replaced with ``overwrite``.
        size: bytes that will be written.
        foreign: names something in the folder that is there that would be lost and is not of the kind that is written;
            "" when there is nothing such.

    Raises:
        ValueError: there is something that must not be replaced, too little room, or the disk cannot be written to.
    """
    target = target.resolve()  # where a link leads, so that the link stays
    replaced = _replaced(target)
    with ending_on_sigterm():
        try:
            if replaced.exists() and not target.exists():
                os.rename(replaced, target)
            check_target(target, overwrite, foreign)
            target.parent.mkdir(parents=True, exist_ok=True)
            if replaced.exists():
                if other := foreign(replaced):
                    raise ValueError(f"{replaced}: it is in the way and holds something else ({other}); move it")
                os.rename(replaced, _partial(target))  # a name under which half of it is a rest
            _remove_rests(target)
            if (free := shutil.disk_usage(target.parent).free) < size:
                raise ValueError(f"{target}: {free / 1e9:.2f} GB free, {size / 1e9:.2f} GB are to be written")
            partial, written = _make_partial(target)
            try:
                yield partial
                for path in [*partial.rglob("*"), partial]:
                    folder.sync(path)
                check_target(target, overwrite, foreign)  # others may have come first
                _put(partial, target)
                folder.sync(target.parent)
            except BaseException:
                if target.exists() and os.path.samestat(os.fstat(written), target.stat()):
                    _take_back(partial, target)  # it has its place already, and the disk did not confirm it
                shutil.rmtree(partial, ignore_errors=True)
                raise
            finally:
                os.close(written)
            for old in (partial, replaced):
                shutil.rmtree(old, ignore_errors=True)
        except OSError as error:
            raise ValueError(f"{target} could not be written: {error}; nothing was left behind") from error


def _make_partial(target: Path) -> tuple[Path, int]:
    """(a new hidden folder to prepare ``target`` in, its descriptor, whose lock keeps others from removing it)."""
    while True:
        partial = _partial(target)
        partial.mkdir()
        with contextlib.suppress(FileNotFoundError):  # another took it for a rest before it was locked
            descriptor = os.open(partial, os.O_RDONLY)
            if _lock(descriptor) and partial.exists():
                return partial, descriptor
            os.close(descriptor)


def _partial(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")


def _replaced(target: Path) -> Path:
    """Where a folder stands that is being replaced, where two cannot be exchanged."""
    return target.with_name(f".{target.name}.replaced")


def _put(partial: Path, target: Path) -> None:
    """Let ``partial`` take the place of ``target``, which is then in its place, or ``_replaced``, if it was there."""
    if target.exists() and folder.exchange(partial, target):
        return
    if target.exists():
        os.rename(target, _replaced(target))
    try:
        os.rename(partial, target)
    except BaseException:
        if _replaced(target).exists():
            os.rename(_replaced(target), target)
        raise


def _take_back(partial: Path, target: Path) -> None:
    """Undo ``_put``."""
    if partial.exists():
        folder.exchange(partial, target)
        return
    os.rename(target, partial)
    if _replaced(target).exists():
        os.rename(_replaced(target), target)


def _remove_rests(target: Path) -> None:
    """Remove what killed processes have left of ``target``, and nothing that another one is writing."""
    for rest in target.parent.glob(f".{glob.escape(target.name)}.partial-*"):
        if rest.is_symlink() or not rest.is_dir() or not _REST.fullmatch(rest.name.rpartition("-")[2]):
            continue  # of another's making
        try:
            descriptor = os.open(rest, os.O_RDONLY)
        except FileNotFoundError:  # another removed it
            continue
        try:
            if _lock(descriptor):
                shutil.rmtree(rest, ignore_errors=True)
        finally:
            os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Lock a folder for this process until it is closed; False when another one has. There may be no locks here."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def check_target(target: Path, overwrite: bool, foreign: Callable[[Path], str]) -> None:
    """Raise ValueError when there is something at ``target`` that ``new_folder`` must not replace."""
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"{target}: it is a file; name a folder")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"{target}: the folder is not empty; name another, or replace it with --overwrite")
    if other := foreign(target):
        raise ValueError(
            f"{target}: --overwrite replaces only what this tool has written, and the folder holds something else "
            f"({other}); name another"
        )
