"""Files on local disks (paths) and in object storage (URLs that fsspec knows) behind the same functions.

Credentials and endpoints come from where the store's fsspec package looks for them (environment variables such as
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

# Errors that a retry does not fix.
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, ValueError, ImportError)
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound")  # of botocore
RETRIES, TIMEOUT_SECONDS = 5, 60.0
_FIRST_RETRIES, _FIRST_TIMEOUT_SECONDS = 1, 15.0
_LEFTOVER_SECONDS = 3600
_LISTING_SECONDS = 600.0  # a folder of 100,000 shards is hundreds of requests
_STATS_AT_ONCE = 32


class StoreError(ConnectionError):
    """A remote store failed after all retries; it may work later."""


def is_remote(path: str) -> bool:
    """Whether ``path`` is a URL rather than a local path."""
    return re.match(r"[a-z0-9+.-]+://", path) is not None


@functools.cache
def _filesystem(protocol: str) -> Any:
    try:
        # A cached listing would hide files that other processes wrote since.
        return fsspec.filesystem(protocol, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{protocol}:// cannot be read: {error}") from error


def filesystem(url: str) -> Any:
    """The fsspec file system of a URL.

    Raises:
        ValueError: its protocol is unknown or its package is not installed.
        OSError: the store does not answer this process's first request, or needs credentials.
    """
    protocol, _, rest = url.partition("://")
    store = _filesystem(protocol)
    _greet(protocol, rest.split("/", 1)[0])
    return store


@functools.cache
def _greet(protocol: str, host: str) -> None:
    """Send one cheap request per process, so that a wrong address or missing credentials fail within 30 seconds."""
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
    """A store's short answer about one file; fails within 30 seconds."""
    ask = functools.partial(_call, store, method, url, timeout=_FIRST_TIMEOUT_SECONDS)
    return with_retries(ask, _FIRST_RETRIES, url)


def with_retries(action: Callable[[], T], retries: int = RETRIES, url: str = "") -> T:
    """The result of ``action``, retried after growing pauses when it fails.

    Raises:
        OSError, ValueError: an error that a retry does not fix; it names ``url``, if given.
        StoreError: all retries failed.
    """
    for attempt in range(retries + 1):
        try:
            return action()
        except Exception as raised:  # each store raises its own errors
            error = _told(raised)
            if (final := _as_final(error, url)) is not None:
                raise final from error
            if attempt == retries:
                raise StoreError(f"{url}: the store does not answer ({_reason(error)})".lstrip(": ")) from error
            # Random, so that ranks that failed together do not retry together.
            time.sleep(min(0.1 * 2**attempt, 10.0) * random.uniform(0.5, 1.5))
    raise AssertionError("unreachable")


def _told(error: Exception) -> Exception:
    """The store's own error: over HTTP fsspec reports any failure to get a file's size as a missing file."""
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and isinstance(cause, Exception):
        return cause if "aiohttp" in type(cause).__module__ else error
    return error


def _as_final(error: Exception, url: str) -> Exception | None:
    """The error to raise for one that a retry does not fix, else None."""
    status = getattr(error, "status", 0)
    if type(error).__name__ in _NO_CREDENTIALS or status in (401, 403) or isinstance(error, PermissionError):
        return PermissionError(f"{url}: access denied ({_reason(error)}); check the store's credentials".lstrip(": "))
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return FileNotFoundError(f"{url or _reason(error)}: no such file, folder or bucket")
    if type(error).__name__ == "ParamValidationError":  # botocore's, of a bucket's name
        return ValueError(f"{url}: {_reason(error)}")
    return error if isinstance(error, _FINAL) else None


def _reason(error: Exception) -> str:
    """A store's error message, or its class if the message is empty."""
    text = " ".join(str(getattr(error, "message", "") or error).split())
    status = getattr(error, "status", 0)
    return f"{status} {text}" if status else text or type(error).__name__


def _call(store: Any, method: str, *args: Any, timeout: float = TIMEOUT_SECONDS, **kwargs: Any) -> Any:
    """Call a store's method, with a timeout in seconds if the store supports it."""
    if store.async_impl:
        return fsspec.asyn.sync(store.loop, getattr(store, f"_{method}"), *args, timeout=timeout, **kwargs)
    return getattr(store, method)(*args, **kwargs)


