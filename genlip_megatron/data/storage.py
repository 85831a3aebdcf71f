"""Files on local disks and in object storage under one set of names: paths, and URLs that fsspec knows.

Credentials and endpoints of a store come from where its fsspec package looks for them (environment variables such as
``AWS_ENDPOINT_URL``, or fsspec's own configuration), never from a run's configuration.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import logging
import os
import random
import re
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import fsspec.asyn
from braceexpand import braceexpand

from genlip_megatron import atomic_write

T = TypeVar("T")

# Errors that asking again does not mend.
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, ValueError, ImportError)
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound")  # of botocore
RETRIES, TIMEOUT_SECONDS = 5, 60.0
_FIRST_RETRIES, _FIRST_TIMEOUT_SECONDS = 1, 15.0
_LEFTOVER_SECONDS = 3600
_LISTING_SECONDS = 600.0  # a folder of 100,000 shards is hundreds of requests
_STATS_AT_ONCE = 32
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst", ".tar.lz4")
# Files and folders after which no more hints are looked for.
_LOOKED_AT = 20_000

logger = logging.getLogger(__name__)


class StoreError(ConnectionError):
    """A remote store did not answer, or failed, however often it was asked. Later it may."""


class NothingFound(ValueError):
    """A name or pattern that no file answers to."""


def is_remote(path: str) -> bool:
    """Whether ``path`` is a URL rather than a local path."""
    return re.match(r"[a-z0-9+.-]+://", path) is not None


@functools.cache
def _filesystem(protocol: str) -> Any:
    try:
        # A listing kept from before other processes wrote would hide what they wrote.
        return fsspec.filesystem(protocol, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{protocol}:// cannot be read: {error}") from error


def filesystem(url: str) -> Any:
    """The fsspec file system of a URL.

    Raises:
        ValueError: its protocol is unknown or its package not installed; says which.
        OSError: the store does not answer the first request of this process, or wants credentials.
    """
    protocol, _, rest = url.partition("://")
    store = _filesystem(protocol)
    _greet(protocol, rest.split("/", 1)[0])
    return store


@functools.cache
def _greet(protocol: str, host: str) -> None:
    """Ask a store for anything at all, once a process: a mistyped address or missing credentials are said in half a
    minute, not after all the tries that a run makes for a store that once answered."""
    try:
        _ask_quickly(_filesystem(protocol), "info", f"{protocol}://{host}")
    except PermissionError as error:
        if type(error.__cause__).__name__ in _NO_CREDENTIALS:
            raise
    except (StoreError, ImportError):
        raise
    except (OSError, ValueError, NotImplementedError):
        pass  # it answered


def _ask_quickly(store: Any, method: str, url: str) -> Any:
    """A store's small answer about one file, found missing in half a minute."""
    ask = functools.partial(_call, store, method, url, timeout=_FIRST_TIMEOUT_SECONDS)
    return with_retries(ask, _FIRST_RETRIES, url)


def with_retries(action: Callable[[], T], retries: int = RETRIES, url: str = "") -> T:
    """The result of ``action``, tried again after a growing pause when it fails.

    Raises:
        OSError, ValueError: what cannot be mended by trying again, as a store says it; of ``url``, if it is given.
        StoreError: the last failure.
    """
    for attempt in range(retries + 1):
        try:
            return action()
        except Exception as raised:  # each store has errors of its own
            error = _told(raised)
            if (final := _as_final(error, url)) is not None:
                raise final from error
            if attempt == retries:
                raise StoreError(f"{url}: the store does not answer ({_reason(error)})".lstrip(": ")) from error
            # Ranks that failed together should not come back together.
            time.sleep(min(0.1 * 2**attempt, 10.0) * random.uniform(0.5, 1.5))
    raise AssertionError("unreachable")


def _told(error: Exception) -> Exception:
    """What a store said: fsspec takes whatever keeps it from a file's size over HTTP for a missing file."""
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and isinstance(cause, Exception):
        return cause if "aiohttp" in type(cause).__module__ else error
    return error


def _as_final(error: Exception, url: str) -> Exception | None:
    """The error to raise for one that asking again does not mend; None for others."""
    status = getattr(error, "status", 0)
    if type(error).__name__ in _NO_CREDENTIALS or status in (401, 403) or isinstance(error, PermissionError):
        return PermissionError(f"{url}: access denied ({_reason(error)}); check the store's credentials".lstrip(": "))
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return FileNotFoundError(f"{url or _reason(error)}: no such file, folder or bucket")
    if type(error).__name__ == "ParamValidationError":  # botocore's, of a bucket's name
        return ValueError(f"{url}: {_reason(error)}")
    return error if isinstance(error, _FINAL) else None


def _reason(error: Exception) -> str:
    """A store's error in a few words; some have none."""
    text = " ".join(str(getattr(error, "message", "") or error).split())
    status = getattr(error, "status", 0)
    return f"{status} {text}" if status else text or type(error).__name__


def _call(store: Any, method: str, *args: Any, timeout: float = TIMEOUT_SECONDS, **kwargs: Any) -> Any:
    """A store's method, given up after ``timeout`` seconds where the store allows that."""
    if store.async_impl:
        return fsspec.asyn.sync(store.loop, getattr(store, f"_{method}"), *args, timeout=timeout, **kwargs)
    return getattr(store, method)(*args, **kwargs)


def read_range(
    url: str, start: int | None, end: int | None, retries: int = RETRIES, timeout: float = TIMEOUT_SECONDS
) -> bytes:
    """Bytes ``start`` to ``end`` of a remote file, or all of it.

    Raises:
        OSError: it could not be read within ``retries`` further tries of ``timeout`` seconds each.
    """
    store = filesystem(url)
    return with_retries(lambda: _call(store, "cat_file", url, start=start, end=end, timeout=timeout), retries, url)


