"""Commands replace only their own outputs, which they recognize by content, or in a folder by file names.

A missing or empty file may always be written. Writing to a link replaces the link and keeps its target.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from genlip_megatron import storage

# Whether a file's content looks like the command's output.
Recognise = Callable[[bytes], bool]


def begins_with(start: bytes, *parts: bytes) -> Recognise:
    """Files that begin with ``start`` and contain all of ``parts``.

    >>> begins_with(b"<svg", b"MFU")(b"<svg><text>MFU</text></svg>")
    True
    """
    return lambda content: content.startswith(start) and all(part in content for part in parts)


def json_object(*keys: str) -> Recognise:
    """JSON objects with all of ``keys``.

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
    """JSON Lines files where the keys of each row satisfy ``is_row``.

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
    """Check that a file can be written and would not replace a file that another program wrote.

    Args:
        target: a path, or a URL of a remote store.
        recognise: whether an existing file's content is the command's own.
        setting: the name of the target in errors.

    Raises:
        ValueError: it cannot, or it would.
    """
    where = f"{setting} {target}"
    if storage.is_remote(str(target)):
        content = storage.read_bytes(str(target)) if storage.exists(str(target)) else b""
    else:
        content = _local_content(Path(target), where)
    if content and not recognise(content):
        raise ValueError(f"{where}: it exists, and this command did not write it. Name another file, or remove it.")


def _local_content(target: Path, where: str) -> bytes:
    """The content of a file that can be written; empty if it does not exist."""
    if target.is_dir():
        raise ValueError(f"{where}: it is a folder. Name a file.")
    if not target.parent.is_dir():
        raise ValueError(f"{where}: its folder does not exist. Make it first.")
    if not os.access(target.parent, os.W_OK):
        raise ValueError(f"{where}: {target.parent} is not writable. Name another folder.")
    if not os.path.lexists(target):
        return b""
    if not target.is_file():
        raise ValueError(f"{where}: it is not a regular file, or a broken link. Name another file.")
    try:
        return target.read_bytes()
    except OSError as error:
        raise ValueError(f"{where}: it exists and cannot be read ({error.strerror}). Name another file.") from None


def write(target: str | Path, content: bytes | str, recognise: Recognise, setting: str = "--output") -> None:
    """Write a file, which appears only when it is complete.

    Raises:
        ValueError: as ``check_file``, or the write fails.
    """
    check_file(target, recognise, setting)
    try:
        storage.write_bytes(str(target), content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise ValueError(f"{setting} {target}: could not be written: {error}") from error


def check_folder(target: Path) -> None:
    """Raise ValueError if ``--output`` is a file."""
    if target.exists() and not target.is_dir():
        raise ValueError(f"--output {target}: it is a file. Name a folder.")


def first_unlisted(folder: Path, index: str, kind: str) -> str:
    """The first thing in a folder that its index does not list; "" if there is none.

    Args:
        folder: of a command's output.
        index: name of its JSON file with {"kind", "files"}.
        kind: of the command's folders.
    """
    try:
        found = json.loads((folder / index).read_text(encoding="utf-8"))
        names = {index, *found["files"]} if found["kind"] == kind else None
    except (OSError, ValueError, TypeError, KeyError):
        names = None
    return f"no {index} of {kind}" if names is None else first_other(folder, names.__contains__)


def first_other(folder: Path, known: Callable[[str], bool]) -> str:
    """The first file, link or empty folder below ``folder`` that is not ``known``; "" if all are.

    Args:
        known: takes a path relative to ``folder``. Links are not followed.
    """
    for place, folders, files in os.walk(folder):
        folders.sort()
        leaves = [name for name in folders if os.path.islink(path := os.path.join(place, name)) or not os.listdir(path)]
        for name in sorted(files + leaves):
            path = os.path.relpath(os.path.join(place, name), folder)
            if not known(path):
                return path
    return ""
