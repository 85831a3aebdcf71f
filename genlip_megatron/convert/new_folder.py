"""A folder that appears all at once, or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from genlip_megatron.checkpoint.folder import sync


@contextlib.contextmanager
def new_folder(target: Path, size: int, overwrite: bool, foreign: Callable[[Path], str]) -> Iterator[Path]:
    """A hidden sibling folder to write to, which takes ``target``'s place when the block ends well.

    When the block fails, what was written is removed; what a killed process left is removed by the next.

    Args:
        target: missing, or an empty folder; another is replaced with ``overwrite``.
        size: bytes that will be written.
        foreign: names something in the folder that is there that would be lost and is not of the kind that is written;
            "" when there is nothing such.

    Raises:
        ValueError: there is something that must not be replaced, too little room, or the disk cannot be written to.
    """
    target = target.resolve()  # where a link leads, so that the link stays
    partial = target.with_name(f".{target.name}.partial")
    replaced = target.with_name(f".{target.name}.replaced")
    try:
        if replaced.exists() and not target.exists():
            os.rename(replaced, target)
        check_target(target, overwrite, foreign)
        target.parent.mkdir(parents=True, exist_ok=True)
        for rest in (partial, replaced):
            if rest.exists():
                shutil.rmtree(rest)
        if (free := shutil.disk_usage(target.parent).free) < size:
            raise ValueError(f"{target}: {free / 1e9:.2f} GB free, {size / 1e9:.2f} GB are to be written")
        partial.mkdir()
        try:
            yield partial
            for path in [*partial.rglob("*"), partial]:
                sync(path)
            if target.exists():
                os.rename(target, replaced)
            os.rename(partial, target)
            sync(target.parent)
        except BaseException:
            if not partial.exists():  # it has its place already, and the disk did not confirm it
                os.rename(target, partial)
            if replaced.exists():
                os.rename(replaced, target)
            shutil.rmtree(partial, ignore_errors=True)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        raise ValueError(f"{target} could not be written: {error}; nothing was left behind") from error


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
            f"{target}: --overwrite replaces what this tool has written alone, and the folder holds something else "
            f"({other}); name another"
        )


def first_other(folder: Path, known: Callable[[Path], bool]) -> str:
    """The first entry of a folder, by name, that is not ``known``; "" when all are."""
    return next((entry.name for entry in sorted(folder.iterdir()) if not known(entry)), "")
