"""Write a file so that readers see either all of it or none of it.

The content goes to a hidden file in the same folder, ``.NAME[.LABEL].partial``, which is then renamed to ``NAME``.
Folders that appear all at once: ``convert/staging.py`` and ``checkpoint/paths.py``.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_path(target: str | Path, label: str = "", sync: bool = True) -> Iterator[Path]:
    """Yield a path to write to; rename it to ``target`` when the block ends without an error, else remove it.

    Args:
        target: the file to create or replace.
        label: part of the temporary name. Processes that may write ``target`` at the same time need one each.
        sync: wait until the content is on the disk before the rename. Without it a power cut may leave an empty file.
    """
    target = Path(target)
    partial = target.with_name(".".join(filter(None, (f".{target.name}", label, "partial"))))
    try:
        yield partial
        if sync:
            descriptor = os.open(partial, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        os.replace(partial, target)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def write(target: str | Path, content: bytes | str, label: str = "", sync: bool = True) -> None:
    """Write a whole file through ``atomic_path``; text as UTF-8."""
    with atomic_path(target, label, sync) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
