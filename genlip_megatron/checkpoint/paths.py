"""Paths of a run's checkpoints, and how a new checkpoint appears at its path all at once.

A checkpoint is written to a hidden folder next to its final path; every file is synced, then the folder is renamed, and
``latest_checkpointed_iteration.txt`` is replaced last. So every folder with a final name was complete once. A run
resumes from the newest one that its manifest confirms. The pointer file is for people and scripts.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
from pathlib import Path

from genlip_megatron import atomic_write

LATEST = "latest_checkpointed_iteration.txt"
SET_ASIDE = "set_aside"
_HERE, _RENAME_EXCHANGE = -100, 2  # of Linux's fcntl.h and fs.h
_NAME = re.compile(r"iter_(\d{7,})")
_HIDDEN = re.compile(r"\.(iter_\d{7,})\.(partial|replaced|removed)")


class NotSaved(RuntimeError):
    """A checkpoint could not be written; earlier ones are untouched. Raised on every rank."""


def step_folder(root: str | Path, iteration: int) -> Path:
    """The folder of a step's checkpoint."""
    return Path(root) / f"iter_{iteration:07d}"


def step_of(folder: Path) -> int | None:
    """The step in a checkpoint folder's name, or None for another folder."""
    match = _NAME.fullmatch(folder.name)
    return int(match.group(1)) if match else None


def steps(root: str | Path) -> list[int]:
    """Steps that have a folder in ``root``, newest first; the folders are not checked."""
    try:
        found = [step_of(entry) for entry in Path(root).iterdir() if entry.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted((step for step in found if step is not None), reverse=True)


def pointed(root: str | Path) -> int | None:
    """The step in the pointer file, or None if it is missing or unreadable."""
    try:
        return int((Path(root) / LATEST).read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None


def sync(path: Path) -> None:
    """Sync a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def exchange(first: Path, second: Path) -> bool:
    """Swap two folders of one file system atomically; False if the system does not support it.

    Uses Linux's ``renameat2``; network file systems often do not support it.

    Raises:
        OSError: a folder is missing, or the disk cannot be written to.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_HERE, os.fsencode(first), _HERE, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(first), None, str(second))


def write_file(path: Path, content: bytes) -> None:
    """Write and sync a new file."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _hidden(root: str | Path, iteration: int, state: str) -> Path:
    return Path(root) / f".{step_folder(root, iteration).name}.{state}"


def partial_folder(root: str | Path, iteration: int) -> Path:
    """The hidden folder in which a step's checkpoint is written."""
    return _hidden(root, iteration, "partial")


def clean(root: str | Path) -> None:
    """Remove the remains of crashed saves and deletions; restore a checkpoint that was being replaced."""
    for entry in list(Path(root).glob(".iter_*")):
        if not (match := _HIDDEN.fullmatch(entry.name)) or entry.is_symlink() or not entry.is_dir():
            continue  # not ours
        if entry.suffix == ".replaced" and not (Path(root) / match[1]).exists():
            os.rename(entry, Path(root) / match[1])
        else:
            shutil.rmtree(entry)


def publish(root: str | Path, iteration: int) -> Path:
    """Rename a step's finished and synced folder to its final path; ``confirm`` must follow."""
    target, partial = step_folder(root, iteration), partial_folder(root, iteration)
    for folder in {path.parent for path in partial.rglob("*")} | {partial}:
        sync(folder)
    if target.exists():
        os.rename(target, _hidden(root, iteration, "replaced"))
    os.rename(partial, target)
    return target


def confirm(root: str | Path, iteration: int) -> None:
    """Sync a published checkpoint's name, remove the one it replaced, and point to the newest."""
    sync(Path(root))
    shutil.rmtree(_hidden(root, iteration, "replaced"), ignore_errors=True)
    point_to(root, steps(root)[0])


def point_to(root: str | Path, iteration: int) -> None:
    """Write the pointer file."""
    atomic_write.write(Path(root) / LATEST, f"{iteration}\n")
    sync(Path(root))


def set_aside(root: str | Path, after: int) -> list[Path]:
    """Move checkpoints of steps after ``after`` to ``set_aside/``; returns their new paths. Deletes nothing."""
    clean(root)  # may restore a checkpoint, which must move too
    moved = [move_aside(step_folder(root, step)) for step in steps(root) if step > after]
    if moved:
        sync(Path(root))
        if left := steps(root):
            point_to(root, left[0])
    return moved


def move_aside(source: Path) -> Path:
    """Move a folder or file to ``set_aside/``; returns its new path."""
    target, again = source.parent / SET_ASIDE / source.name, 1
    while os.path.lexists(target):
        again += 1
        target = target.with_name(f"{source.name}-{again}")
    target.parent.mkdir(exist_ok=True)
    os.rename(source, target)
    return target


def remove(root: str | Path, iteration: int) -> None:
    """Delete a checkpoint that has no ``manifest.foreign`` files. After a crash ``clean`` removes the rest."""
    hidden = _hidden(root, iteration, "removed")
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(step_folder(root, iteration), hidden)
    shutil.rmtree(hidden)
