"""Reading: the same bytes from disks, S3 and web servers despite failures; each remote byte is fetched once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from genlip_megatron import storage
from genlip_megatron.data.loader import Loader
from genlip_megatron.data.read import BlockCache, Piece, ShardReader
from genlip_megatron.testing.runs import tiny_config
from tests.data.conftest import CONTENT, Web
from tests.data.test_loader import assert_equal, take

ROOT = Path(__file__).parent.parent.parent


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
    assert ours.bytes_fetched == 0
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
    ours = reader(tmp_path)
    for offset, size in SPANS:
        assert read(ours, web.shard, offset, size) == CONTENT[offset : offset + size]
    assert ours.bytes_fetched == len(CONTENT)
    # Another reader, as in another process or the next run, finds everything in the cache.
    other = reader(tmp_path)
    ranges = len([span for _, span in web.requests if span])
    assert read(other, web.shard, 0, len(CONTENT)) == CONTENT
    assert other.bytes_fetched == 0 and len([span for _, span in web.requests if span]) == ranges


def test_another_version_of_a_file_is_not_served_from_the_cache(web: Web, tmp_path: Path) -> None:
    assert read(reader(tmp_path), web.shard, 0, 10) == CONTENT[:10]
    web.files["/s.tar"] = CONTENT[1:]
    assert read(reader(tmp_path), web.shard, 0, 10) == CONTENT[1:11]


@pytest.mark.parametrize("failure", ["fail", "cut", "hang"])
def test_errors_short_answers_and_timeouts_are_retried(failure: str, web: Web, tmp_path: Path) -> None:
    setattr(web, failure, 1)
    assert read(reader(tmp_path, timeout=0.5), web.shard, 5, 50_000) == CONTENT[5:50_005]
    setattr(web, failure, 100)
    with pytest.raises(OSError):
        read(reader(tmp_path, timeout=0.2, retries=1), web.shard, 200_000, 10)


def test_a_failed_piece_does_not_affect_the_others(web: Web, tmp_path: Path) -> None:
    here, gone = web.shard, f"{web.url}/gone.tar"
    pieces = [Piece(here, 0, 9), Piece(gone, 0, 9), Piece(here, 299_999, 9)]
    first, missing, beyond = reader(tmp_path).read(pieces)
    assert first == CONTENT[:9] and isinstance(missing, OSError) and isinstance(beyond, OSError)


def test_a_truncated_cache_block_is_fetched_again(web: Web, tmp_path: Path) -> None:
    assert read(reader(tmp_path), web.shard, 100, 9000) == CONTENT[100:9100]
    for block in tmp_path.glob("*/*.block"):
        os.truncate(block, 500)
    assert read(reader(tmp_path), web.shard, 100, 9000) == CONTENT[100:9100]


def test_many_shards_need_few_file_descriptors(tmp_path: Path) -> None:
    for i in range(400):
        (tmp_path / f"{i}.tar").write_bytes(CONTENT[:100])
    ours = reader(tmp_path / "cache")
    before = len(os.listdir("/proc/self/fd"))
    ours.read([Piece(str(tmp_path / f"{i}.tar"), 0, 100) for i in range(400)])
    assert len(os.listdir("/proc/self/fd")) - before <= 260


def test_a_damaged_cache_block_is_fetched_again(web: Web, tmp_path: Path) -> None:
    ours, piece = reader(tmp_path), Piece(web.shard, 0, 10)
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
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert read(reader(tmp_path), web.shard, 0, 100_000) == CONTENT[:100_000]


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
        fetched.append(remote.samples.reader.bytes_fetched)
        assert isinstance(remote.samples.bytes_read["image"], int) and torch.is_tensor(local[0].token_ids)
    assert fetched[0] > 0 and fetched[1] == 0
    # The samples' checksums detect a damaged block on the disk, and it is fetched again.
    for block in cache.glob("*/*.block"):
        block.write_bytes(bytes(block.stat().st_size))
    again = Loader(tiny_config(demo_data, data__train_data=patterns, data__cache_dir=str(cache)), "train")
    for ours, expected in zip(take(again, 12), local, strict=True):
        assert_equal(ours, expected)
    assert again.samples.reader.bytes_fetched > 0 and again.quarantine.total == 0
