"""Write a folder or a file of results that appears complete, or not at all.

SIGTERM must raise an exception, as ``command.command`` arranges, so that partial output is removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from genlip_megatron.checkpoint import paths
from genlip_megatron.outputs import Recognise, check_file

_SUFFIX = re.compile(r"[0-9a-f]{8}")


@contextlib.contextmanager
def hidden_folder(target: Path) -> Iterator[Path]:
    """A hidden folder beside ``target`` to prepare it in, removed when the block ends.

    Leftovers of killed processes are removed first."""
    _remove_leftovers(target)
    partial, descriptor = _make_partial(target)
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(descriptor)


@contextlib.contextmanager
def new_file(target: Path, recognise: Recognise) -> Iterator[TextIO]:
    """A text file that replaces ``target`` when the block succeeds; otherwise, and on SIGTERM, nothing is left.

    The next call removes leftovers of a killed process.

    Raises:
        ValueError: as ``check_file``, when the block ends; or the disk is not writable.
    """
    try:
        with hidden_folder(target) as partial:
            with open(partial / target.name, "w", encoding="utf-8") as out:
                yield out
                out.flush()
                os.fsync(out.fileno())
            check_file(target, recognise)  # another process may have written it
            os.replace(partial / target.name, target)
    except OSError as error:
        raise ValueError(f"--output {target}: cannot be written: {error}. Nothing was left behind") from error


@contextlib.contextmanager
def new_folder(target: Path, size: int, overwrite: bool, foreign: Callable[[Path], str]) -> Iterator[Path]:
    """A hidden sibling folder that replaces ``target`` when the block succeeds.

    The swap is one step where the file system can exchange two folders. When the block fails, or on SIGTERM, the new
    folder is removed; the next call removes leftovers of a killed process. Concurrent processes each write their own
    folder: the last one wins with ``overwrite`` and is refused without it.

    Args:
        target: missing or an empty folder; with ``overwrite`` also a folder that this tool wrote.
        size: bytes to write.
        foreign: names an entry of a folder that this tool did not write and that would be lost; "" if there is none.

    Raises:
        ValueError: ``target`` must not be replaced, too little free space, or the disk is not writable.
    """
    target = target.resolve()  # follow a link, so that the link stays
    replaced = _replaced(target)
    try:
        if replaced.exists() and not target.exists():
            os.rename(replaced, target)
        check_target(target, overwrite, foreign)
        target.parent.mkdir(parents=True, exist_ok=True)
        if replaced.exists():
            if other := foreign(replaced):
                raise ValueError(f"{replaced}: this tool needs the name, but did not write it ({other}). Move it")
            _remove_replaced(target)
        with hidden_folder(target) as partial:
            if (free := shutil.disk_usage(target.parent).free) < size:
                raise ValueError(f"{target}: needs {size / 1e9:.2f} GB, {free / 1e9:.2f} GB are free")
            written = partial.stat()
            yield partial
            try:
                for path in [*partial.rglob("*"), partial]:
                    paths.sync(path)
                check_target(target, overwrite, foreign)  # another process may have written it
                _swap_in(partial, target)
                paths.sync(target.parent)
            except BaseException:
                if target.exists() and os.path.samestat(written, target.stat()):
                    _swap_out(partial, target)  # already swapped in, but not confirmed on disk
                raise
        if replaced.exists():
            _remove_replaced(target)
    except OSError as error:
        raise ValueError(f"{target}: cannot be written: {error}. Nothing was left behind") from error


def _make_partial(target: Path) -> tuple[Path, int]:
    """(a new hidden folder beside ``target``, a descriptor whose lock keeps other processes from removing it)."""
    while True:
        partial = _partial(target)
        partial.mkdir()
        with contextlib.suppress(FileNotFoundError):  # another process removed it as a leftover before it was locked
            descriptor = os.open(partial, os.O_RDONLY)
            if _lock(descriptor) and partial.exists():
                return partial, descriptor
            os.close(descriptor)


def _partial(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")


def _replaced(target: Path) -> Path:
    """The temporary path of the old folder during a swap, on file systems that cannot exchange two folders."""
    return target.with_name(f".{target.name}.replaced")


def _remove_replaced(target: Path) -> None:
    """Remove ``_replaced``, under the name of a partial folder: a half-removed one is then a known leftover."""
    leftover = _partial(target)
    os.rename(_replaced(target), leftover)
    shutil.rmtree(leftover, ignore_errors=True)


def _swap_in(partial: Path, target: Path) -> None:
    """Move ``partial`` to ``target``; an old folder moves to ``partial`` or ``_replaced``."""
    if target.exists() and paths.exchange(partial, target):
        return
    if target.exists():
        os.rename(target, _replaced(target))
    try:
        os.rename(partial, target)
    except BaseException:
        if _replaced(target).exists():
            os.rename(_replaced(target), target)
        raise


def _swap_out(partial: Path, target: Path) -> None:
    """Undo ``_swap_in``."""
    if partial.exists():
        paths.exchange(partial, target)
        return
    os.rename(target, partial)
    if _replaced(target).exists():
        os.rename(_replaced(target), target)


def _remove_leftovers(target: Path) -> None:
    """Remove leftovers of killed processes beside ``target``, but no folder that a live process has locked."""
    for leftover in target.parent.glob(f".{glob.escape(target.name)}.partial-*"):
        if leftover.is_symlink() or not leftover.is_dir() or not _SUFFIX.fullmatch(leftover.name.rpartition("-")[2]):
            continue  # not ours
        try:
            descriptor = os.open(leftover, os.O_RDONLY)
        except FileNotFoundError:  # another process removed it
            continue
        try:
            if _lock(descriptor):
                shutil.rmtree(leftover, ignore_errors=True)
        finally:
            os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Lock a folder until the descriptor is closed; False if another process holds the lock.

    On a file system without locks it returns True."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def check_target(target: Path, overwrite: bool, foreign: Callable[[Path], str]) -> None:
    """Raise ValueError if ``new_folder`` must not replace ``target``."""
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"{target}: is a file. Name a folder")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"{target}: the folder is not empty. Name another, or replace it with --overwrite")
    if other := foreign(target):
        raise ValueError(
            f"{target}: --overwrite replaces only folders that this tool wrote, and this one holds something else "
            f"({other}). Name another"
        )
