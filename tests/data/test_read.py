"""Reading: the same bytes from disks, S3 and web servers despite failures; each remote byte is fetched once."""

from __future__ import annotations

import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from genlip_megatron import storage
from genlip_megatron.data.loader import Loader
from genlip_megatron.data.read import BlockCache, Piece, ShardReader
from genlip_megatron.testing.runs import tiny_config
from tests.data.test_loader import assert_equal, take

ROOT = Path(__file__).parent.parent.parent
CONTENT = np.random.default_rng(0).integers(0, 256, 300_000, np.uint8).tobytes()


@dataclass
class Web:
    """A local web server that can be made to fail."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    fail: int = 0  # how many of the next answers are errors
    cut: int = 0  # how many of the next answers end early
    hang: int = 0  # how many of the next requests get no answer
    release: threading.Event = field(default_factory=threading.Event)


@pytest.fixture
def web() -> Iterator[Web]:
    """Serves ``files`` with range requests."""
    state = Web()

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            content = state.files.get(self.path)
            span = self.headers.get("Range", "")
            state.requests.append((self.command, span))
            if content is None:
                self.send_error(404)
                return
            if span and state.hang:
                state.hang -= 1
                state.release.wait(30)
                return
            if span and state.fail:
                state.fail -= 1
                self.send_error(503)
                return
            first, last = 0, len(content) - 1
            if span:
                first, last = (int(part) for part in span.removeprefix("bytes=").split("-"))
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
            else:
                self.send_response(200)
            part = content[first : last + 1]
            self.send_header("Content-Length", str(len(part)))
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("ETag", f'"{len(content)}"')
            self.end_headers()
            if self.command == "GET":
                if span and state.cut:
                    state.cut -= 1
                    part = part[: len(part) // 2]
                self.wfile.write(part)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    yield state
    state.release.set()
    server.shutdown()
    server.server_close()


def reader(folder: Path, **options: object) -> ShardReader:
    return ShardReader(str(folder), 10**9, **{"retries": 2, "timeout": 5.0, "block_bytes": 40_000, **options})  # type: ignore[arg-type]


def read(ours: ShardReader, url: str, offset: int, size: int) -> bytes:
    (content,) = ours.read([Piece(url, offset, size)])
    if isinstance(content, OSError):
        raise content
    return bytes(content)


SPANS = [(0, 10), (39_990, 20), (100, 130_000), (299_990, 10), (0, 300_000), (40_000, 40_000)]


def test_local_pieces(tmp_path: Path) -> None:
    shard = tmp_path / "s.tar"
    shard.write_bytes(CONTENT)
    ours = reader(tmp_path / "cache")
    contents = ours.read([Piece(str(shard), offset, size) for offset, size in SPANS])
    for content, (offset, size) in zip(contents, SPANS, strict=True):
        assert isinstance(content, memoryview) and content == CONTENT[offset : offset + size]
    assert ours.bytes_read == sum(size for _, size in SPANS) and ours.bytes_fetched == 0
    assert not (tmp_path / "cache").exists()


def test_a_file_that_shrinks_or_disappears_loses_only_its_samples(tmp_path: Path) -> None:
    shard = tmp_path / "s.tar"
    shard.write_bytes(CONTENT)
    ours = reader(tmp_path / "cache")
    assert read(ours, str(shard), 250_000, 10) == CONTENT[250_000:250_010]
    os.truncate(shard, 100_000)
    with pytest.raises(OSError, match="ends before byte 250010, where its index says the sample ends"):
        read(ours, str(shard), 250_000, 10)
    with pytest.raises(OSError, match="No such file"):
        read(ours, str(tmp_path / "gone.tar"), 0, 10)
    assert read(ours, str(shard), 0, 10) == CONTENT[:10]


def test_remote_bytes_are_fetched_once(web: Web, tmp_path: Path) -> None:
    web.files["/s.tar"] = CONTENT
    url = f"{web.url}/s.tar"
    ours = reader(tmp_path)
    for offset, size in SPANS:
        assert read(ours, url, offset, size) == CONTENT[offset : offset + size]
    assert ours.bytes_fetched == len(CONTENT)
    # Another reader, as in another process or the next run, finds everything in the cache.
    other = reader(tmp_path)
    ranges = len([span for _, span in web.requests if span])
    assert read(other, url, 0, len(CONTENT)) == CONTENT
    assert other.bytes_fetched == 0 and len([span for _, span in web.requests if span]) == ranges


def test_another_version_of_a_file_is_not_served_from_the_cache(web: Web, tmp_path: Path) -> None:
    web.files["/s.tar"] = CONTENT
    assert read(reader(tmp_path), f"{web.url}/s.tar", 0, 10) == CONTENT[:10]
    web.files["/s.tar"] = CONTENT[1:]
    assert read(reader(tmp_path), f"{web.url}/s.tar", 0, 10) == CONTENT[1:11]


@pytest.mark.parametrize("failure", ["fail", "cut", "hang"])
def test_errors_short_answers_and_timeouts_are_retried(failure: str, web: Web, tmp_path: Path) -> None:
    web.files["/s.tar"] = CONTENT
    setattr(web, failure, 1)
    assert read(reader(tmp_path, timeout=0.5), f"{web.url}/s.tar", 5, 50_000) == CONTENT[5:50_005]
    setattr(web, failure, 100)
    with pytest.raises(OSError):
        read(reader(tmp_path, timeout=0.2, retries=1), f"{web.url}/s.tar", 200_000, 10)


def test_a_failed_piece_does_not_affect_the_others(web: Web, tmp_path: Path) -> None:
    web.files["/s.tar"] = CONTENT
    here, gone = f"{web.url}/s.tar", f"{web.url}/gone.tar"
    pieces = [Piece(here, 0, 9), Piece(gone, 0, 9), Piece(here, 299_999, 9)]
    first, missing, beyond = reader(tmp_path).read(pieces)
    assert first == CONTENT[:9] and isinstance(missing, OSError) and isinstance(beyond, OSError)


def test_a_truncated_cache_block_is_fetched_again(web: Web, tmp_path: Path) -> None:
    web.files["/s.tar"] = CONTENT
    url = f"{web.url}/s.tar"
    assert read(reader(tmp_path), url, 100, 9000) == CONTENT[100:9100]
    for block in tmp_path.glob("*/*.block"):
        os.truncate(block, 500)
    assert read(reader(tmp_path), url, 100, 9000) == CONTENT[100:9100]


def test_many_shards_need_few_file_descriptors(tmp_path: Path) -> None:
    for i in range(400):
        (tmp_path / f"{i}.tar").write_bytes(CONTENT[:100])
    ours = reader(tmp_path / "cache")
    before = len(os.listdir("/proc/self/fd"))
    ours.read([Piece(str(tmp_path / f"{i}.tar"), 0, 100) for i in range(400)])
    assert len(os.listdir("/proc/self/fd")) - before <= 260


def test_a_damaged_cache_block_is_fetched_again(web: Web, tmp_path: Path) -> None:
    web.files["/s.tar"] = CONTENT
    ours, piece = reader(tmp_path), Piece(f"{web.url}/s.tar", 0, 10)
    assert read(ours, piece.shard, 0, 10) == CONTENT[:10]
    for block in tmp_path.glob("*/*.block"):
        block.write_bytes(b"\0" * block.stat().st_size)
    assert read(ours, piece.shard, 0, 10) != CONTENT[:10]
    assert ours.drop(piece) and read(ours, piece.shard, 0, 10) == CONTENT[:10]
    assert not ours.drop(Piece(str(tmp_path / "local.tar"), 0, 10))


def test_a_short_answer_of_a_store_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = storage.filesystem("memory://")
    store.pipe_file("memory://s.tar", CONTENT)
    monkeypatch.setattr(storage, "read_range", lambda *args: b"short")
    with pytest.raises(OSError, match="asked for 40000 bytes, got 5"):
        read(reader(tmp_path), "memory://s.tar", 0, 3)


def test_the_cache_keeps_its_size_limit_and_drops_the_least_recently_used(tmp_path: Path) -> None:
    cache = BlockCache(str(tmp_path), 10_000)
    for i in range(9):
        cache.write(str(i), b"x" * 1000)
        os.utime(cache.path(str(i)), (i, i))
    assert cache.read("0", 0, 5) == b"xxxxx"  # now the most recently used
    for i in range(9, 12):
        cache.write(str(i), b"x" * 1000)
    kept = {str(i) for i in range(12) if cache.path(str(i)).is_file()}
    assert sum(path.stat().st_size for path in tmp_path.glob("*/*")) <= 10_000
    assert {"0", "9", "10", "11"} <= kept and "1" not in kept


def test_on_a_full_disk_reading_continues_without_the_cache(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    web.files["/s.tar"] = CONTENT

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert read(reader(tmp_path), f"{web.url}/s.tar", 0, 100_000) == CONTENT[:100_000]


def test_unknown_stores_are_named() -> None:
    with pytest.raises(ValueError, match="nowhere:// cannot be read"):
        storage.filesystem("nowhere://bucket/x")


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket on an S3-compatible server of this machine."""
    s3fs = pytest.importorskip("s3fs")
    server_module = pytest.importorskip("moto.server")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    storage._filesystem.cache_clear()
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().makedirs("bucket", exist_ok=True)  # moto keeps buckets for the next server
    yield "s3://bucket/data"
    server.stop()
    storage._filesystem.cache_clear()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.slow
