"""A command overwrites and deletes only files that it recognizes as its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from genlip_megatron import outputs, storage
from genlip_megatron.data.read import BlockCache

OWN = outputs.json_object("mine")


def test_own_files_are_replaced_and_others_are_refused(tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    for existing in (None, b"", b'{"mine": 1}'):
        if existing is not None:
            target.write_bytes(existing)
        outputs.write(target, b'{"mine": 2}', OWN)
        assert target.read_bytes() == b'{"mine": 2}'
    for existing in (b"a thesis", b'{"thine": 1}', b"[1]", b"\xff\xfe"):
        target.write_bytes(existing)
        with pytest.raises(ValueError, match=f"--output {target}: it exists, and this command did not write it"):
            outputs.write(target, b'{"mine": 2}', OWN)
        assert target.read_bytes() == existing
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.json"]


def test_only_regular_files_are_written(tmp_path: Path) -> None:
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "pipe")
    for target, part in (
        (tmp_path, "it is a folder"),
        (tmp_path / "no" / "file", "its folder does not exist"),
        (tmp_path / "nowhere", "not a regular file, or a broken link"),
        (tmp_path / "pipe", "not a regular file"),
        (Path("/dev/null"), "not a regular file"),
    ):
        with pytest.raises(ValueError, match=part):
            outputs.check_file(target, OWN)  # not a write, which could replace /dev/null
    assert (tmp_path / "nowhere").is_symlink()


def test_the_target_of_a_link_is_kept(tmp_path: Path) -> None:
    kept, link = tmp_path / "kept.json", tmp_path / "link.json"
    kept.write_bytes(b"a thesis")
    link.symlink_to(kept)
    with pytest.raises(ValueError, match="this command did not write it"):
        outputs.write(link, b'{"mine": 2}', OWN)
    kept.write_bytes(b'{"mine": 1}')
    outputs.write(link, b'{"mine": 2}', OWN)
    assert kept.read_bytes() == b'{"mine": 1}' and link.read_bytes() == b'{"mine": 2}' and not link.is_symlink()


def test_remote_files_are_checked_too() -> None:
    url = "memory://outputs/page"
    storage.write_bytes(url, b"a thesis")
    with pytest.raises(ValueError, match="this command did not write it"):
        outputs.write(url, b'{"mine": 1}', OWN)
    storage.write_bytes(url, b'{"mine": 1}')
    outputs.write(url, b'{"mine": 2}', OWN)
    assert storage.read_bytes(url) == b'{"mine": 2}'


def test_rows_of_other_tables_are_not_captions() -> None:
    own = b'{"path": "a.jpg", "caption": "x"}\n{"path": "b.jpg", "error": "y"}\n'
    assert outputs.captions(own) and outputs.captions(b'{"key": "1", "caption": "x", "truth": "y", "token_ids": [1]}')
    for other in (b'{"image": "a.jpg", "caption": "x"}', own + b'{"caption": "x"}', b'["path", "caption"]', b"text"):
        assert not outputs.captions(other)


def test_first_other_sees_files_links_and_empty_folders(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").touch()
    assert outputs.first_other(tmp_path, lambda path: path == "a/b/file") == ""
    (tmp_path / "c").symlink_to(tmp_path / "a")
    assert outputs.first_other(tmp_path, lambda path: path == "a/b/file") == "c"
    (tmp_path / "c").unlink()
    (tmp_path / "d").mkdir()
    assert outputs.first_other(tmp_path, lambda path: path == "a/b/file") == "d"


def test_the_cache_keeps_foreign_files_in_its_folder(tmp_path: Path) -> None:
    photos = [tmp_path / "photos" / "1.jpg", tmp_path / "ab" / "2.block", tmp_path / "ab" / f"{'0' * 38}.jpg"]
    for photo in photos:
        photo.parent.mkdir(exist_ok=True)
        photo.write_bytes(b"x" * 100_000)
        os.utime(photo, (0, 0))
    (tmp_path / "ab" / f"{'0' * 38}.block").symlink_to(photos[0])
    cache = BlockCache(str(tmp_path), 10_000)
    for i in range(30):
        cache.write(str(i), b"x" * 1000)
    assert all(photo.stat().st_size == 100_000 for photo in photos)
    assert 5_000 < sum(cache.path(str(i)).is_file() * 1000 for i in range(30)) <= 10_000  # foreign files do not count


def test_only_leftovers_of_killed_writes_are_removed(tmp_path: Path) -> None:
    for name in (".x.json.123.partial", ".x.json.notes.partial", ".x.json.partial"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (0, 0))
    storage.write_bytes(str(tmp_path / "x.json"), b"1")
    assert sorted(os.listdir(tmp_path)) == [".x.json.notes.partial", ".x.json.partial", "x.json"]
