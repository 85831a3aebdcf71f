"""Metadata: a file with any metadata decodes to the same pixels as without it, in the same time and memory."""

from __future__ import annotations

import io
import struct
import time
import tracemalloc
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

from genlip_megatron.data.decode import CpuDecoder, ImageTask
from genlip_megatron.data.image import check_image, decode_rgb
from genlip_megatron.data.metadata import without_metadata
from tests.data.shards import image

PICTURES = {kind: image(kind, mode="RGB") for kind in ("JPEG", "PNG", "WEBP")}


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def jpeg(*parts: bytes, base: bytes = PICTURES["JPEG"]) -> bytes:
    """A JPEG with these bytes after its first segment."""
    behind = 4 + int.from_bytes(base[4:6], "big")
    return base[:behind] + b"".join(parts) + base[behind:]


def chunk(kind: bytes, body: bytes, crc: int | None = None) -> bytes:
    return (
        struct.pack(">L", len(body)) + kind + body + struct.pack(">L", zlib.crc32(kind + body) if crc is None else crc)
    )


def png(*chunks: bytes, at_end: bool = False) -> bytes:
    """A PNG with these chunks before or after its pixels."""
    base = PICTURES["PNG"]
    place = len(base) - 12 if at_end else 33
    return base[:place] + b"".join(chunks) + base[place:]


def riff(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("<L", len(body)) + body + bytes(len(body) % 2)


def webp(*chunks: bytes, flags: int = 0) -> bytes:
    """The WebP in its extended form, with these chunks after its pixels."""
    body = PICTURES["WEBP"][12:]
    canvas = bytes([flags, 0, 0, 0]) + struct.pack("<L", 47)[:3] + struct.pack("<L", 31)[:3]
    return wrapped(riff(b"VP8X", canvas) + body + b"".join(chunks))


def wrapped(chunks: bytes) -> bytes:
    return b"RIFF" + struct.pack("<L", 4 + len(chunks)) + b"WEBP" + chunks


def exif(orientation: int = 6, order: str = "<", kind: int = 3) -> bytes:
    """A TIFF header and a directory with an orientation."""
    value = struct.pack(order + {3: "HH", 4: "L"}[kind], *([orientation, 0] if kind == 3 else [orientation]))
    start = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}LH", 8, 1)
    return start + struct.pack(f"{order}HHL", 0x0112, kind, 1) + value + bytes(4)


def exif_bomb() -> bytes:
    """A directory of 5,000 entries; each claims the whole directory as its value."""
    entries = b"".join(struct.pack("<HHLL", tag, 7, 60_000, 0) for tag in range(0x8000, 0x8000 + 5000))
    return b"II*\0" + struct.pack("<LH", 8, 5000) + entries


XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="%d"/></x:xmpmeta>'
PROFILE = b"Raw profile type exif\0"
NOT_PIXELS = (*range(0xE1, 0xEE), 0xEF, 0xFE)
PART = b"ICC_PROFILE\0%cc"
BOMB = zlib.compress(bytes(1 << 28), 9)
ODD: dict[str, Callable[[], bytes]] = {
    "png: large text": lambda: png(chunk(b"zTXt", b"workflow\0\0" + zlib.compress(b"x" * 3_000_000))),
    "png: large text behind": lambda: png(chunk(b"tEXt", b"prompt\0" + b"x" * 3_000_000), at_end=True),
    "png: much text": lambda: png(*[chunk(b"iTXt", b"k%d\0\0\0\0\0" % i + b"y" * 900_000) for i in range(80)]),
    "png: a bomb of text": lambda: png(chunk(b"zTXt", b"a\0\0" + BOMB)),
    "png: bombs of EXIF": lambda: png(*[chunk(b"zTXt", PROFILE + b"\0" + BOMB)] * 200),
    "png: a bomb of XMP": lambda: png(chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + BOMB)),
    "png: a bomb of a profile": lambda: png(chunk(b"iCCP", b"icc\0\0" + BOMB)),
    "png: broken profile": lambda: png(chunk(b"iCCP", b"icc\0\0not compressed")),
    "png: unknown compression": lambda: png(chunk(b"zTXt", b"a\0\7xx")),
    "png: broken text": lambda: png(chunk(b"iTXt", b"no end"), chunk(b"zTXt", b""), chunk(b"tEXt", b"\xff\xfe")),
    "png: wrong checksum": lambda: png(chunk(b"tEXt", b"a\0b", crc=1), chunk(b"eXIf", exif(), crc=1)),
    "png: short chunks": lambda: png(*[chunk(kind, b"x") for kind in (b"gAMA", b"pHYs", b"sRGB", b"cHRM", b"tIME")]),
    "png: broken animation": lambda: png(chunk(b"acTL", b"x"), chunk(b"fcTL", b"y"), chunk(b"fdAT", b"")),
    "png: broken EXIF": lambda: png(chunk(b"eXIf", b"MM\0*\xff\xff\xff\xff")),
    "png: EXIF in text": lambda: png(chunk(b"tEXt", PROFILE + b"\nexif\n 2\nzz")),
    "png: cut in text": lambda: png(chunk(b"tEXt", b"a\0" + b"x" * 99), at_end=True)[:-60],
    "jpeg: much metadata": lambda: jpeg(*[segment(marker, b"x" * 65_000) for marker in NOT_PIXELS for _ in range(9)]),
    "jpeg: large profile": lambda: jpeg(*[segment(0xE2, PART % i + bytes(60_000)) for i in range(99)]),
    "jpeg: broken films": lambda: jpeg(segment(0xE2, b"MPF\0MM\0*\0\0\0\x08\0\x02\xb0\x01\0\4\0\0\0\1\0\0\0\2")),
    "jpeg: short segments": lambda: jpeg(segment(0xE0, b""), *[segment(marker, b"") for marker in NOT_PIXELS]),
    "jpeg: broken Photoshop": lambda: jpeg(segment(0xED, b"Photoshop 3.0\x008BIM\3\xed\0\0\xff\xff\xff\xff")),
    "jpeg: broken EXIF": lambda: jpeg(segment(0xE1, b"Exif\0\0II*\0\xff")),
    "jpeg: a bomb of EXIF": lambda: jpeg(segment(0xE1, b"Exif\0\0" + exif_bomb())),
    "jpeg: a segment longer than it says": lambda: jpeg(segment(0xFE, b"comment") + b"and more"),
    "jpeg: a later version": lambda: PICTURES["JPEG"].replace(b"JFIF\0\1", b"JFIF\0\7", 1),
    "jpeg: no first segment": lambda: PICTURES["JPEG"][:2] + PICTURES["JPEG"][20:],
    "webp: broken chunks": lambda: webp(riff(b"EXIF", b"II"), riff(b"XMP ", b"\xff"), riff(b"????", b"a"), flags=0x2C),
    "webp: flags without chunks": lambda: webp(flags=0x2C),
    "webp: large chunks": lambda: webp(riff(b"ICCP", bytes(3_000_000)), riff(b"EXIF", bytes(3_000_000)), flags=0x28),
    "webp: a bomb of EXIF": lambda: webp(riff(b"EXIF", exif_bomb()), flags=0x08),
    "webp: cut in EXIF": lambda: webp(riff(b"EXIF", bytes(5000)), flags=0x08)[:-900],
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_unusual_metadata_costs_no_time_or_memory(name: str) -> None:
    content, expected = ODD[name](), decode_rgb(PICTURES[name.split(":")[0].upper()])
    tracemalloc.start()
    began = time.monotonic()
    try:
        height, width, plain = check_image(content)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.monotonic() - began < 5 and peak < 4 * len(content) + (4 << 20)
    assert (height, width) == (32, 48)
    assert np.array_equal(decode_rgb(content, plain), expected) and np.array_equal(decode_rgb(content), expected)


