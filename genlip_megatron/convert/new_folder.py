"""A folder that appears all at once, or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from genlip_megatron.checkpoint.folder import sync


@contextlib.contextmanager
def new_folder(target: Path, size: int, overwrite: bool, may_replace: Callable[[Path], bool]) -> Iterator[Path]:
    """A hidden sibling folder to write to, which takes ``target``'s place when the block ends well.

    When the block fails, what was written is removed; what a killed process left is removed by the next.

    Args:
        target: missing, or an empty folder; another is replaced with ``overwrite``.
        size: bytes that will be written.
        may_replace: whether the folder that is there is of the kind that is written, and nothing else would be lost.

    Raises:
        ValueError: there is something that must not be replaced, too little room, or the disk cannot be written to.
    """
    target = Path(os.path.abspath(target))
    partial = target.with_name(f".{target.name}.partial")
    replaced = target.with_name(f".{target.name}.replaced")
    try:
        if replaced.exists() and not target.exists():
            os.rename(replaced, target)
        check_target(target, overwrite, may_replace)
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
            shutil.rmtree(partial, ignore_errors=True)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        raise ValueError(f"{target}: cannot be written ({error.strerror or error}); nothing was left behind") from error


def check_target(target: Path, overwrite: bool, may_replace: Callable[[Path], bool]) -> None:
    """Raise ValueError when there is something at ``target`` that ``new_folder`` must not replace."""
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"{target}: it is a file; name a folder")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"{target}: the folder is not empty; name another, or replace it with --overwrite")
    if not may_replace(target):
        raise ValueError(
            f"{target}: --overwrite replaces what this tool has written alone, and the folder holds something else; "
            "name another"
        )
