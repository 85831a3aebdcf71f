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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import fsspec.asyn

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


class StoreError(ConnectionError):
    """A remote store did not answer, or failed, however often it was asked. Later it may."""


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
        ask_quickly(_filesystem(protocol), "info", f"{protocol}://{host}")
    except PermissionError as error:
        if type(error.__cause__).__name__ in _NO_CREDENTIALS:
            raise
    except (StoreError, ImportError):
        raise
    except (OSError, ValueError, NotImplementedError):
        pass  # it answered


def ask_quickly(store: Any, method: str, url: str) -> Any:
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
