"""Strip metadata from encoded images, so that broken or huge metadata costs no good picture, time or memory.

Text, colour profiles, EXIF, thumbnails and so on are removed from the bytes before a codec sees them, and are never
unpacked. Only the orientation is read, from EXIF or else from XMP, as Pillow does.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator

Bytes = bytes | memoryview
Metadata = dict[str, bytes]  # "exif": a TIFF header and what follows; "xmp": a packet

JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # all markers except stuffed bytes, restarts and fill
START_OF_SCAN, END_OF_IMAGE = 0xDA, 0xD9
_APP0, _APP1, _APP14, _APP15, _COMMENT = 0xE0, 0xE1, 0xEE, 0xEF, 0xFE
# The decoder takes the colour space from this segment. Its version and densities, which cause warnings, do not matter.
_JFIF = b"\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00"
_JFIF_BYTES = 14
_JPEG_EXIF, _JPEG_XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"

_PNG_EXIF, _PNG_XMP = b"Raw profile type exif\0", b"XML:com.adobe.xmp\0"
_WEBP_PIXELS = (b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF")  # codespell:ignore
_WEBP_FLAGS = 0x2C  # of the profile, EXIF and XMP

# Text is unpacked only up to this size to find an orientation.
_MAX_UNPACKED = 1 << 20
_ORIENTATION_TAG, _INTEGERS = 0x0112, {3: "H", 4: "L"}
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')


def without_metadata(content: Bytes) -> tuple[Bytes, int]:
    """(the image without metadata, its orientation from 1 to 8). Other formats than JPEG, PNG, WebP stay unchanged.

    The pixels stay the same. An orientation that cannot be read counts as 1, upright.
    """
    found: Metadata = {}
    start = bytes(content[:12])
    if start.startswith(b"\xff\xd8"):
        kept = b"".join(_jpeg_parts(content, found))
    elif start.startswith(b"\x89PNG\r\n\x1a\n"):
        kept = b"".join(_png_parts(content, found))
    elif start[:4] == b"RIFF" and start[8:] == b"WEBP":
        chunks = b"".join(_webp_parts(content, found))
        kept = b"RIFF" + struct.pack("<L", 4 + len(chunks)) + b"WEBP" + chunks
    else:
        return content, 1
    return kept, _orientation(found)


def _jpeg_parts(content: Bytes, found: Metadata) -> Iterator[Bytes]:
    yield content[:2]
    position, after_metadata = 2, False
    while (match := JPEG_MARKER.search(content, position)) is not None:
        # Stray bytes after metadata are dropped with it; after other segments the codec must judge them.
        begin = match.start() if after_metadata else position
        marker, first = content[match.end() - 1], match.end() + 2
        if marker in (START_OF_SCAN, END_OF_IMAGE):
            yield content[begin:]
            return
        position = match.end() + int.from_bytes(content[match.end() : first], "big")
        after_metadata = (_APP0 <= marker <= _APP15 and marker != _APP14) or marker == _COMMENT
        yield content[begin : match.start()]
        if not after_metadata:
            yield content[match.start() : position]
            continue
        label = bytes(content[first : min(first + 32, position)])
        if marker == _APP0 and label.startswith(b"JFIF\0") and len(label) >= _JFIF_BYTES:
            yield content[match.start() : position] if label[5] == 1 else _JFIF
        elif marker == _APP1 and label.startswith(_JPEG_EXIF):
            found.setdefault("exif", bytes(content[first + len(_JPEG_EXIF) : position]))
        elif marker == _APP1 and label.startswith(_JPEG_XMP):
            found.setdefault("xmp", bytes(content[first + len(_JPEG_XMP) : position]))


def _png_parts(content: Bytes, found: Metadata) -> Iterator[Bytes]:
    yield content[:8]
    position = 8
    while position + 8 <= len(content):
        length, body = int.from_bytes(content[position : position + 4], "big"), position + 8
        kind, end = bytes(content[position + 4 : body]), body + length + 4
        # Chunks whose name begins with a capital letter are critical; of the others only tRNS changes pixels.
        if not kind[0] & 0x20 or kind == b"tRNS":
            yield content[position:end]
        elif end <= len(content) and zlib.crc32(content[position + 4 : end - 4]) == int.from_bytes(
            content[end - 4 : end], "big"
        ):
            _read_png_chunk(kind, content[body : end - 4], found)
        if kind == b"IEND":
            # Data appended to the file stay.
            yield content[end:]
            return
        position = end
    yield content[position:]


def _read_png_chunk(kind: bytes, body: Bytes, found: Metadata) -> None:
    if kind == b"eXIf":
        found["exif"] = bytes(body)
    elif kind in (b"tEXt", b"zTXt") and "exif" not in found and body[: len(_PNG_EXIF)] == _PNG_EXIF:
        text = bytes(body[len(_PNG_EXIF) :]) if kind == b"tEXt" else _unpacked(body[len(_PNG_EXIF) + 1 :])
        # A name, a length and the bytes in hexadecimal, each on separate lines.
        digits = b"".join(text.split(b"\n")[3:])
        found["exif"] = bytes.fromhex(digits.decode("latin-1")) if re.fullmatch(rb"[0-9a-fA-F\s]*", digits) else b""
    elif kind == b"iTXt" and "xmp" not in found and body[: len(_PNG_XMP)] == _PNG_XMP:
        rest = bytes(body[len(_PNG_XMP) :])
        text = rest[2:].split(b"\0", 2)[-1]  # after two flags, a language and a translation
        found["xmp"] = _unpacked(text) if rest[:1] == b"\1" else text


def _unpacked(packed: Bytes) -> bytes:
    try:
        return zlib.decompressobj().decompress(packed, _MAX_UNPACKED)
    except zlib.error:
        return b""


def _webp_parts(content: Bytes, found: Metadata) -> Iterator[Bytes]:
    """The chunks after the file's header."""
    end = min(8 + int.from_bytes(content[4:8], "little"), len(content))
    position = 12
    while position + 8 <= end:
        kind, body = bytes(content[position : position + 4]), position + 8
        length = int.from_bytes(content[position + 4 : body], "little")
        behind = body + length + length % 2
        if kind == b"VP8X" and body < end:
            yield b"".join((content[position:body], bytes([content[body] & ~_WEBP_FLAGS]), content[body + 1 : behind]))
        elif kind in _WEBP_PIXELS:
            yield content[position : min(behind, end)]
        elif kind == b"EXIF" and body + length <= end:
            found.setdefault("exif", bytes(content[body : body + length]).removeprefix(_JPEG_EXIF))
        elif kind == b"XMP " and body + length <= end:
            found.setdefault("xmp", bytes(content[body : body + length]))
        position = behind


def _orientation(found: Metadata) -> int:
    turn = _exif_orientation(found.get("exif", b""))
    if turn is None:
        match = _XMP_ORIENTATION.search(found.get("xmp", b""))
        turn = int(match[1]) if match else 1
    return turn if 1 <= turn <= 8 else 1


def _exif_orientation(exif: bytes) -> int | None:
    """The orientation in the first directory of a TIFF header, or None."""
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return None
    try:
        (start,) = struct.unpack_from(f"{order}L", exif, 4)
        (entries,) = struct.unpack_from(f"{order}H", exif, start)
        for place in range(start + 2, start + 2 + 12 * entries, 12):
            tag, kind, count = struct.unpack_from(f"{order}HHL", exif, place)
            if tag == _ORIENTATION_TAG and kind in _INTEGERS and count == 1:
                return int(struct.unpack_from(order + _INTEGERS[kind], exif, place + 8)[0])
    except struct.error:
        pass
    return None
