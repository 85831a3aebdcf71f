"""Indexing: every bad member is refused with its reason, every good one kept, and a stale index is never used."""

from __future__ import annotations

import io
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import pytest
from PIL import Image

from genlip_megatron.data.index import build_index, expand_shards, index_path, load_index
from genlip_megatron.data.text import Tokenizer, load_tokenizer

ROOT = Path(__file__).parent.parent.parent
PROMPT = "Describe."
CAPTION = b'{"caption": "One red circle."}'


@pytest.fixture
def tokenizer(demo_data: Path) -> Tokenizer:
    return load_tokenizer(demo_data / "tokenizer.model")


def image(kind: str = "JPEG", size: tuple[int, int] = (48, 32), **options: object) -> bytes:
    out = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert("RGB").save(out, kind, **options)
    return out.getvalue()


def rotated() -> bytes:
    """A JPEG that its EXIF data turns by 90 degrees."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return image(exif=exif)


def bomb() -> bytes:
    """A PNG of a few bytes whose header claims 30000 x 30000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def write_shard(path: Path, members: dict[str, bytes]) -> str:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return str(path)


def test_formats_sizes_and_counts(tokenizer: Tokenizer, tmp_path: Path) -> None:
    members = {
        "a.jpg": image(), "a.json": CAPTION, "b.PNG": image("PNG"), "b.txt": b"One red circle.",
        "c.webp": image("WEBP"), "c.txt": b"ignored beside json", "c.json": CAPTION, "d.jpeg": rotated(),
        "d.json": CAPTION, "e.jpg": image(), "e.json": CAPTION, "e.txt": b"ignored too", "readme.md": b"not a sample",
    }  # fmt: skip
    shard = write_shard(tmp_path / "s.tar", members)
    index = build_index(shard, tokenizer, PROMPT)
    assert index.keys == ["a", "b", "c", "d", "e"] and not index.refused
    assert list(zip(index.rows["height"], index.rows["width"], strict=True)) == [(32, 48)] * 3 + [(48, 32), (32, 48)]
    answer = len(tokenizer.encode("One red circle.")) + 2
    assert index.rows["loss_tokens"].tolist() == [answer] * 5
    assert index.rows["text_tokens"].tolist() == [answer + len(tokenizer.encode(PROMPT))] * 5
    with open(shard, "rb") as file:
        for row, key, suffix in zip(index.rows, index.keys, ("jpg", "PNG", "webp", "jpeg", "jpg"), strict=True):
            file.seek(row["image_offset"])
            content = file.read(row["image_size"])
            assert content == members[f"{key}.{suffix}"] and zlib.crc32(content) == row["image_crc"]
    loaded = load_index(shard, tokenizer, PROMPT)
    assert loaded.keys == index.keys and (loaded.rows == index.rows).all()


BAD = {
    "truncated": (image()[:-200], CAPTION, "does not decode"),
    "garbage": (b"\xff\xd8 not a JPEG", CAPTION, "does not decode"),
    "empty": (b"", CAPTION, "does not decode"),
    "bomb": (bomb(), CAPTION, "does not decode|pixels"),
    "thin": (image(size=(1, 300)), CAPTION, "aspect ratio above 200"),
    "gif": (image("GIF"), CAPTION, "does not decode"),
    "caption": (image(), b"{", "not JSON"),
    "nested": (image(), b"[" * 100_000, "not JSON"),
}


def test_bad_samples_are_refused_one_by_one(tokenizer: Tokenizer, tmp_path: Path) -> None:
    members = {"good1.jpg": image(), "good1.json": CAPTION}
    for name, (content, caption, _) in BAD.items():
        members |= {f"{name}.jpg": content, f"{name}.json": caption}
    members |= {"alone.jpg": image(), "silent.json": CAPTION, "../outside.jpg": image(), "../outside.json": CAPTION}
    members |= {"good2.jpg": image(), "good2.json": CAPTION}
    shard = write_shard(tmp_path / "s.tar", members)
    with tarfile.open(shard, "a") as archive:
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    index = build_index(shard, tokenizer, PROMPT)
    assert index.keys == ["good1", "good2"]
    for name, (*_, reason) in BAD.items():
        assert any(part in index.refused[name] for part in reason.split("|")), index.refused[name]
    assert index.refused["alone"] == "missing caption" and index.refused["silent"] == "missing image"
    for name in ("../outside.jpg", "../outside.json", "link.jpg"):
        assert "leaves the archive" in index.refused[name]


