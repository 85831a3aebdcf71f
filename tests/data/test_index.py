"""Indexing refuses every bad member with a reason, keeps every good one, and never uses a stale index."""

from __future__ import annotations

import bz2
import dataclasses
import gzip
import json
import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy

from genlip_megatron import storage
from genlip_megatron.config import DataConfig
from genlip_megatron.data.dataset import open_dataset
from genlip_megatron.data.index import ShardIndex, index_path, load_index, write_index
from genlip_megatron.data.patterns import expand_shards
from genlip_megatron.data.scan import FURTHER_FIELDS, SYSTEM_FILES, UnreadableShard, build_index, refresh_index
from genlip_megatron.tokenizer import Tokenizer, load_tokenizer
from tests.data.shards import CAPTION, bomb, half_png, image, interlaced, rotated, scans, sixteen_bit, write_shard

PROMPT = "Describe."


@pytest.fixture
def tokenizer(demo_data: Path) -> Tokenizer:
    return load_tokenizer(demo_data / "tokenizer.model")


@pytest.fixture
def index_of(tokenizer: Tokenizer, tmp_path: Path) -> Callable[[dict[str, bytes] | bytes], ShardIndex]:
    """Writes these members, or these bytes, as a shard s.tar, and indexes it."""

    def build(content: dict[str, bytes] | bytes) -> ShardIndex:
        shard = tmp_path / "s.tar"
        shard.write_bytes(content) if isinstance(content, bytes) else write_shard(shard, content)
        return build_index(str(shard), tokenizer, PROMPT)

    return build


def pairs(keys: str) -> dict[str, bytes]:
    """Members of good samples."""
    return {f"{key}.{suffix}": part for key in keys for suffix, part in (("jpg", image()), ("json", CAPTION))}


def tar(folder: Path, keys: str) -> bytes:
    """A shard of good samples."""
    return Path(write_shard(folder / "part.tar", pairs(keys))).read_bytes()


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
    loaded = load_index(shard, tokenizer.fingerprint, PROMPT)
    assert list(loaded.keys) == index.keys and (loaded.rows == index.rows).all() and loaded.header == index.header
    assert loaded.rows["plain_jpeg"].tolist() == [True, False, False, False, True]
    assert loaded.rows["caption_is_json"].tolist() == [True, False, True, True, True]


BAD = {
    "truncated": (image()[:-200], CAPTION, "does not decode"),
    "garbage": (b"\xff\xd8 not a JPEG", CAPTION, "does not decode"),
    "empty": (b"", CAPTION, "does not decode"),
    "bomb": (bomb(), CAPTION, "does not decode|pixels"),
    "thin": (image(size=(1, 10_000)), CAPTION, "aspect ratio above 200"),
    "long": (image("PNG", size=(70_000, 400)), CAPTION, "a side of 65535"),
    "cut.png": (image("PNG")[:-30], CAPTION, "does not decode"),
    "mute": (image(), b'{"caption": " "}', "caption is empty"),
    "surrogate": (image(), b'{"caption": "a \\ud800 b"}', "not valid Unicode"),
    "closing": (image(), b'{"caption": "a <|im_end|> b"}', "spells the control token '<|im_end|>'"),
    "control": (image(), b'{"caption": "a <unk> b"}', "spells the control token '<unk>'"),
    "half": (image(size=(480, 320))[:2000] + b"\xff\xd9", CAPTION, "does not decode"),
    "half.png": (half_png(), CAPTION, "bytes of pixels"),
    "half.cmyk": (image(size=(480, 320), mode="CMYK")[:4000] + b"\xff\xd9", CAPTION, "does not decode"),
    "tail.png": (half_png(b"x" * 70), CAPTION, "bytes of pixels"),
    "scans": (scans(), CAPTION, "scans, above 64"),
    "silence": (image(), b'{"conversations": [{"from": "gpt", "value": "<image>"}]}', "caption is empty"),
    "gif": (image("GIF"), CAPTION, "does not decode"),
    "caption": (image(), b"{", "not JSON"),
    "keyless": (image(), b'{"url": "x"}', 'neither "caption" nor'),
    "nested": (image(), b"[" * 100_000, "not JSON"),
}