def read_range(
    url: str, start: int | None, end: int | None, retries: int = RETRIES, timeout: float = TIMEOUT_SECONDS
) -> bytes:
    """Bytes ``start`` to ``end`` of a remote file, or all of it.

    Raises:
        OSError: it could not be read with ``retries`` retries of ``timeout`` seconds each.
    """
    store = filesystem(url)
    return with_retries(lambda: _call(store, "cat_file", url, start=start, end=end, timeout=timeout), retries, url)


def read_bytes(path: str) -> bytes:
    """A whole small file."""
    return read_range(path, None, None) if is_remote(path) else Path(path).read_bytes()


def write_bytes(path: str, content: bytes) -> None:
    """Write a whole file; on a local disk atomically."""
    if is_remote(path):
        store = filesystem(path)
        with_retries(lambda: store.pipe_file(path, content), url=path)
        return
    target = Path(path)
    # Remove what killed processes left.
    for leftover in target.parent.glob(f".{glob.escape(target.name)}.*.partial"):
        process = leftover.name[len(target.name) + 2 : -len(".partial")]
        with contextlib.suppress(FileNotFoundError):
            if process.isdecimal() and time.time() - leftover.lstat().st_mtime > _LEFTOVER_SECONDS:
                leftover.unlink()
    atomic_write.write(target, content, str(os.getpid()))


def exists(path: str) -> bool:
    """Whether the file exists."""
    if not is_remote(path):
        return os.path.isfile(path)
    store = filesystem(path)
    return with_retries(lambda: bool(store.isfile(path)), url=path)


def state(path: str) -> tuple[int, str]:
    """(size in bytes, a string that changes with the file: its modification time or entity tag)."""
    if not is_remote(path):
        status = os.stat(path)
        return status.st_size, str(status.st_mtime_ns)
    store = filesystem(path)
    info = with_retries(lambda: _call(store, "info", path), url=path)
    stamp = next((str(info[name]) for name in ("ETag", "etag", "LastModified", "mtime") if info.get(name)), "")
    return int(info["size"]), stamp


@contextlib.contextmanager
def local_copy(path: str) -> Iterator[str]:
    """A local path of the file: its own, or that of a download that exists until the block ends."""
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="genlip-") as folder:
        target = os.path.join(folder, "file")
        store = filesystem(path)
        with_retries(lambda: store.get_file(path, target), url=path)
        yield target


def join(folder: str, name: str) -> str:
    """``name`` in ``folder``; a URL or absolute path stays unchanged."""
    if is_remote(name) or os.path.isabs(name):
        return name
    return f"{folder.rstrip('/')}/{name}" if is_remote(folder) else os.path.join(folder, name)


def parent(path: str) -> str:
    """The folder of a file."""
    return path.rsplit("/", 1)[0] if is_remote(path) else os.path.dirname(path)


def states(paths: Sequence[str]) -> list[os.stat_result | None]:
    """``os.stat`` of local files, None for missing ones; in threads, because network disks answer slowly."""

    def state_of(path: str) -> os.stat_result | None:
        try:
            return os.stat(path)
        except OSError:
            return None

    # In parts, because a task of a pool costs more than the stat of a local file.
    size = 1 + len(paths) // _STATS_AT_ONCE
    with ThreadPoolExecutor(_STATS_AT_ONCE) as pool:
        parts = [paths[start : start + size] for start in range(0, len(paths), size)]
        return [status for part in pool.map(lambda some: list(map(state_of, some)), parts) for status in part]


def sizes_in(folder: str) -> dict[str, int | None] | None:
    """{``name_in_store``: bytes} of every file in a remote folder, or None if the store cannot list it."""
    store = filesystem(folder)
    try:
        entries = with_retries(lambda: _call(store, "ls", folder, timeout=_LISTING_SECONDS, detail=True), 1)
        return {entry["name"]: entry.get("size") for entry in entries if entry["type"] == "file"}
    except (OSError, ValueError, KeyError):
        return None


def name_in_store(url: str) -> str:
    """The name of a remote file in its store's listings."""
    return str(filesystem(url)._strip_protocol(url))
