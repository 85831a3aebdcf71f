"""Patterns: files, folders, globs and brace lists mean the same on a local disk and in a store."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from genlip_megatron import storage
from genlip_megatron.data.patterns import expand_shards, find

TREE = ("0.tar", "a/1.tar", "a/b/2.tar", "a/b/c/3.tar")


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def names(folder: Path | str, pattern: str) -> list[str]:
    """Names of shards relative to a folder."""
    place = f"{folder}/"
    return [shard.removeprefix(place) for shard in expand_shards([f"{place}{pattern}"], "S")]


@pytest.fixture
def store() -> Iterator[str]:
    """A folder of a store in memory."""
    files = storage.filesystem("memory://")
    yield "memory://bucket"
    files.rm("/bucket", recursive=True)


PATTERNS = {
    "**/*.tar": [*TREE],
    "a/**/*.tar": ["a/1.tar", "a/b/2.tar", "a/b/c/3.tar"],
    "*.tar": ["0.tar"],
    "*/*.tar": ["a/1.tar"],
    "a/b": ["a/b/2.tar"],
    "{a,a/b}/*.tar": ["a/1.tar", "a/b/2.tar"],
    "a/b/{2,c/3}.tar": ["a/b/2.tar", "a/b/c/3.tar"],
    "a/[0-9].tar": ["a/1.tar"],
    "a/?.tar": ["a/1.tar"],
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_mean_the_same_locally_and_in_a_store(pattern: str, store: str, tmp_path: Path) -> None:
    put(tmp_path, *TREE, "a/readme.txt", "a/._1.tar", ".hidden.tar")
    for name in (*TREE, "a/readme.txt", "a/._1.tar", ".hidden.tar"):
        storage.filesystem(store).pipe_file(f"{store}/{name}", b"x")
    assert names(tmp_path, pattern) == PATTERNS[pattern]
    found = expand_shards([f"{store}/{pattern}"], "S")
    assert [name.split("bucket/")[1] for name in found] == PATTERNS[pattern]


@pytest.mark.parametrize("name", ["x[1].tar", "what?.tar", "all*.tar", "a{1,2}.tar", "open{.tar", "a,b.tar", " x .tar"])
def test_an_existing_name_is_taken_literally(name: str, tmp_path: Path) -> None:
    put(tmp_path, name, "x1.tar", "whatx.tar", "allx.tar", "a1.tar", "a2.tar", f"[set]{{1}}/{name}", "set1/9.tar")
    assert names(tmp_path, name) == [name]
    assert names(tmp_path, f"[set]{{1}}/{name}") == [f"[set]{{1}}/{name}"]
    assert names(tmp_path, "[set]{1}/*.tar") == [f"[set]{{1}}/{name}"]


def test_a_folder_gives_its_tar_files(tmp_path: Path) -> None:
    put(tmp_path, "b.TAR", "a.tar", "._a.tar", ".b.tar", "c.tar/0.tar", "d.tar.gz", "e.txt", "a.tar.index.safetensors")
    assert names(tmp_path, "") == ["a.tar", "b.TAR"]
    assert names(tmp_path, "*.tar") == ["a.tar"]
    assert names(tmp_path, "*") == ["a.tar", "b.TAR"]
    assert names(tmp_path, "c.tar") == ["c.tar/0.tar"]
    assert names(tmp_path, "**") == ["a.tar", "b.TAR", "c.tar/0.tar"]


def test_a_glob_of_folders_gives_their_shards(tmp_path: Path) -> None:
    put(tmp_path, "part-0/0.tar", "part-1/1.tar", "part-1/deep/2.tar")
    assert names(tmp_path, "part-*") == ["part-0/0.tar", "part-1/1.tar"]


def test_a_shard_named_by_two_spellings_counts_once(tmp_path: Path) -> None:
    put(tmp_path, "a/0.tar", "a/1.tar")
    (tmp_path / "link.tar").symlink_to(tmp_path / "a/0.tar")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    spellings = [f"{tmp_path}/a/0.tar", f"{tmp_path}/a/../a/0.tar", f"{tmp_path}//a/0.tar", f"{tmp_path}/link.tar"]
    assert expand_shards([*spellings, f"{tmp_path}/b"], "S") == [spellings[0], f"{tmp_path}/b/1.tar"]
    assert expand_shards([os.path.relpath(spellings[0]), spellings[0]], "S") == [os.path.relpath(spellings[0])]


@pytest.mark.parametrize("pattern", ["", "*.tar"])
def test_the_error_hints_at_shards_in_subfolders(pattern: str, tmp_path: Path) -> None:
    put(tmp_path, "a/0.tar", "a/b/1.tar", "x.tar.gz", "a/y.tgz", ".hidden/2.tar")
    with pytest.raises(ValueError, match="matches no .tar file") as caught:
        names(tmp_path, pattern)
    assert f"2 .tar files lie in subfolders: '{tmp_path}/" in str(caught.value) and "**/*.tar'" in str(caught.value)
    assert "2 compressed shards are not supported: decompress them to .tar first" in str(caught.value)
    with pytest.raises(ValueError, match=r"missing\.tar' matches no .tar file$"):
        names(tmp_path, "missing.tar")


def test_a_warning_mentions_shards_in_folders_that_a_glob_matches(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path, "0.tar", "a/1.tar", "a/2.tar", "b/notes.txt")
    with caplog.at_level(logging.WARNING):
        assert names(tmp_path, "**/*") == ["0.tar", "a/1.tar", "a/2.tar"] and not caplog.text
        assert names(tmp_path, "*") == ["0.tar"]
    assert f"To use the 2 .tar files in the folders too, add '{tmp_path}/*/*.tar'" in caplog.text


def test_a_warning_mentions_shards_in_subfolders(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, "0.tar", "a/1.tar", "b.tar.zst")
    with caplog.at_level(logging.WARNING):
        assert expand_shards([str(tmp_path)], "S") == [f"{tmp_path}/0.tar"]
        assert "only the shards at its top level are used; 1 .tar files lie in subfolders" in caplog.text
        assert "1 compressed shards are not supported" in caplog.text
        caplog.clear()
        monkeypatch.setenv("RANK", "1")
        expand_shards([str(tmp_path)], "S")
        assert not caplog.text


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ([], "S is empty: name .tar shards"),
        (["nowhere/{a,b.tar"], "S: 'nowhere/{a,b.tar': a brace is not closed"),
        (["{a..c}.tar"], r"c\.tar' matches no .tar file"),
        (["c*.tar"], "matches no .tar file"),
        (["."], r"b\.tar is empty \(0 bytes\)"),
    ],
)
def test_an_error_is_one_line(
    patterns: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    put(tmp_path, "a.tar")
    (tmp_path / "b.tar").touch()
    with pytest.raises(ValueError, match=message) as error:
        expand_shards(patterns, "S")
    assert "\n" not in str(error.value)


def test_a_brace_list_in_a_store_is_one_listing(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files = storage.filesystem(store)
    for i in range(50):
        files.pipe_file(f"{store}/{i:03d}.tar", b"x")
    asked: list[str] = []
    monkeypatch.setattr(files, "isfile", lambda path: bool(asked.append(path)) or files.exists(path))
    assert len(find(f"{store}/{{000..049}}.tar")) == 50
    assert len(asked) == 1  # whether the list itself is a file
