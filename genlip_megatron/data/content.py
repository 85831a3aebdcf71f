"""Guess from its first bytes what kind of file this is; used in error messages."""

from __future__ import annotations

import re

_BEGINNINGS = (
    (b"\x1f\x8b", "gzip"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\0", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\x04\x22\x4d\x18", "lz4"),
    (b"PK\x03\x04", "a zip file"),
    (b"PK\x05\x06", "an empty zip file"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip file"),
    (b"Rar!\x1a\x07", "a RAR file"),
    (b"PAR1", "a Parquet file"),
    (b"ARROW1", "an Arrow file"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (b"\x93NUMPY", "a NumPy file"),
    (b"SQLite format 3\0", "an SQLite database"),
    (b"%PDF-", "a PDF"),
    (b"\x89PNG\r\n\x1a\n", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF8", "a GIF image"),
    (b"BM", "a BMP image"),
    (b"II*\0", "a TIFF image"),
    (b"MM\0*", "a TIFF image"),
    (b"II+\0", "a TIFF image"),
    (b"MM\0+", "a TIFF image"),
    (b"\xff\x0a", "a JPEG XL image"),
    (b"\0\0\0\x0cJXL ", "a JPEG XL image"),
    (b"\0\0\0\x0cjP  ", "a JPEG 2000 image"),
    (b"8BPS", "a Photoshop file"),
    (b"\x00\x05\x16\x07", "a macOS sidecar file (._*)"),
    (b"version https://git-lfs.github.com/", "a git-LFS pointer, whose data were never fetched (git lfs pull)"),
)
# ISO media files: the brand follows the size and name of the first box.
_BRANDS = (
    (b"avif", "an AVIF image"),
    (b"avis", "an AVIF image"),
    (b"heic", "a HEIC image"),
    (b"heix", "a HEIC image"),
    (b"mif1", "a HEIF image"),
    (b"msf1", "a HEIF image"),
)
_MARKUP = re.compile(rb"\s*<(!doctype html|html|head|body)", re.IGNORECASE)
COMPRESSED = ("gzip", "bzip2", "xz", "zstd", "lz4")


def describe(content: bytes | memoryview) -> str:
    """What kind of file these bytes are, as the end of a sentence.

    >>> describe(b"\\x1f\\x8b\\x08..."), describe(b"<!DOCTYPE html><html>"), describe(bytes(512))
    ('gzip', 'an HTML page', 'only zeros')
    """
    if not len(content):
        return "an empty file"
    start = bytes(content[:512])
    for beginning, name in _BEGINNINGS:
        if start.startswith(beginning):
            return name
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return "a WebP image"
    if start[4:8] == b"ftyp":
        return next((name for brand, name in _BRANDS if start[8:12] == brand), "a video")
    if not any(start):
        return "only zeros" if only_zeros(content) else "zeros, then something else"
    text = start.removeprefix(b"\xef\xbb\xbf")
    if _MARKUP.match(text):
        return "an HTML page"
    if b"<svg" in text:
        return "an SVG image"
    if text.lstrip().startswith(b"<"):
        return "an XML page"
    if re.match(rb"\s*[{\[]\s*[\"{\[\]}]", text):
        return "JSON"
    if text.isascii() and text.decode().replace("\n", "").replace("\r", "").replace("\t", "").isprintable():
        return f"text that begins with {text[:40].decode()!r}"
    return f"something unknown that begins with the bytes {start[:8].hex(' ')}"


def only_zeros(content: bytes | memoryview) -> bool:
    """Whether every byte is zero."""
    return all(not bytes(content[i : i + (1 << 20)]).strip(b"\0") for i in range(0, len(content), 1 << 20))