def test_a_truncated_archive_keeps_what_is_whole(tokenizer: Tokenizer, tmp_path: Path) -> None:
    members = {f"{i}.{suffix}": content for i in range(4) for suffix, content in (("jpg", image()), ("json", CAPTION))}
    shard = write_shard(tmp_path / "s.tar", members)
    with tarfile.open(shard) as archive:
        third = archive.getmember("2.jpg").offset_data
    os.truncate(shard, third + 100)
    index = build_index(shard, tokenizer, PROMPT)
    assert index.keys == ["0", "1"] and index.refused


def test_an_index_that_does_not_fit_is_refused(tokenizer: Tokenizer, demo_data: Path, tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "s.tar", {"a.jpg": image(), "a.json": CAPTION})
    with pytest.raises(ValueError, match="has no index; run: python tools/prepare_data.py"):
        load_index(shard, tokenizer, PROMPT)
    build_index(shard, tokenizer, PROMPT)
    with pytest.raises(ValueError, match="made with another prompt than data.prompt = 'Look.'"):
        load_index(shard, tokenizer, "Look.")
    os.utime(shard, (1, 1))
    with pytest.raises(ValueError, match="older than its shard, which changed"):
        load_index(shard, tokenizer, PROMPT)
    write_shard(tmp_path / "s.tar", {"a.jpg": image(size=(640, 480)), "a.json": CAPTION})
    with pytest.raises(ValueError, match="older than its shard, whose size changed"):
        load_index(shard, tokenizer, PROMPT)
    build_index(shard, tokenizer, PROMPT)
    other = tmp_path / "other.model"
    train = ["tools/train_tokenizer.py", str(demo_data / "val-*.tar"), "--output", str(other)]
    subprocess.run([sys.executable, *train], cwd=ROOT, check=True, capture_output=True)
    with pytest.raises(ValueError, match="made with another tokenizer; run"):
        load_index(shard, load_tokenizer(other), PROMPT)
    index_path(shard).write_bytes(b"damaged")
    with pytest.raises(ValueError, match="is damaged"):
        load_index(shard, tokenizer, PROMPT)


def test_shards_of_files_folders_and_globs(tmp_path: Path) -> None:
    for name in ("b.tar", "a.tar"):
        write_shard(tmp_path / name, {"x.txt": b"x"})
    expected = [str(tmp_path / name) for name in ("a.tar", "b.tar")]
    assert expand_shards([str(tmp_path)], "S") == expected
    assert expand_shards([f"{tmp_path}/*.tar", expected[0]], "S") == expected
    with pytest.raises(ValueError, match="S is empty: name .tar shards"):
        expand_shards([], "S")
    with pytest.raises(ValueError, match="matches no .tar file"):
        expand_shards([f"{tmp_path}/c*.tar"], "S")
    (tmp_path / "c.tar").touch()
    with pytest.raises(ValueError, match=r"c\.tar is empty \(0 bytes\)"):
        expand_shards([str(tmp_path)], "S")


def test_preparing_twice_does_the_work_once(demo_data: Path, tmp_path: Path) -> None:
    shutil.copy(demo_data / "val-00000.tar", tmp_path / "v.tar")
    command = [
        sys.executable,
        "tools/prepare_data.py",
        str(tmp_path),
        "--tokenizer",
        str(demo_data / "tokenizer.model"),
    ]
    first, second = (subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True) for _ in range(2))
    assert "1 shards (0 unchanged), 24 good samples, 0 refused" in first.stdout
    assert "1 shards (1 unchanged), 24 good samples, 0 refused" in second.stdout