def test_bad_samples_are_refused_one_by_one(tokenizer: Tokenizer, tmp_path: Path) -> None:
    members = {"good1.jpg": image(), "good1.json": CAPTION}
    for name, (content, caption, _) in BAD.items():
        members |= {f"{name}.jpg": content, f"{name}.json": caption}
    members |= {
        "bare.jpg": image(),
        "silent.json": CAPTION,
        "../outside.jpg": image(),
        "../outside.json": CAPTION,
    }
    members |= {"good2.jpg": image(), "good2.json": CAPTION}
    shard = write_shard(tmp_path / "s.tar", members)
    with tarfile.open(shard, "a") as archive:
        for name, kind in (("link.jpg", tarfile.SYMTYPE), ("device.jpg", tarfile.CHRTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
    before = sorted(tmp_path.rglob("*"))
    index = build_index(shard, tokenizer, PROMPT)
    assert sorted(tmp_path.rglob("*")) == sorted([*before, Path(index_path(shard))]), "nothing else may be written"
    assert index.keys == ["good1", "good2"]
    for name, (*_, reason) in BAD.items():
        assert any(part in index.refused[name] for part in reason.split("|")), index.refused[name]
    assert index.refused["bare"] == "missing caption" and index.refused["silent"] == "missing image"
    for name in ("../outside.jpg", "../outside.json"):
        assert "leaves the archive" in index.refused[name]
    assert "link" in index.refused["link.jpg"] and "device" in index.refused["device.jpg"]


def test_unusual_but_good_images_are_kept(index_of: Any) -> None:
    images = {
        "cmyk": image(mode="CMYK"), "grey": image(mode="L"), "palette": image("PNG", mode="P"), "deep": sixteen_bit(),
        "clear": image("PNG", mode="RGBA"), "turned": rotated(8), "progressive": image(progressive=True),
        "exif": image(exif=b"Exif\0\0broken"),
        "interlaced": interlaced(), "trailing": image() + b"trailing bytes" + b"\xff\xda" * 100,
    }  # fmt: skip
    members = {}
    for name, content in images.items():
        suffix = "png" if content.startswith(b"\x89PNG") else "jpg"
        members |= {f"{name}.{suffix}": content, f"{name}.json": CAPTION}
    index = index_of(members)
    assert index.keys == list(images) and not index.refused
    plain = dict(zip(index.keys, index.rows["plain_jpeg"].tolist(), strict=True))
    assert [name for name in plain if plain[name]] == ["grey", "progressive", "exif", "trailing"]
    sizes = dict(zip(index.keys, zip(index.rows["height"], index.rows["width"], strict=True), strict=True))
    assert sizes["turned"] == (48, 32) and sizes["exif"] == (32, 48)


def test_output_of_img2dataset_is_read_unchanged(tokenizer: Tokenizer, tmp_path: Path) -> None:
    members = {}
    for i in range(3):
        record = {
            "caption": "One red circle.", "url": "http://x/y.jpg", "key": f"{i:09d}", "status": "success",
            "error_message": None, "width": 48, "height": 32, "exif": "{}", "sha256": "0" * 64,
        }  # fmt: skip
        members |= {f"{i:09d}.jpg": image(), f"{i:09d}.txt": b"One red circle.", f"{i:09d}.json": json.dumps(record)}
    encoded = {name: part if isinstance(part, bytes) else part.encode() for name, part in members.items()}
    shard = write_shard(tmp_path / "00000.tar", encoded)
    for name in ("00000_stats.json", "00000.parquet"):
        (tmp_path / name).write_bytes(b"{}")
    assert expand_shards([str(tmp_path)], "S") == [shard]
    index = build_index(shard, tokenizer, PROMPT)
    assert index.keys == ["000000000", "000000001", "000000002"] and not index.refused
    assert index.rows["caption_is_json"].all()


@pytest.mark.parametrize("broken", [[0], [2], [4, 5], [7], [0, 7]])
def test_a_broken_header_loses_only_its_member(broken: list[int], tokenizer: Tokenizer, tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "s.tar", pairs("0123"))
    with tarfile.open(shard) as archive:
        offsets = [member.offset for member in archive.getmembers()]
    with open(shard, "r+b") as file:
        for number in broken:
            file.seek(offsets[number])
            file.write(b"\xff" * 40)
    index = build_index(shard, tokenizer, PROMPT)
    lost = {str(number // 2) for number in broken}
    assert index.keys == [key for key in "0123" if key not in lost]
    # Two neighbours form one gap, because the length of the first member is unknown.
    gaps = [number for number in broken if number - 1 not in broken]
    found = [key for key, reason in index.refused.items() if reason == "broken tar header"]
    assert found == [f"(byte {offsets[number]})" for number in gaps]


def header(name: str, size: bytes, kind: bytes = b"0") -> bytes:
    """A tar header with the given size field and a valid checksum."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    block[124:136], block[156:157] = size.ljust(12, b"\0"), kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


HOSTILE = {
    "negative size": header("x.jpg", b"\xff" * 10 + b"\xfe\x00"),
    "huge size": header("x.jpg", b"\x80" + b"\x7f" * 11),
    "chained long names": header("x", b"00000000001\0", b"L") + b"x".ljust(512, b"\0") * 1,
    "long name of a huge size": header("x", b"77777777777\0", b"L"),
    "pax of a huge size": header("x", b"77777777777\0", b"x"),
    "pax with a negative size": header("x", b"00000000015\0", b"x") + b"13 size=-512\n".ljust(512, b"\0"),
    "sparse map": header("x", b"00000000026\0", b"x") + b"22 GNU.sparse.map=a,b\n".ljust(512, b"\0"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_malicious_headers_do_not_affect_other_members(kind: str, index_of: Any, tmp_path: Path) -> None:
    def part(keys: str) -> bytes:
        content = tar(tmp_path, keys).rstrip(b"\0")
        return content + bytes(-len(content) % 512)

    hostile = HOSTILE[kind] * (3000 if kind == "chained long names" else 1)
    index = index_of(part("01") + hostile + part("23") + bytes(1024))
    assert index.keys[:2] == ["0", "1"] and index.refused
    if kind == "chained long names":
        assert any("given up" in reason for reason in index.refused.values())
    else:
        assert index.keys[-1] == "3"


@pytest.mark.parametrize(
    ("size", "rest", "reason"),
    [
        (10_240, "", ""),  # what tar fills up
        (300_000, "", "zeros to the end of the shard: its data may never have arrived"),
        (10_240, "not tar", "the bytes after the end mark are not tar"),
        (0, "b", "zeros between members: some are lost, unless this is several shards in one file"),
    ],
)
def test_bytes_in_place_of_samples_are_reported(
    size: int, rest: str, reason: str, index_of: Any, tmp_path: Path
) -> None:
    behind = b"\x1f\x8b" + bytes(range(256)) * 8 if rest == "not tar" else tar(tmp_path, rest) if rest else b""
    index = index_of(tar(tmp_path, "a") + bytes(size) + behind)
    assert index.keys == (["a", "b"] if rest == "b" else ["a"])
    (found,) = [*index.refused.values()] or [""]
    assert found.startswith(reason) and bool(found) == bool(reason)


NOT_TARS = {
    "text that begins with 'garbage'": b"garbage",
    "something unknown": b"\x07" + bytes(range(256)) * 20,
    "only zeros: an empty tar, or a file whose data were never written": bytes(10240),
    "gzip: compressed shards are not supported; decompress it first": gzip.compress(b"x" * 9999),
    "bzip2: compressed": bz2.compress(b"x"),
    "xz: compressed": lzma.compress(b"x"),
    "zstd: compressed": b"\x28\xb5\x2f\xfdxxxx",
    "lz4: compressed": b"\x04\x22\x4d\x18xxxx",
    "a zip file": b"PK\x03\x04" + bytes(600),
    "an HTML page": b"\n<!DOCTYPE HTML><html>503 Slow Down</html>",
    "an XML page": b"<?xml version='1.0'?><Error><Code>NoSuchKey</Code></Error>",
    "JSON": b'{"error": "not found"}',
    "a Parquet file": b"PAR1" + bytes(2000),
    "a PDF": b"%PDF-1.7",
    "a JPEG image": image(),
    "a PNG image": image("PNG"),
    "a WebP image": image("WEBP"),
    "a git-LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
    "zeros, then something else": bytes(512) + b"x" * 600,
}


@pytest.mark.parametrize("kind", NOT_TARS)
def test_a_file_that_is_not_a_tar_is_named_and_gets_no_index(kind: str, index_of: Any, tmp_path: Path) -> None:
    with pytest.raises(UnreadableShard, match=rf"s\.tar is not a tar file but {re.escape(kind)}"):
        index_of(NOT_TARS[kind])
    assert list(tmp_path.iterdir()) == [tmp_path / "s.tar"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        ({"0.cls": b"3", "readme.md": b"x"}, "no sample: no member is an image or a caption"),
    ],
)
def test_a_shard_without_samples_is_reported(content: Any, reason: str, index_of: Any, tokenizer: Tokenizer) -> None:
    index = index_of(content)
    assert index.refused == {"(shard)": reason} and refresh_index(index.shard, tokenizer, PROMPT)[1]
    with pytest.raises(ValueError, match=r"S: (no good sample in 1 shards|\S+ is empty \(0 bytes\))"):
        open_dataset([index.shard], DataConfig(prompt=PROMPT), tokenizer.fingerprint, "S")


@pytest.mark.parametrize("refused", [{}, {"(byte 0)": "broken tar header"}])
def test_an_old_index_does_not_hide_a_file_that_is_not_a_tar(
    refused: dict[str, str], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    shard = write_shard(tmp_path / "s.tar", pairs("0"))
    good = build_index(shard, tokenizer, PROMPT)
    Path(shard).write_bytes(b"\x1f\x8b" + bytes(9000))
    size, stamp = storage.state(shard)
    header = dataclasses.replace(good.header, shard_size=size, shard_stamp=stamp)
    write_index(dataclasses.replace(good, rows=good.rows[:0], keys=[], refused=refused, header=header))
    with pytest.raises(ValueError, match="may not be a tar file"):
        load_index(shard, tokenizer.fingerprint, PROMPT)
    with pytest.raises(UnreadableShard, match="gzip"):
        refresh_index(shard, tokenizer, PROMPT)


def test_an_index_of_an_older_version_is_read(tokenizer: Tokenizer, tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "s.tar", {"0.jpg": image(), "0.json": CAPTION, "._0.jpg": b"x"})
    assert build_index(shard, tokenizer, PROMPT).ignored == {SYSTEM_FILES: 1}
    content = Path(index_path(shard)).read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    tensors = {name: tensor for name, tensor in safetensors.numpy.load(content).items() if name != "ignored"}
    safetensors.numpy.save_file(tensors, index_path(shard), header)
    assert load_index(shard, tokenizer.fingerprint, PROMPT).ignored == {}


PAIR = {".jpg": image(), ".json": CAPTION}
SETS: dict[str, tuple[dict[str, bytes], list[str], dict[str, str], dict[str, int]]] = {
    "masks and depth": (
        {"0.jpg": image(), "0.json": CAPTION, "0.seg.png": image("PNG"), "0.depth.exr": b"x", "0.v1.mask.jpg": image()},
        ["0"], {}, {FURTHER_FIELDS: 3}),
    "further captions": (
        {"0.jpg": image(), "0.json": CAPTION, "0.meta.json": b"{}", "0.caption.txt": b"x", "0.gif": image("GIF")},
        ["0"], {}, {FURTHER_FIELDS: 2}),
    "versions in names": (
        {f"a/photo.v1.{i}{suffix}": part for i in range(2) for suffix, part in PAIR.items()}
        | {f"a/photo{suffix}": part for suffix, part in PAIR.items()},
        ["a/photo.v1.0", "a/photo.v1.1", "a/photo"], {}, {}),
    "dots in folders": (
        {"v1.jpg": image(), "v1.json": CAPTION, "v1.0/x.jpg": image()}, ["v1"], {"v1.0/x": "missing caption"}, {}),
    "two views": (
        {"0.left.jpg": image(), "0.right.jpg": image(), "0.json": CAPTION},
        [], {"0": "missing image: 0.left.jpg is not read"}, {FURTHER_FIELDS: 2}),
    "a caption of another name": (
        {"0.jpg": image(), "0.caption.txt": b"x"},
        [], {"0": "missing caption: 0.caption.txt is not read, only KEY.json and KEY.txt are"}, {FURTHER_FIELDS: 1}),
    "system files": (
        {"._0.jpg": b"x", "0.jpg": image(), "0.json": CAPTION, "a/._0.json": b"x", "__MACOSX/a/0.jpg": b"x",
         ".DS_Store": b"", "@eaDir/0.jpg/THUMB.jpg": image(), "a/Thumbs.db": b"", "PaxHeaders.123/0.jpg": b"30 mtime=1",
         "PaxHeader/0.jpg": b"x", ".@__thumb/s0.jpg": image(), ".Trashes/501/x.jpg": image(), ".thumbnails/x.png": b"x",
         ".Trash-1000/files/x.jpg": image(), "$RECYCLE.BIN/S-1-5/$R0.jpg": image()},
        ["0"], {}, {SYSTEM_FILES: 13}),
    "./ on one of two": ({"./a/0.jpg": image(), "a/0.json": CAPTION}, ["./a/0"], {}, {}),
    "./ on the other": ({"a/0.jpg": image(), "./a/0.json": CAPTION}, ["a/0"], {}, {}),
    "other formats": (
        {"0.gif": image("GIF"), "0.json": CAPTION, "1.HEIC": b"x", "1.txt": b"y", "2.jpg": image(), "2.json": CAPTION},
        ["2"],
        {i: f"image is {kind}: only JPEG, PNG and WebP are read" for i, kind in (("0", ".gif"), ("1", ".heic"))},
        {}),
    "two images": ({"0.jpg": image(), "0.png": image("PNG"), "0.json": CAPTION}, [], {"0": "more than one image"}, {}),
    "pickles": (
        {"0.jpg": image(), "0.json": CAPTION, "a.pickle": b"x", "b.pth": b"x"},
        ["0"], dict.fromkeys(("a.pickle", "b.pth"), "pickled data is never read"), {}),
    "a .json without a caption": ({"0.jpg": image(), "0.json": b'{"caption": null}', "0.txt": b"y"}, ["0"], {}, {}),
    "other JPEG names": ({"0.jpe": image(), "0.json": CAPTION, "1.JFIF": image(), "1.txt": b"y"}, ["0", "1"], {}, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", SETS)
def test_rules_of_a_sample(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    members, keys, refused, ignored = SETS[name]
    for order in (members, dict(reversed(members.items()))):
        index = build_index(write_shard(tmp_path / "s.tar", order), tokenizer, PROMPT)
        assert index.ignored == ignored
        assert len(index.keys) == len(keys) and len(index.refused) == len(refused)
        if order is members:
            assert index.keys == keys and index.refused == refused
        assert load_index(index.shard, tokenizer.fingerprint, PROMPT).ignored == ignored


def test_a_truncated_archive_keeps_its_complete_samples(tokenizer: Tokenizer, tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "s.tar", pairs("0123"))
    with tarfile.open(shard) as archive:
        third = archive.getmember("2.jpg").offset_data
        begin = archive.getmember("2.jpg").offset
    os.truncate(shard, third + 100)
    index = build_index(shard, tokenizer, PROMPT)
    assert index.keys == ["0", "1"] and index.refused
    os.truncate(shard, begin)
    index = build_index(shard, tokenizer, PROMPT)
    assert index.keys == ["0", "1"] and list(index.refused) == ["(end)"] and "cut short" in index.refused["(end)"]


def test_an_index_that_does_not_fit_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "s.tar", pairs("a"))
    with pytest.raises(ValueError, match="has no index; run: python tools/prepare_data.py"):
        load_index(shard, tokenizer.fingerprint, PROMPT)
    build_index(shard, tokenizer, PROMPT)
    with pytest.raises(ValueError, match="made with another prompt than data.prompt = 'Look.'"):
        load_index(shard, tokenizer.fingerprint, "Look.")
    write_shard(tmp_path / "s.tar", {"a.jpg": image(size=(640, 480)), "a.json": CAPTION})
    with pytest.raises(ValueError, match="older than its shard, whose size changed"):
        load_index(shard, tokenizer.fingerprint, PROMPT)
    build_index(shard, tokenizer, PROMPT)
    with pytest.raises(ValueError, match="made with another tokenizer; run"):
        load_index(shard, "another", PROMPT)
    good = Path(index_path(shard)).read_bytes()
    for place in (3, 100, len(good) // 2, len(good) - 1):
        Path(index_path(shard)).write_bytes(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
        with pytest.raises(ValueError, match="is damaged"):
            load_index(shard, tokenizer.fingerprint, PROMPT)


def test_an_index_of_older_rules_is_trained_on_and_built_again(tokenizer: Tokenizer, tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "s.tar", pairs("0"))
    index = build_index(shard, tokenizer, PROMPT)
    old = write_index(dataclasses.replace(index, header=dataclasses.replace(index.header, format=2)))
    assert load_index(shard, tokenizer.fingerprint, PROMPT).header == old.header
    again, unchanged = refresh_index(shard, tokenizer, PROMPT)
    # The samples are the same, so a run on them continues.
    assert not unchanged and again.header.format == 3 and again.header.digest == old.header.digest
    assert refresh_index(shard, tokenizer, PROMPT)[1]
