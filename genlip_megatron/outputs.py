"""What a command may replace: only what it recognises by its content, or a folder's by its names, as its own.

A file that is missing or empty may always be written. A link is replaced by the file; what it leads to stays as it is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from genlip_megatron.data import storage

# Whether the content of a file is what the command writes.
Recognise = Callable[[bytes], bool]


def begins_with(start: bytes, *parts: bytes) -> Recognise:
    """Files that begin with ``start`` and hold all of ``parts``.

    >>> begins_with(b"<svg", b"MFU")(b"<svg><text>MFU</text></svg>")
    True
    """
    return lambda content: content.startswith(start) and all(part in content for part in parts)


def json_object(*keys: str) -> Recognise:
    """JSON objects that have all of ``keys``.

    >>> json_object("a", "b")(b'{"a": 1, "b": 2, "c": 3}'), json_object("a")(b'["a"]'), json_object("a")(b"a")
    (True, False, False)
    """

    def recognise(content: bytes) -> bool:
        try:
            tree = json.loads(content)
        except ValueError:
            return False
        return isinstance(tree, dict) and set(keys) <= tree.keys()

    return recognise


def json_lines(is_row: Callable[[set[str]], bool]) -> Recognise:
    """JSON Lines files in which the keys of every row satisfy ``is_row``.

    >>> rows = json_lines(lambda keys: keys == {"key", "reason"})
    >>> rows(b'{"key": "1", "reason": "x"}'), rows(b'{"key": "1"}'), rows(b"key reason")
    (True, False, False)
    """

    def recognise(content: bytes) -> bool:
        try:
            rows = [json.loads(line) for line in content.splitlines()]
        except ValueError:
            return False
        return all(isinstance(row, dict) and is_row(set(row)) for row in rows)

    return recognise


# Rows of tools/caption.py.
captions = json_lines(
    lambda keys: (
        keys <= {"path", "key", "caption", "error", "truth", "token_ids"}
        and len(keys & {"path", "key"}) == len(keys & {"caption", "error"}) == 1
    )
)


def check_file(target: str | Path, recognise: Recognise, setting: str = "--output") -> None:
    """Raise ValueError where a file could not be written, or would replace one that the command has not written.

    Args:
        target: a path, or a URL of a remote store.
        recognise: see above.
        setting: the name of the target in messages.
    """
    where = f"{setting} {target}"
    foreign = ValueError(f"{where}: it exists, and this command did not write it; name another file, or remove it")
    if storage.is_remote(str(target)):
        if storage.exists(str(target)) and not _recognised(storage.read_bytes(str(target)), recognise):
            raise foreign
        return
    target = Path(target)
    if target.is_dir():
        raise ValueError(f"{where}: it is a folder; name a file")
    if not target.parent.is_dir():
        raise ValueError(f"{where}: its folder does not exist; make it first")
    if not os.access(target.parent, os.W_OK):
        raise ValueError(f"{where}: {target.parent} cannot be written to")
    if not os.path.lexists(target):
        return
    if not target.is_file():
        raise ValueError(f"{where}: it is no regular file, or a link that leads nowhere; name another")
    try:
        content = target.read_bytes()
    except OSError as error:
        raise ValueError(f"{where}: it exists and cannot be read ({error.strerror}); name another file") from None
    if not _recognised(content, recognise):
        raise foreign


def _recognised(content: bytes, recognise: Recognise) -> bool:
    return not content or recognise(content)


def write(target: str | Path, content: bytes | str, recognise: Recognise, setting: str = "--output") -> None:
    """Write a whole file, which appears when it is complete.

    Raises:
        ValueError: as ``check_file``, or the disk cannot be written to.
    """
    check_file(target, recognise, setting)
    try:
        storage.write_bytes(str(target), content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise ValueError(f"{setting} {target}: could not be written: {error}") from error


def first_other(folder: Path, known: Callable[[str], bool]) -> str:
    """The first file, link or empty folder below a folder that is not ``known``; "" when all are.

    Args:
        known: is asked about a path relative to the folder, with forward slashes. Links are not followed.
    """
    for place, folders, files in os.walk(folder):
        folders.sort()
        whole = [name for name in folders if os.path.islink(path := os.path.join(place, name)) or not os.listdir(path)]
        for name in sorted(files + whole):
            path = os.path.relpath(os.path.join(place, name), folder)
            if not known(path):
                return path
    return ""