@pytest.mark.parametrize("plain", [False, True])
def test_decoders_agree_on_unusual_metadata(plain: bool) -> None:
    contents = {name: make() for name, make in ODD.items() if "bomb" not in name}
    decoder = CpuDecoder(2, plain)
    tasks = [ImageTask(content, 32, 48, plain_jpeg=check_image(content)[2]) for content in contents.values()]
    expected = {kind: decoder([ImageTask(content, 32, 48)])[0] for kind, content in PICTURES.items()}
    for name, patches in zip(contents, decoder(tasks), strict=True):
        assert isinstance(patches, torch.Tensor), (name, patches)
        assert torch.equal(patches, expected[name.split(":")[0].upper()]), name
    decoder.close()


TURNED = {
    **{f"jpeg {turn}{order}{kind}": (lambda t=turn, o=order, k=kind: jpeg(segment(0xE1, b"Exif\0\0" + exif(t, o, k))))
       for turn in range(10) for order in "<>" for kind in (3, 4)},
    "jpeg xmp": lambda: jpeg(segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP % 8)),
    "jpeg exif without it, xmp": lambda: jpeg(
        segment(0xE1, b"Exif\0\0II*\0\x08\0\0\0\0\0"), segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP % 5)),
    "png exif": lambda: png(chunk(b"eXIf", exif(5))),
    "png exif behind": lambda: png(chunk(b"eXIf", exif(5)), at_end=True),
    "png profile": lambda: png(
        chunk(b"zTXt", PROFILE + b"\0" + zlib.compress(b"\nexif\n 26\n" + exif(7).hex().encode()))),
    "png xmp": lambda: png(chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP % 6)),
    "png packed xmp": lambda: png(chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(XMP % 6))),
    "webp exif": lambda: webp(riff(b"EXIF", exif(6, ">")), flags=0x08),
    "webp exif as in jpeg": lambda: webp(riff(b"EXIF", b"Exif\0\0" + exif(3)), flags=0x08),
    "webp xmp": lambda: webp(riff(b"XMP ", XMP % 4), flags=0x04),
}  # fmt: skip


@pytest.mark.parametrize("name", TURNED)
def test_the_orientation_is_the_same_as_pillows(name: str) -> None:
    content = TURNED[name]()
    with Image.open(io.BytesIO(content)) as opened:
        expected = int(opened.getexif().get(0x0112, 1))
    assert without_metadata(content)[1] == (expected if 1 <= expected <= 8 else 1)


def verdict(content: bytes) -> tuple[int, int, bool] | None:
    try:
        return check_image(content)
    except ValueError:
        return None


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "progressive", "palette", "lossless"])
def test_damaged_pixels_are_judged_by_the_codec(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Truncated files and flipped bits in the pixels: the codec decides."""
    content = {
        **PICTURES,
        "progressive": image(progressive=True),
        "palette": image("PNG", mode="P"),
        "lossless": image("WEBP", lossless=True),
    }[kind]
    damaged = [content[:size] for size in range(0, len(content), 1 + len(content) // 100)]
    for place in range(len(content) // 2, len(content), 1 + len(content) // 100):
        damaged.append(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
    ours = [verdict(found) for found in damaged]
    monkeypatch.setattr("genlip_megatron.data.image.without_metadata", lambda content: (content, 1))
    assert ours == [verdict(found) for found in damaged] and verdict(content) and ours.count(None) > 50
