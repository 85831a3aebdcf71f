"""Encoded images -> upright RGB pixels, with Pillow, or faster with libjpeg-turbo for plain JPEG.

Rules: only JPEG, PNG and WebP; sizes are checked in the header before any pixel is decoded; EXIF orientation is
applied; transparency is composited on white; CMYK, palette and grey images become RGB; 16-bit channels keep their high
byte; only the first frame of an animation is used.
"""

from __future__ import annotations

import io
import warnings
import zlib

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from genlip_megatron.data.content import describe
from genlip_megatron.data.metadata import END_OF_IMAGE, JPEG_MARKER, START_OF_SCAN, without_metadata
from genlip_megatron.hf.shared_genlip import MAX_ASPECT_RATIO, UPRIGHT, upright_rgb

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
# File suffix in lower case -> suffix inside a shard. tools/make_shards.py and the index share them.
IMAGE_SUFFIXES = {".jpg": ".jpg", ".jpeg": ".jpg", ".jpe": ".jpg", ".jfif": ".jpg", ".png": ".png", ".webp": ".webp"}
# Other image formats: refused with their name, never skipped silently.
OTHER_IMAGE_SUFFIXES = (
    *(".bmp", ".dib", ".gif", ".tif", ".tiff", ".heic", ".heif", ".avif", ".avifs", ".jxl"),
    *(".jp2", ".j2k", ".jpx", ".ico", ".svg", ".psd", ".tga", ".ppm", ".pgm", ".pbm", ".pnm", ".qoi", ".exr", ".hdr"),
    *(".apng", ".jif", ".jfi", ".mpo", ".hif", ".pcx", ".dds", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2"),
)
# Larger images are refused from their header: a few kilobytes can decode to gigabytes.
MAX_IMAGE_PIXELS = 64_000_000
# The planning table keeps a side in 16 bits.
MAX_IMAGE_SIDE = 65_535
# Pillow warns about images that it can read; with millions of images that would flood the log.
warnings.filterwarnings("ignore", module=r"PIL\.")

# A progressive JPEG has about ten scans, and each costs as much time as a whole image.
MAX_JPEG_SCANS = 64


def open_image(content: bytes | memoryview) -> tuple[Image.Image, int]:
    """(the image, without metadata and not decoded yet; its orientation, 1 (upright) to 8).

    Raises:
        ValueError: another format, too large, or an aspect ratio that no model input has.
    """
    try:
        pixels, orientation = without_metadata(content)
        image = Image.open(io.BytesIO(pixels), formats=IMAGE_FORMATS)
    except UnidentifiedImageError:
        found = describe(content)
        damaged = found in ("a JPEG image", "a PNG image", "a WebP image")
        what = f"{found} with a damaged header" if damaged else f"not a JPEG, PNG or WebP file, but {found}"
        raise ValueError(f"image does not decode: {what}") from None
    except Exception as error:  # every codec error means a bad image
        raise ValueError(f"image does not decode: {error}") from error
    width, height = image.size
    if width * height > MAX_IMAGE_PIXELS or max(width, height) > MAX_IMAGE_SIDE:
        raise ValueError(
            f"image is too large: {width}x{height} pixels, above {MAX_IMAGE_PIXELS} or a side of {MAX_IMAGE_SIDE}"
        )
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ValueError(f"image is too thin: {width}x{height}, aspect ratio above {MAX_ASPECT_RATIO}")
    return image, orientation


def to_rgb(image: Image.Image, orientation: int) -> np.ndarray:
    """uint8 [height, width, 3]: the decoded image, upright, in RGB, transparency over white.

    Raises:
        ValueError: it does not decode completely.
    """
    try:
        return np.asarray(upright_rgb(image, orientation))
    except Exception as error:
        raise ValueError(f"image does not decode: {error}") from error


def decode_rgb(content: bytes | memoryview, plain_jpeg: bool = False) -> np.ndarray:
    """uint8 [height, width, 3] of an encoded image.

    Args:
        content: the file's bytes.
        plain_jpeg: a JPEG that needs no rotation and no colour conversion by Pillow. libjpeg-turbo then decodes it
            directly to the same pixels, in two thirds of the time.

    Raises:
        ValueError: why the image cannot be used.
    """
    if not plain_jpeg:
        return to_rgb(*open_image(content))
    try:
        return simplejpeg.decode_jpeg(content, "RGB")
    except ValueError as error:
        raise ValueError(f"image does not decode: {error}") from error


def check_image(content: bytes | memoryview) -> tuple[int, int, bool]:
    """(height, width, whether it is a plain JPEG) of an image that decodes completely; the sizes are the upright ones.

    Pillow accepts a JPEG or PNG whose data end early and leaves the rest grey or black; here such an image is bad.

    Raises:
        ValueError: why the image cannot be used.
    """
    image, orientation = open_image(content)
    if image.format == "PNG":
        _check_png_rows(bytes(content), image.size)
    if image.format != "JPEG":
        height, width, _ = to_rgb(image, orientation).shape
        return height, width, False
    if (scans := _count_scans(content)) > MAX_JPEG_SCANS:
        raise ValueError(f"image does not decode: {scans} scans, above {MAX_JPEG_SCANS}")
    plain = image.mode in ("RGB", "L") and orientation not in UPRIGHT
    try:
        height, width, _ = decode_rgb(content, plain_jpeg=True).shape
    except ValueError:
        # libjpeg may only have rejected the metadata.
        decode_rgb(without_metadata(content)[0], plain_jpeg=True)
        plain = False
    if not plain:
        height, width, _ = to_rgb(image, orientation).shape
    return height, width, plain


def _count_scans(content: bytes | memoryview) -> int:
    """Number of scans up to the end of a JPEG; appended data (phones append a video) do not count."""
    scans, position = 0, 2
    while (match := JPEG_MARKER.search(content, position)) is not None and content[match.end() - 1] != END_OF_IMAGE:
        scans += content[match.end() - 1] == START_OF_SCAN
        position = match.end() + int.from_bytes(content[match.end() : match.end() + 2], "big")
    return scans


def _check_png_rows(content: bytes, size: tuple[int, int]) -> None:
    """Raise ValueError if a PNG's compressed data hold fewer bytes than its (width, height) needs."""
    bits, colour, _, _, interlaced = content[24:29]
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(colour)
    if content[12:16] != b"IHDR" or channels is None:
        raise ValueError("image does not decode: its PNG header is not the first chunk, or of no known colour type")
    width, height = size
    # (first column, first row, column step, row step) of each pass.
    passes = [(0, 0, 1, 1)]
    if interlaced:
        passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    needed = 0
    for x, y, dx, dy in passes:
        columns, rows = -(-(width - x) // dx), -(-(height - y) // dy)
        if columns > 0 and rows > 0:
            needed += rows * (1 + (columns * bits * channels + 7) // 8)
    inflate, found, position, view = zlib.decompressobj(), 0, 8, memoryview(content)
    try:
        while position + 8 <= len(content) and found < needed and not inflate.eof:
            length, kind = int.from_bytes(view[position : position + 4], "big"), view[position + 4 : position + 8]
            end = position + 8 + length if kind == b"IDAT" else position
            # In slices, so that a decompression bomb is never in memory as a whole: a slice grows at most 1000-fold.
            for start in range(position + 8, end, 1 << 14):
                found += len(inflate.decompress(view[start : min(start + (1 << 14), end)]))
                if found >= needed or inflate.eof:
                    break
            position += length + 12
    except zlib.error as error:
        raise ValueError(f"image does not decode: {error}") from error
    if found < needed:
        raise ValueError(f"image does not decode: {found} of {needed} bytes of pixels")
