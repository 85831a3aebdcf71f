"""Shard files that a path, glob or brace list names, on local disks and in object storage."""

from __future__ import annotations

import glob
import logging
import os
import stat
from collections.abc import Sequence
from typing import Any

from braceexpand import braceexpand

from genlip_megatron import storage
from genlip_megatron.data.image import IMAGE_SUFFIXES
from genlip_megatron.storage import is_remote

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst", ".tar.lz4")
# The search for hints stops after this many files and folders.
_LOOKED_AT = 20_000

logger = logging.getLogger(__name__)


class NothingFound(ValueError):
    """A name or pattern matches no file."""


def _braces(pattern: str) -> list[str]:
    """The parts of a brace list. Raises ValueError if a brace is not closed."""
    try:
        return list(braceexpand(pattern)) if "{" in pattern else [pattern]
    except ValueError:
        raise ValueError(f"{pattern!r}: a brace is not closed") from None


def _hidden(path: str) -> bool:
    return path.rsplit("/", 1)[-1].startswith(".")


def find(pattern: str) -> dict[str, list[str]]:
    """{part: its matches} of a path, glob or brace list: local files and folders, or files in a store.

    A name that exists is taken literally, whatever it contains. ``**`` matches folders of any depth; wildcards match no
    hidden files. Parts keep their order, a glob's matches are sorted; a part may have no match.

    Raises:
        ValueError: a brace that is not closed, or a store that cannot be listed.
    """
    if is_remote(pattern):
        return _find_remote(pattern)
    if os.path.lexists(pattern):
        return {pattern: [pattern]}
    # Folders that exist as written are taken literally.
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
    store = storage.filesystem(pattern)
    found, listings = {}, dict[str, Any]()
    try:
        literal = "{" in pattern and storage.ask_quickly(store, "isfile", pattern)
        parts = [pattern] if literal else _braces(pattern)
        for part in parts:
            folder = storage.parent(part)
            if len(parts) > 1 and folder not in listings:
                # One listing instead of thousands of requests, if the store can list.
                listings[folder] = storage.sizes_in(folder) or {}
            listed = storage.name_in_store(part) in listings.get(folder, {})
            found[part] = [part] if listed else _part_in_store(store, part)
    except (PermissionError, storage.StoreError):
        raise  # already names the store and the remedy
    except OSError as error:
        raise ValueError(f"{pattern!r} cannot be listed: {error}") from error
    return found


def _part_in_store(store: Any, part: str) -> list[str]:
    """The file with that name, the shards in the folder with that name, or the matches of a glob."""
    if storage.ask_quickly(store, "isfile", part):
        return [part]
    if storage.ask_quickly(store, "isdir", part):
        names = [name for name in storage.sizes_in(part) or {} if name.lower().endswith(".tar")]
    elif glob.has_magic(part):
        matches = storage.with_retries(lambda: store.glob(part, detail=True))
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
    """Hints about shards that a local folder pattern does not take: those in subfolders, and compressed ones."""
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
        hints.append(f"{compressed} compressed shards are not supported: decompress them to .tar first")
    return "; ".join(hints)


def _unpacked(folder: str) -> str:
    """A hint about images that lie in a local folder and are not packed into shards."""
    if is_remote(folder) or not os.path.isdir(folder):
        return ""
    images = sum(name.lower().endswith(tuple(IMAGE_SUFFIXES)) for name in os.listdir(folder))
    return f"{images} images are in it: pack them with tools/make_shards.py {folder} --output SHARDS" if images else ""


def _files(part: str, matches: list[str]) -> tuple[list[str], int]:
    """(the shards among the matches of a part: its files, or if there are none, the shards in its folders; how many
    shards lie in folders that a glob matches beside the files that are used).
    """
    folders: list[str] = []
    if not is_remote(part):
        kinds = zip(matches, storage.states(matches), strict=True)
        folders = [path for path, status in kinds if status is not None and stat.S_ISDIR(status.st_mode)]
    others = set(folders)
    files = [path for path in matches if path not in others]
    if not glob.has_magic(part):
        return files or [shard for folder in folders for shard in _shards_in(folder)], 0
    within = {folder: _shards_in(folder) for folder in folders}
    # "*" also matches the files that tools write beside shards; a folder called x.tar is not a shard.
    files = [path for path in files if path.lower().endswith(".tar")] or files
    if files:
        return files, len({shard for shards in within.values() for shard in shards} - set(files))
    chosen = [folder for folder in folders if not folder.rstrip("/").lower().endswith(".tar")]
    return [shard for folder in chosen for shard in within[folder]], 0


def _same_file(paths: Sequence[str]) -> list[str]:
    """``paths`` without repetitions: other spellings of an earlier path, or links to it."""
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
    """The shards of files, folders, globs and brace lists (``{000..099}``, ``{a,b}``), local or remote, each once.

    Args:
        patterns: files, folders, globs or brace lists.
        setting: name of the setting, for messages.
        check_files: refuse local files that cannot be read or are empty.

    Raises:
        NothingFound: a pattern matches no file.
        ValueError: ``patterns`` is empty, or a file cannot be read or is empty.
    """
    if not patterns:
        raise ValueError(f"{setting} is empty: name .tar shards, folders of shards, globs or brace lists")
    shards: list[str] = []
    for pattern in patterns:
        try:
            parts = find(pattern)
        except ValueError as error:
            raise ValueError(f"{setting}: {error}") from error
        for part, matches in parts.items():
            found, below = _files(part, matches)
            beside = ""
            if not is_remote(part) and (os.path.isdir(part) or (not found and glob.has_magic(part))):
                beside = _beside(part)
            if not found:
                beside = beside or _unpacked(part)
                raise NothingFound(f"{setting}: {part!r} matches no .tar file" + (beside and f"; {beside}"))
            if os.environ.get("RANK", "0") == "0":
                if beside:
                    logger.warning("%s: %s: only the shards at its top level are used; %s", setting, part, beside)
                elif below:
                    logger.warning(
                        "%s: %r matches files and folders; only the files are used. To use the %d .tar files in the "
                        "folders too, add %r", setting, part, below, os.path.join(part, "*.tar"),
                    )  # fmt: skip
            shards += found
    shards = _same_file(shards)
    local = [shard for shard in shards if check_files and not is_remote(shard)]
    for shard, status in zip(local, storage.states(local), strict=True):
        if status is None or not stat.S_ISREG(status.st_mode) or not os.access(shard, os.R_OK):
            raise ValueError(f"{setting}: {shard} is not a readable file")
        if status.st_size == 0:
            raise ValueError(f"{setting}: {shard} is empty (0 bytes)")
    return shards
