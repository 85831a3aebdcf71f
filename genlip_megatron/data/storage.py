"""Files on local disks and in object storage under one set of names: paths, and URLs that fsspec knows.

Credentials and endpoints of a store come from where its fsspec package looks for them (environment variables such as
``AWS_ENDPOINT_URL``, or fsspec's own configuration), never from a run's configuration.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import os
import random
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import fsspec.asyn
from braceexpand import braceexpand

T = TypeVar("T")

# Errors that asking again does not mend.
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, ValueError, ImportError)
RETRIES, TIMEOUT_SECONDS = 5, 60.0
_LEFTOVER_SECONDS = 3600


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
    """
    return _filesystem(url.split("://", 1)[0])


def with_retries(action: Callable[[], T], retries: int = RETRIES) -> T:
    """The result of ``action``, tried again after a growing pause when it fails.

    Raises:
        OSError, ValueError: what cannot be mended by trying again, or the last failure; any other error as OSError.
    """
    for attempt in range(retries + 1):
        try:
            return action()
        except _FINAL:
            raise
        except Exception as error:  # each store has errors of its own
            if attempt == retries:
                if isinstance(error, OSError):
                    raise
                raise OSError(f"{type(error).__name__}: {error}") from error
            # Ranks that failed together should not come back together.
            time.sleep(min(0.1 * 2**attempt, 10.0) * random.uniform(0.5, 1.5))
    raise AssertionError("unreachable")


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
    return with_retries(lambda: _call(store, "cat_file", url, start=start, end=end, timeout=timeout), retries)


def read_bytes(path: str) -> bytes:
    """A whole small file."""
    return read_range(path, None, None) if is_remote(path) else Path(path).read_bytes()


def write_bytes(path: str, content: bytes) -> None:
    """Write a whole file; on a local disk synced and then renamed, so that it is there completely or not at all."""
    if is_remote(path):
        with_retries(lambda: filesystem(path).pipe_file(path, content))
        return
    target = Path(path)
    # Left over by a process that was killed while it wrote.
    for leftover in target.parent.glob(f".{glob.escape(target.name)}.*.partial"):
        process = leftover.name[len(target.name) + 2 : -len(".partial")]
        with contextlib.suppress(FileNotFoundError):
            if process.isdecimal() and time.time() - leftover.lstat().st_mtime > _LEFTOVER_SECONDS:
                leftover.unlink()
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def exists(path: str) -> bool:
    """Whether there is such a file."""
    return with_retries(lambda: filesystem(path).isfile(path)) if is_remote(path) else os.path.isfile(path)


def state(path: str) -> tuple[int, str]:
    """(size in bytes, a word that changes when the file does: its modification time or entity tag)."""
    if not is_remote(path):
        status = os.stat(path)
        return status.st_size, str(status.st_mtime_ns)
    info = with_retries(lambda: _call(filesystem(path), "info", path))
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
        with_retries(lambda: filesystem(path).get_file(path, target))
        yield target


def join(folder: str, name: str) -> str:
    """``name`` in ``folder``; a name that is a URL or absolute path stays as it is."""
    if is_remote(name) or os.path.isabs(name):
        return name
    return f"{folder.rstrip('/')}/{name}" if is_remote(folder) else os.path.join(folder, name)


def parent(path: str) -> str:
    """The folder of a file."""
    return path.rsplit("/", 1)[0] if is_remote(path) else os.path.dirname(path)


def _matches(pattern: str, setting: str) -> list[str]:
    """Files of a folder's ``*.tar``, of a glob, or the one of that name."""
    if is_remote(pattern):
        store = filesystem(pattern)
        wanted = pattern
        if "*" not in pattern and with_retries(lambda: store.isdir(pattern)):
            wanted = f"{pattern.rstrip('/')}/*.tar"
        try:
            found = with_retries(lambda: store.glob(wanted) if "*" in wanted else [wanted] * store.isfile(wanted))
        except OSError as error:
            raise ValueError(f"{setting}: {pattern!r} cannot be listed: {error}") from error
        return sorted(store.unstrip_protocol(path) for path in found)
    if os.path.isdir(pattern):
        return sorted(str(path) for path in Path(pattern).glob("*.tar") if not path.is_dir())
    return [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern))


def expand_shards(patterns: Sequence[str], setting: str, check_files: bool = True) -> list[str]:
    """Shard files of files, folders, globs and brace lists (``{000..099}``, ``{a,b}``), local or remote, each once.

    Args:
        patterns: what to look for.
        setting: its name in messages.
        check_files: refuse local files that cannot be read or are empty.

    Raises:
        ValueError: nothing was named, or a pattern matches no readable, non-empty file.
    """
    if not patterns:
        raise ValueError(f"{setting} is empty: name .tar shards, folders of them, globs or brace lists")
    shards: list[str] = []
    for pattern in patterns:
        for part in braceexpand(pattern) if "{" in pattern else [pattern]:
            found = _matches(part, setting)
            if not found:
                raise ValueError(f"{setting}: {part!r} matches no .tar file")
            shards += found
    for shard in shards:
        if is_remote(shard) or not check_files:
            continue
        if not os.path.isfile(shard) or not os.access(shard, os.R_OK):
            raise ValueError(f"{setting}: {shard} is not a readable file")
        if os.path.getsize(shard) == 0:
            raise ValueError(f"{setting}: {shard} is empty (0 bytes)")
    return list(dict.fromkeys(shards))
