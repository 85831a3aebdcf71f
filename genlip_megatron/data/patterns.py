"""Shard files that a path, glob or brace list names, on local disks and in object storage."""

from __future__ import annotations

import glob
import logging
import os
import stat
from collections.abc import Sequence
from typing import Any

from braceexpand import braceexpand

from genlip_megatron.data.storage import (
    StoreError,
    ask_quickly,
    filesystem,
    is_remote,
    name_in_store,
    parent,
    sizes_in,
    states,
    with_retries,
)

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst", ".tar.lz4")
# Files and folders after which no more hints are looked for.
_LOOKED_AT = 20_000

logger = logging.getLogger(__name__)


class NothingFound(ValueError):
    """A name or pattern that no file answers to."""


def _braces(pattern: str) -> list[str]:
    """The parts of a brace list. Raises ValueError for one that does not close."""
    try:
        return list(braceexpand(pattern)) if "{" in pattern else [pattern]
    except ValueError:
        raise ValueError(f"{pattern!r}: a brace is not closed") from None


def _hidden(path: str) -> bool:
    return path.rsplit("/", 1)[-1].startswith(".")


def find(pattern: str) -> dict[str, list[str]]:
    """What a path, glob or brace list names, by its parts: files and folders on a local disk, files in a store.

    A name that exists is taken as it is, whatever it contains. ``**`` matches folders of any depth, no wildcard matches
    a hidden file. Parts keep their order, a glob's matches are sorted; a part may have none.

    Raises:
        ValueError: a brace that is not closed, or a store that cannot be listed.
    """
    if is_remote(pattern):
        return _find_remote(pattern)
    if os.path.lexists(pattern):
        return {pattern: [pattern]}
    # The folders that exist as they are spelled are not searched for.
    root, rest = os.path.split(pattern)
    while root and not os.path.isdir(root):
        root, tail = os.path.split(root)
        rest = os.path.join(tail, rest)
    found = {}
    for part in _braces(rest):
        path = os.path.join(root, part)
        matches = [path] if os.path.lexists(path) else glob.glob(part, root_dir=root or None, recursive=True)
        found[path] = sorted(os.path.join(root, match) for match in matches)
    return found


def _find_remote(pattern: str) -> dict[str, list[str]]:
    store = filesystem(pattern)
    found, listings = {}, dict[str, Any]()
    try:
        literal = "{" in pattern and ask_quickly(store, "isfile", pattern)
        parts = [pattern] if literal else _braces(pattern)
        for part in parts:
            folder = parent(part)
            if len(parts) > 1 and folder not in listings:
                # One request for thousands of shards, where the store can list.
                listings[folder] = sizes_in(folder) or {}
            listed = name_in_store(part) in listings.get(folder, {})
            found[part] = [part] if listed else _part_in_store(store, part)
    except (PermissionError, StoreError):
        raise  # they name the store and what to do
    except OSError as error:
        raise ValueError(f"{pattern!r} cannot be listed: {error}") from error
    return found


def _part_in_store(store: Any, part: str) -> list[str]:
    """The file of that name, the shards in the folder of that name, or the files that a glob matches."""
    if ask_quickly(store, "isfile", part):
        return [part]
    if ask_quickly(store, "isdir", part):
        names = [name for name in sizes_in(part) or {} if name.lower().endswith(".tar")]
    elif glob.has_magic(part):
        matches = with_retries(lambda: store.glob(part, detail=True))
        names = [name for name, entry in matches.items() if entry["type"] == "file"]
    else:
        return []
    return sorted(store.unstrip_protocol(name) for name in names if not _hidden(name))


def _shards_in(folder: str) -> list[str]:
    """The shards of a local folder."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.name.lower().endswith(".tar") and not entry.is_dir()]
    return [os.path.join(folder, name) for name in sorted(names) if not _hidden(name)]


def _beside(path: str) -> str:
    """What may have been meant beside the shards of a local folder: those in its subfolders, and compressed ones."""
    folder = path
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder) or "."
    below, compressed, seen = 0, 0, 0
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not _hidden(name)]
        files = [name.lower() for name in files if not _hidden(name)]
        compressed += sum(name.endswith(_COMPRESSED) for name in files)
        if place != folder:
            below += sum(name.endswith(".tar") for name in files)
            seen += len(files) + len(folders)
        if seen > _LOOKED_AT:
            break
    hints = [f"{below} .tar files lie in subfolders: {os.path.join(folder, '**/*.tar')!r}"] if below else []
    if compressed:
        hints.append(f"{compressed} compressed shards are not read: decompress them to .tar first")
    return "; ".join(hints)


def _files(part: str, matches: list[str]) -> list[str]:
    """The shards among what a part of a pattern names: of folders those in them, unless files are named too."""
    if is_remote(part):
        files, folders = matches, []
    else:
        are_folders = [status is not None and stat.S_ISDIR(status.st_mode) for status in states(matches)]
        files = [path for path, is_folder in zip(matches, are_folders, strict=True) if not is_folder]
        folders = [path for path, is_folder in zip(matches, are_folders, strict=True) if is_folder]
    if glob.has_magic(part):
        # The files that tools write beside shards match "*" as well; a folder called x.tar is no shard.
        files = [path for path in files if path.lower().endswith(".tar")] or files
        folders = [path for path in folders if not path.rstrip("/").lower().endswith(".tar")]
    return files or [shard for folder in folders for shard in _shards_in(folder)]


def _same_file(paths: Sequence[str]) -> list[str]:
    """``paths`` without those that are other spellings of one before, or links to it."""
    folders: dict[str, str] = {}
    first: dict[str, str] = {}
    for path in paths:
        name = path
        if not is_remote(path):
            folder, name = os.path.split(path)
            if folder not in folders:
                folders[folder] = os.path.realpath(folder)
            name = os.path.realpath(path) if os.path.islink(path) else os.path.join(folders[folder], name)
        first.setdefault(name, path)
    return list(first.values())


def expand_shards(patterns: Sequence[str], setting: str, check_files: bool = True) -> list[str]:
    """Shard files of files, folders, globs and brace lists (``{000..099}``, ``{a,b}``), local or remote, each once.

    Args:
        patterns: what to look for.
        setting: its name in messages.
        check_files: refuse local files that cannot be read or are empty.

    Raises:
        NothingFound: a pattern matches no file.
        ValueError: nothing was named, or a file that cannot be read or is empty.
    """
    if not patterns:
        raise ValueError(f"{setting} is empty: name .tar shards, folders of them, globs or brace lists")
    shards: list[str] = []
    for pattern in patterns:
        try:
            parts = find(pattern)
        except ValueError as error:
            raise ValueError(f"{setting}: {error}") from error
        for part, matches in parts.items():
            found = _files(part, matches)
            beside = ""
            if not is_remote(part) and (os.path.isdir(part) or (not found and glob.has_magic(part))):
                beside = _beside(part)
            if not found:
                raise NothingFound(f"{setting}: {part!r} matches no .tar file" + (beside and f"; {beside}"))
            if beside and os.environ.get("RANK", "0") == "0":
                logger.warning("%s: %s: only the shards at its top are taken; %s", setting, part, beside)
            shards += found
    shards = _same_file(shards)
    local = [shard for shard in shards if check_files and not is_remote(shard)]
    for shard, status in zip(local, states(local), strict=True):
        if status is None or not stat.S_ISREG(status.st_mode) or not os.access(shard, os.R_OK):
            raise ValueError(f"{setting}: {shard} is not a readable file")
        if status.st_size == 0:
            raise ValueError(f"{setting}: {shard} is empty (0 bytes)")
    return shards