def test_training_data_in_an_object_store(bucket: str, demo_data: Path, tmp_path: Path) -> None:
    """Shards in a store give the same stream as on a disk, and a second run fetches nothing."""
    store = storage.filesystem(bucket)
    for shard in demo_data.glob("train-*.tar"):
        store.put_file(str(shard), f"{bucket}/{shard.name}")
    tokenizer = str(demo_data / "tokenizer.model")
    command = [sys.executable, "tools/prepare_data.py", bucket, "--tokenizer", tokenizer, "--workers", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "160 good samples, 0 refused" in done.stdout and f"{bucket}/train.dataset.json written" in done.stdout
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "(0 unchanged)" not in again.stdout

    local = take(Loader(tiny_config(demo_data), "train"), 12)
    cache = tmp_path / "cache"
    fetched = []
    for patterns in ([f"{bucket}/train.dataset.json"], [f"{bucket}/*.tar"]):
        remote = Loader(tiny_config(demo_data, data__train_data=patterns, data__cache_dir=str(cache)), "train")
        for ours, expected in zip(take(remote, 12), local, strict=True):
            assert_equal(ours, expected)
        fetched.append(remote.samples._reader.bytes_fetched)
        assert isinstance(remote.samples.bytes_read["image"], int) and torch.is_tensor(local[0].token_ids)
    assert fetched[0] > 0 and fetched[1] == 0
    # The samples' checksums detect a damaged block on the disk, and it is fetched again.
    for block in cache.glob("*/*.block"):
        block.write_bytes(bytes(block.stat().st_size))
    again = Loader(tiny_config(demo_data, data__train_data=patterns, data__cache_dir=str(cache)), "train")
    for ours, expected in zip(take(again, 12), local, strict=True):
        assert_equal(ours, expected)
    assert again.samples._reader.bytes_fetched > 0 and again.quarantine.total == 0