def read_bytes(path: str) -> bytes:
    """A whole small file."""
    return read_range(path, None, None) if is_remote(path) else Path(path).read_bytes()


def write_bytes(path: str, content: bytes) -> None:
    """Write a whole file; on a local disk synced and then renamed, so that it is there completely or not at all."""
    if is_remote(path):
        store = filesystem(path)
        with_retries(lambda: store.pipe_file(path, content), url=path)
        return
    target = Path(path)
    # Left over by a process that was killed while it wrote.
    for leftover in target.parent.glob(f".{glob.escape(target.name)}.*.partial"):
        process = leftover.name[len(target.name) + 2 : -len(".partial")]
        with contextlib.suppress(FileNotFoundError):
            if process.isdecimal() and time.time() - leftover.lstat().st_mtime > _LEFTOVER_SECONDS:
                leftover.unlink()
    atomic_write.write(target, content, str(os.getpid()))


def exists(path: str) -> bool:
    """Whether there is such a file."""
    if not is_remote(path):
        return os.path.isfile(path)
    store = filesystem(path)
    return with_retries(lambda: bool(store.isfile(path)), url=path)


def state(path: str) -> tuple[int, str]:
    """(size in bytes, a word that changes when the file does: its modification time or entity tag)."""
    if not is_remote(path):
        status = os.stat(path)
        return status.st_size, str(status.st_mtime_ns)
    store = filesystem(path)
    info = with_retries(lambda: _call(store, "info", path), url=path)
    stamp = next((str(info[name]) for name in ("ETag", "etag", "LastModified", "mtime") if info.get(name)), "")
    return int(info["size"]), stamp


@contextlib.contextmanager
def local_copy(path: str) -> Iterator[str]:
    """A local path of the file: its own, or for the length of the block that of a download."""
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="genlip-") as folder:
        target = os.path.join(folder, "file")
        store = filesystem(path)
        with_retries(lambda: store.get_file(path, target), url=path)
        yield target


def join(folder: str, name: str) -> str:
    """``name`` in ``folder``; a name that is a URL or absolute path stays as it is."""
    if is_remote(name) or os.path.isabs(name):
        return name
    return f"{folder.rstrip('/')}/{name}" if is_remote(folder) else os.path.join(folder, name)


def parent(path: str) -> str:
    """The folder of a file."""
    return path.rsplit("/", 1)[0] if is_remote(path) else os.path.dirname(path)


def states(paths: Sequence[str]) -> list[os.stat_result | None]:
    """The status of local files, None of those that do not exist; in threads, since network disks answer slowly."""

    def of_some(some: Sequence[str]) -> list[os.stat_result | None]:
        found: list[os.stat_result | None] = []
        for path in some:
            try:
                found.append(os.stat(path))
            except OSError:
                found.append(None)
        return found

    if len(paths) < _STATS_AT_ONCE:
        return of_some(paths)
    size = -(-len(paths) // _STATS_AT_ONCE)
    with ThreadPoolExecutor(_STATS_AT_ONCE) as pool:
        parts = pool.map(of_some, [paths[start : start + size] for start in range(0, len(paths), size)])
        return [status for part in parts for status in part]


def sizes_in(folder: str) -> dict[str, int | None] | None:
    """Bytes of every file in a remote folder by ``name_in_store``; None where the store cannot list it."""
    store = filesystem(folder)
    try:
        entries = with_retries(lambda: _call(store, "ls", folder, timeout=_LISTING_SECONDS, detail=True), 1)
        return {entry["name"]: entry.get("size") for entry in entries if entry["type"] == "file"}
    except (OSError, ValueError, KeyError):
        return None


def name_in_store(url: str) -> str:
    """What a store's listings call a remote file."""
    return str(filesystem(url)._strip_protocol(url))


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
        literal = "{" in pattern and _ask_quickly(store, "isfile", pattern)
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
    if _ask_quickly(store, "isfile", part):
        return [part]
    if _ask_quickly(store, "isdir", part):
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


def _passed_over(part: str, matches: Sequence[str], found: Sequence[str]) -> int:
    """The shards in folders that a glob matches beside the files that are taken."""
    if is_remote(part) or not glob.has_magic(part) or not set(matches) & set(found):
        return 0
    others = sorted(set(matches) - set(found))
    kinds = zip(others, states(others), strict=True)
    folders = [path for path, status in kinds if status is not None and stat.S_ISDIR(status.st_mode)]
    return len({shard for folder in folders for shard in _shards_in(folder)} - set(found))


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
            if os.environ.get("RANK", "0") == "0":
                if beside:
                    logger.warning("%s: %s: only the shards at its top are taken; %s", setting, part, beside)
                elif passed := _passed_over(part, matches, found):
                    logger.warning(
                        "%s: %r: only the files that it matches are taken; %d more .tar files lie in folders that it "
                        "matches: %r", setting, part, passed, os.path.join(part, "*.tar"),
                    )  # fmt: skip
            shards += found
    shards = _same_file(shards)
    local = [shard for shard in shards if check_files and not is_remote(shard)]
    for shard, status in zip(local, states(local), strict=True):
        if status is None or not stat.S_ISREG(status.st_mode) or not os.access(shard, os.R_OK):
            raise ValueError(f"{setting}: {shard} is not a readable file")
        if status.st_size == 0:
            raise ValueError(f"{setting}: {shard} is empty (0 bytes)")
    return shards
