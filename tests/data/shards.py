"""Shards and images for tests, good and bad."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

CAPTION = b'{"caption": "One red circle."}'


def image(kind: str = "JPEG", size: tuple[int, int] = (48, 32), mode: str = "RGB", **options: object) -> bytes:
    """A small encoded picture of (width, height) ``size``."""
    out = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert(mode).save(out, kind, **options)
    return out.getvalue()


def rotated(orientation: int = 6) -> bytes:
    """A JPEG with an EXIF orientation, by default a turn of 90 degrees."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return image(exif=exif)


def sixteen_bit() -> bytes:
    """A 16-bit grey PNG of the value 0x8000: half grey, not white."""
    out = io.BytesIO()
    Image.fromarray(np.full((32, 48), 0x8000, np.uint16)).save(out, "PNG")
    return out.getvalue()


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _png(width: int, height: int, data: bytes, interlaced: int = 0, tail: bytes = b"") -> bytes:
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, interlaced))
    return b"\x89PNG\r\n\x1a\n" + header + _chunk(b"IDAT", zlib.compress(data) + tail) + _chunk(b"IEND", b"")


def half_png(tail: bytes = b"") -> bytes:
    """A grey PNG whose compressed data are valid but hold only half of its rows."""
    return _png(2000, 1500, (b"\0" + b"x" * 2000) * 750, tail=tail)


def interlaced() -> bytes:
    """A complete grey PNG of 48 x 32 in the seven passes of Adam7."""
    rows = ((8, 4, 6), (8, 4, 6), (4, 4, 12), (4, 8, 12), (2, 8, 24), (2, 16, 24), (1, 16, 48))
    data = b"".join((b"\0" + b"x" * columns) * count for _, count, columns in rows)
    return _png(48, 32, data, 1)


def scans() -> bytes:
    """A JPEG with a hundred superfluous scans."""
    content = image(size=(64, 64))
    start = content.index(b"\xff\xda")
    return content[:-2] + content[start:-2] * 100 + content[-2:]


def bomb() -> bytes:
    """A PNG of a few bytes whose header claims 30000 x 30000 pixels."""

    return _png(30_000, 30_000, b"\0" * 100)


def write_shard(path: Path, members: dict[str, bytes]) -> str:
    """A tar of the given members, in order."""
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return str(path)


def many(count: int, first: int = 0) -> dict[str, bytes]:
    """Members of ``count`` good samples, of different sizes and captions."""
    members = {}
    for i in range(first, first + count):
        members[f"{i:04d}.jpg"] = image(size=(32 + 16 * (i % 5), 32 + 16 * (i % 3)))
        members[f"{i:04d}.json"] = b'{"caption": "%s"}' % b" ".join([b"One red circle."] * (1 + i % 4))
    return members
