"""Missing shards and indexes, and shards of another size, are found before training, locally and in a store."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from genlip_megatron import storage
from genlip_megatron.config import DataConfig
from genlip_megatron.data.dataset import open_dataset
from genlip_megatron.data.index import index_path
from genlip_megatron.data.manifest import Shard, write_manifest
from genlip_megatron.data.presence import absent
from genlip_megatron.data.scan import build_index
from genlip_megatron.tokenizer import load_tokenizer
from tests.data.shards import many, write_shard


def shards(folder: str, count: int = 12, size: int | None = 3) -> list[Shard]:
    return [Shard(f"{folder}/{i:02d}.tar", 1, "", size) for i in range(count)]


@pytest.fixture(params=["local", "store"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A folder with twelve shards of three bytes and their indexes."""
    place = str(tmp_path) if request.param == "local" else "memory://bucket/data"
    for shard in shards(place):
        storage.write_bytes(shard.path, b"abc")
        storage.write_bytes(index_path(shard.path), b"x")
    yield place
    if request.param == "store":
        storage.filesystem(place).rm("/bucket", recursive=True)


def remove(path: str) -> None:
    if storage.is_remote(path):
        storage.filesystem(path).rm(path)
    else:
        os.remove(path)


def test_unchanged_shards_pass(folder: str) -> None:
    assert absent(shards(folder), "S", True) == absent(shards(folder, size=None), "S", True) == ""
    if not storage.is_remote(folder):
        os.utime(f"{folder}/03.tar", (0, 0))  # a copy
        assert absent(shards(folder), "S", True) == ""


def test_faults_are_named_and_counted(folder: str) -> None:
    remove(f"{folder}/01.tar")
    storage.write_bytes(f"{folder}/02.tar", b"ab")
    storage.write_bytes(f"{folder}/03.tar", b"abcd")
    remove(index_path(f"{folder}/04.tar"))
    said = absent(shards(folder), "data.train_data", True)
    assert said.startswith("data.train_data: 4 of 12 shards cannot be used (seen from ") and "\n" not in said
    for part in ("01.tar is missing", "02.tar has 2 bytes, 3 when it was indexed", "03.tar has 4 bytes, 3 when",
                 "04.tar.index.safetensors is missing", "run: python tools/prepare_data.py"):  # fmt: skip
        assert part.removeprefix("run: ") in said
    # A manifest of an older version has no sizes.
    assert "2 of 12 shards" in absent(shards(folder, size=None), "S", True)
    for i in range(5, 12):
        remove(f"{folder}/{i:02d}.tar")
    assert "11 of 12 shards" in (said := absent(shards(folder), "S", True)) and "; and 6 more. " in said


def test_a_folder_of_a_store_is_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    paths = shards("memory://once/data", 300)
    files = storage.filesystem("memory://once/data")  # asks once whether the store answers
    for shard in paths:
        files.pipe({shard.path: b"abc", index_path(shard.path): b"x"})
    for name in ("ls", "info", "exists", "isfile"):
        real = getattr(files, name)
        monkeypatch.setattr(files, name, lambda *a, name=name, real=real, **k: (calls.append(name), real(*a, **k))[1])
    try:
        assert absent(paths, "S", True) == "" and calls == ["ls"]
        assert absent(paths, "S", False) == "" and calls == ["ls"]
    finally:
        files.rm("/once", recursive=True)


@pytest.mark.parametrize("answer", [PermissionError("denied"), NotImplementedError(), [], "half"])
def test_a_store_that_cannot_list_is_skipped(answer: Any, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not storage.is_remote(folder):
        pytest.skip("of stores")
    files = storage.filesystem(folder)
    whole = files.ls(folder, detail=True)
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: None)

    def ls(*args: object, **kwargs: object) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return whole[:9] if answer == "half" else answer

    monkeypatch.setattr(files, "ls", ls)
    assert absent(shards(folder), "S", True) == ""


def test_a_manifest_records_the_sizes(demo_data: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(demo_data / "tokenizer.model")
    shard = write_shard(tmp_path / "s.tar", many(4))
    build_index(shard, tokenizer, "P.")
    write_manifest(str(tmp_path / "x.dataset.json"), [shard], lambda index: None)
    for name in (f"{tmp_path}/x.dataset.json", shard):
        dataset = open_dataset([name], DataConfig(prompt="P."), tokenizer.fingerprint, "S")
        assert [found.size for found in dataset.shards] == [os.path.getsize(shard)]
