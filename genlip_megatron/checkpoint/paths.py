"""The folder of a run's checkpoints: names, what is complete in it, and how a new one appears there all at once.

A checkpoint is written to a hidden sibling folder, every file synced, and renamed; only then
``latest_checkpointed_iteration.txt`` is replaced. So whatever stands under a final name was complete once, and the
newest of these that its manifest confirms is where a run goes on. The pointer is for people and scripts.
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
    """A checkpoint could not be written; what was there before is untouched. Raised on every rank alike."""


def step_folder(root: str | Path, iteration: int) -> Path:
    """Where the checkpoint of a step stands."""
    return Path(root) / f"iter_{iteration:07d}"


def step_of(folder: Path) -> int | None:
    """The step of a checkpoint folder by its name, or None for another folder."""
    match = _NAME.fullmatch(folder.name)
    return int(match.group(1)) if match else None


def steps(root: str | Path) -> list[int]:
    """Steps of which a folder stands under ``root``, newest first; whether they are good is not looked at."""
    try:
        found = [step_of(entry) for entry in Path(root).iterdir() if entry.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted((step for step in found if step is not None), reverse=True)


def pointed(root: str | Path) -> int | None:
    """The step that the pointer names, or None when there is none or it cannot be read."""
    try:
        return int((Path(root) / LATEST).read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None


def sync(path: Path) -> None:
    """Have the file system write out a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def exchange(first: Path, second: Path) -> bool:
    """Let two folders of one file system take each other's place in one step; False where the system cannot.

    Linux's ``renameat2`` can, on local file systems; network file systems often cannot.

    Raises:
        OSError: one of them is missing, or the disk cannot be written to.
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


def partial_folder(root: str | Path, iteration: int) -> Path:
    """Where the checkpoint of a step is written before it appears."""
    return Path(root) / f".{step_folder(root, iteration).name}.partial"


def _replaced_folder(root: str | Path, iteration: int) -> Path:
    return Path(root) / f".{step_folder(root, iteration).name}.replaced"


def clean(root: str | Path) -> None:
    """Remove what crashed saves and deletions left behind; a checkpoint that was about to be replaced is put back."""
    for entry in list(Path(root).glob(".iter_*")):
        if not (match := _HIDDEN.fullmatch(entry.name)) or entry.is_symlink() or not entry.is_dir():
            continue  # of another's making
        if entry.suffix == ".replaced" and not (Path(root) / match[1]).exists():
            os.rename(entry, Path(root) / match[1])
        else:
            shutil.rmtree(entry)


def publish(root: str | Path, iteration: int) -> Path:
    """Let the checkpoint of a step appear, whose files are written and synced; ``confirm`` follows."""
    target, partial = step_folder(root, iteration), partial_folder(root, iteration)
    for folder in {path.parent for path in partial.rglob("*")} | {partial}:
        sync(folder)
    if target.exists():
        os.rename(target, _replaced_folder(root, iteration))
    os.rename(partial, target)
    return target


def confirm(root: str | Path, iteration: int) -> None:
    """Have the name of a published checkpoint written out, and point to the newest one; what it replaced goes."""
    sync(Path(root))
    shutil.rmtree(_replaced_folder(root, iteration), ignore_errors=True)
    point_to(root, steps(root)[0])


def point_to(root: str | Path, iteration: int) -> None:
    """Replace the pointer."""
    atomic_write.write(Path(root) / LATEST, f"{iteration}\n")
    sync(Path(root))


def set_aside(root: str | Path, after: int) -> list[Path]:
    """Move checkpoints of later steps than ``after`` out of the way; returns where they are now.

    They are of a course that the run has left, or damaged; nothing is deleted.
    """
    clean(root)  # what is put back later would count again
    moved = []
    for step in steps(root):
        if step <= after:
            continue
        moved.append(move_aside(step_folder(root, step)))
    if moved:
        sync(Path(root))
        if left := steps(root):
            point_to(root, left[0])
    return moved


def move_aside(source: Path) -> Path:
    """Move a checkpoint, or what stands in its place, out of the way; returns where it is now."""
    target, again = source.parent / SET_ASIDE / source.name, 1
    while os.path.lexists(target):
        again += 1
        target = target.with_name(f"{source.name}-{again}")
    target.parent.mkdir(exist_ok=True)
    os.rename(source, target)
    return target


def remove(root: str | Path, iteration: int) -> None:
    """Delete a checkpoint, nothing of which is ``manifest.foreign``; a crash meanwhile leaves a hidden rest that the
    next ``clean`` removes."""
    source = step_folder(root, iteration)
    hidden = source.with_name(f".{source.name}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(source, hidden)
    shutil.rmtree(hidden)
