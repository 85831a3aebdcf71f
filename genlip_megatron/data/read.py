"""Read sample bytes from shards: positioned reads on local disks, range requests with a local cache on remote stores.

Local shards are deliberately not memory-mapped: if a mapped file shrinks or its disk fails, touching a page kills the
process, while a failed read costs one sample. The extra copy takes microseconds; decoding takes a millisecond.

Remote shards are fetched in blocks, many at a time, because lanes read neighbouring samples. A block is fetched once
and then served from the local disk, also to other processes and in later epochs.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import hashlib
import os
import re
import threading
import uuid
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from genlip_megatron import atomic_write, storage

_OPEN_FILES = 256
_REQUESTS_AT_ONCE = 16
# A cached block, or what a killed process left of one. Other files in the cache folder are not ours.
_BLOCK = re.compile(r"[0-9a-f]{2}/(?:[0-9a-f]{38}\.block|\.[0-9a-f]{38}\.block\.[0-9a-f]{32}\.partial)")


@dataclass(frozen=True)
class Piece:
    """A byte range of a shard."""

    shard: str
    offset: int
    size: int


class BlockCache:
    """Blocks of remote files on a local disk, with a size limit (LRU). Processes may share it.

    Each block is one file, written atomically.
    """

    def __init__(self, folder: str, max_bytes: int) -> None:
        self._folder, self._max_bytes = Path(folder).expanduser(), max_bytes
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._added = 0
        self._shrink()

    def path(self, name: str) -> Path:
        """File of a block."""
        digest = hashlib.sha256(name.encode()).hexdigest()
        return self._folder / digest[:2] / f"{digest[2:40]}.block"

    def read(self, name: str, start: int, end: int) -> bytes | None:
        """Bytes ``start`` to ``end`` of a block, or None if it is not cached."""
        path = self.path(name)
        try:
            with open(path, "rb") as file:
                file.seek(start)
                content = file.read(end - start)
            os.utime(path)
        except FileNotFoundError:
            return None
        return content

    def write(self, name: str, content: bytes) -> None:
        """Keep a block. On a full disk the block is not kept, and the run continues."""
        path = self.path(name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write.write(path, content, uuid.uuid4().hex, sync=False)
        except OSError:
            return
        with self._lock:
            self._added += len(content)
            if self._added > self._max_bytes // 16:
                self._added = 0
                self._shrink()

    def drop(self, name: str) -> None:
        """Remove a block."""
        self.path(name).unlink(missing_ok=True)

    def _shrink(self) -> None:
        """Remove the least recently used blocks, down to 90 % of the limit."""
        found = []
        for path in self._folder.glob("*/*"):
            if _BLOCK.fullmatch(path.relative_to(self._folder).as_posix()) and not path.is_symlink():
                with contextlib.suppress(FileNotFoundError):  # another process was faster
                    status = path.stat()
                    found.append((status.st_mtime, status.st_size, path))
        total = sum(size for _, size, _ in found)
        if total <= self._max_bytes:
            return
        for _, size, path in sorted(found):
            path.unlink(missing_ok=True)
            total -= size
            if total <= 0.9 * self._max_bytes:
                return


class ShardReader:
    """Reads pieces of local or remote shards. Thread-safe.

    Args:
        cache_dir, cache_bytes: folder and size limit of the cache for remote shards.
        retries, timeout: per request to a remote store; the timeout in seconds.
        block_bytes: size of a request.

    ``bytes_fetched`` counts the bytes from remote stores.
    """

    def __init__(
        self,
        cache_dir: str,
        cache_bytes: int,
        retries: int = storage.RETRIES,
        timeout: float = storage.TIMEOUT_SECONDS,
        block_bytes: int = 4 << 20,
    ) -> None:
        self._cache_options = cache_dir, cache_bytes
        self._retries, self._timeout, self._block_bytes = retries, timeout, block_bytes
        self._files: collections.OrderedDict[str, BinaryIO] = collections.OrderedDict()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(_REQUESTS_AT_ONCE, thread_name_prefix="fetch")
        self._states: dict[str, tuple[int, str]] = {}
        self._under_way: dict[str, Future[bytes]] = {}
        self.bytes_fetched = 0

    @functools.cached_property
    def _cache(self) -> BlockCache:
        """Made for the first remote piece: local shards need no folder."""
        return BlockCache(*self._cache_options)

    def read(self, pieces: Sequence[Piece]) -> list[memoryview | OSError]:
        """The bytes of every piece, or the error. Remote pieces are fetched concurrently."""
        self._start([piece for piece in pieces if storage.is_remote(piece.shard)])
        results: list[memoryview | OSError] = []
        for piece in pieces:
            try:
                results.append(self._remote(piece) if storage.is_remote(piece.shard) else self._local(piece))
            except OSError as error:
                results.append(error)
            except Exception as error:  # a store's own kinds of error
                results.append(OSError(f"{type(error).__name__}: {error}"))
        return results

    def drop(self, piece: Piece) -> bool:
        """Remove a piece from the cache, so that it is fetched again; False if it is local, which is never cached."""
        if not storage.is_remote(piece.shard):
            return False
        for block in self._blocks(piece):
            self._cache.drop(self._name(piece.shard, block))
        return True

    def _local(self, piece: Piece) -> memoryview:
        with self._lock:
            if piece.shard not in self._files:
                while len(self._files) >= _OPEN_FILES:
                    self._files.popitem(last=False)  # closes once no thread reads it
                self._files[piece.shard] = open(piece.shard, "rb")  # noqa: SIM115 - kept open
            self._files.move_to_end(piece.shard)
            file = self._files[piece.shard]
        content = os.pread(file.fileno(), piece.size, piece.offset)
        if len(content) != piece.size:
            raise OSError(
                f"{piece.shard} ends before byte {piece.offset + piece.size}, where its index says the sample ends"
            )
        return memoryview(content)

    def _blocks(self, piece: Piece) -> range:
        first, last = piece.offset // self._block_bytes, (piece.offset + piece.size - 1) // self._block_bytes
        return range(first, last + 1)

    def _name(self, shard: str, block: int) -> str:
        """A block's name in the cache; it changes with the version of the shard."""
        if shard not in self._states:
            self._states[shard] = storage.state(shard)
        size, stamp = self._states[shard]
        return f"{shard} {size} {stamp} {self._block_bytes} {block}"

    def _start(self, pieces: Sequence[Piece]) -> None:
        """Start fetching the blocks that are neither cached nor being fetched."""
        unknown = {piece.shard for piece in pieces} - self._states.keys()
        list(self._pool.map(self._ask_state, unknown))
        for piece in pieces:
            for block in self._blocks(piece) if piece.shard in self._states else ():
                name = self._name(piece.shard, block)
                with self._lock:
                    if name not in self._under_way and not self._cache.path(name).is_file():
                        self._under_way[name] = self._pool.submit(self._fetch, piece.shard, block, name)

    def _ask_state(self, shard: str) -> None:
        with contextlib.suppress(Exception):  # the read will raise it
            self._states[shard] = storage.state(shard)

    def _fetch(self, shard: str, block: int, name: str) -> bytes:
        try:
            start = block * self._block_bytes
            end = min(start + self._block_bytes, self._states[shard][0])
            if end <= start:
                raise OSError(f"{shard} ends before byte {start}, where its index says a sample lies")
            content = storage.read_range(shard, start, end, self._retries, self._timeout)
            if len(content) != end - start:
                raise OSError(f"{shard}: asked for {end - start} bytes, got {len(content)}")
            self._cache.write(name, content)
            self.bytes_fetched += len(content)
            return content
        finally:
            with self._lock:
                self._under_way.pop(name, None)

    def _remote(self, piece: Piece) -> memoryview:
        content = bytearray()
        for block in self._blocks(piece):
            name = self._name(piece.shard, block)
            start = block * self._block_bytes
            first = max(piece.offset - start, 0)
            last = min(piece.offset + piece.size - start, self._block_bytes)
            with self._lock:
                future = self._under_way.get(name)
            part = future.result()[first:last] if future else self._cache.read(name, first, last)
            if part is None or len(part) != last - first:  # missing, or truncated by a crash
                part = self._fetch(piece.shard, block, name)[first:last]
            content += part
        if len(content) != piece.size:
            raise OSError(f"{piece.shard}: {piece.size} bytes expected at {piece.offset}, got {len(content)}")
        return memoryview(bytes(content))

    def close(self) -> None:
        """Close the shards and end the threads."""
        self._files.clear()
        self._pool.shutdown(wait=False, cancel_futures=True)
