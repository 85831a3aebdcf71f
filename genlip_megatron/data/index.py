"""Index: a small table beside each shard, so that packing knows every length before any image is read.

Preparing a shard reads it once from start to end. Each image is decoded, so that a bad one is found here and not in
training; nothing is ever extracted to disk. The table stands in ``SHARD.index.npz``.
"""

from __future__ import annotations

import glob
import io
import json
import os
import tarfile
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from genlip_megatron.data.resize import MAX_ASPECT_RATIO
from genlip_megatron.data.text import Tokenizer, parse_turns, tokenize

FORMAT_VERSION = 1
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
CAPTION_SUFFIXES = (".json", ".txt")
# An image above this many pixels is refused from its header: a few kilobytes can decode to gigabytes.
MAX_IMAGE_PIXELS = 100_000_000

ROW = np.dtype(
    [
        ("image_offset", "<i8"),
        ("caption_offset", "<i8"),
        ("image_size", "<i4"),
        ("caption_size", "<i4"),
        ("height", "<i4"),
        ("width", "<i4"),
        ("text_tokens", "<i4"),
        ("loss_tokens", "<i4"),
        ("image_crc", "<u4"),
        ("caption_is_json", "?"),
    ]
)


@dataclass(frozen=True)
class ShardIndex:
    """One shard's good samples, in the order of the shard, and the refused ones with their reasons."""

    shard: str
    rows: np.ndarray  # ROW [samples]
    keys: list[str]
    refused: dict[str, str]  # key -> reason


def index_path(shard: str | Path) -> Path:
    """Where a shard's index stands."""
    return Path(f"{shard}.index.npz")


def expand_shards(patterns: Sequence[str], setting: str) -> list[str]:
    """Shard files of files, folders and globs, sorted, each once.

    Raises:
        ValueError: nothing was named, or a pattern matches no readable, non-empty ``.tar`` file.
    """
    if not patterns:
        raise ValueError(f"{setting} is empty: name .tar shards, folders of them or globs")
    shards: list[str] = []
    for pattern in patterns:
        found = (
            sorted(str(path) for path in Path(pattern).glob("*.tar"))
            if os.path.isdir(pattern)
            else sorted(glob.glob(pattern))
        )
        if not found:
            raise ValueError(f"{setting}: {pattern!r} matches no .tar file")
        shards += found
    for shard in shards:
        if not os.path.isfile(shard) or not os.access(shard, os.R_OK):
            raise ValueError(f"{setting}: {shard} is not a readable file")
        if os.path.getsize(shard) == 0:
            raise ValueError(f"{setting}: {shard} is empty (0 bytes)")
    return list(dict.fromkeys(shards))


def check_image(content: bytes) -> tuple[int, int]:
    """(height, width) after EXIF orientation of an image that decodes completely.

    Raises:
        ValueError: why the image cannot be used.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content), formats=IMAGE_FORMATS)
        width, height = image.size
        if width * height > MAX_IMAGE_PIXELS:
            raise ValueError(f"{width}x{height} pixels, above {MAX_IMAGE_PIXELS}")
        if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
            raise ValueError(f"{width}x{height}: aspect ratio above {MAX_ASPECT_RATIO}")
        image.load()
        width, height = ImageOps.exif_transpose(image).size
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"image does not decode: {error}") from error
    return height, width


def _header(shard: str, tokenizer: Tokenizer, prompt: str) -> dict[str, object]:
    status = os.stat(shard)
    return {
        "format": FORMAT_VERSION,
        "shard_size": status.st_size,
        "shard_mtime_ns": status.st_mtime_ns,
        "tokenizer": tokenizer.fingerprint,
        "prompt": prompt,
    }


def _members(shard: str) -> tuple[dict[str, dict[str, tarfile.TarInfo]], dict[str, str]]:
    """(members by key and kind, refused keys) from the shard's headers."""
    groups: dict[str, dict[str, tarfile.TarInfo]] = {}
    refused: dict[str, str] = {}
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                key, suffix = os.path.splitext(member.name)
                if member.isdir():
                    continue
                if not member.isreg() or member.name.startswith("/") or ".." in Path(member.name).parts:
                    refused[member.name] = "a link, device or path that leaves the archive"
                    continue
                suffix = suffix.lower()
                kind = "image" if suffix in IMAGE_SUFFIXES else "caption" if suffix in CAPTION_SUFFIXES else None
                if kind == "caption" and suffix == ".txt" and "caption" in groups.get(key, {}):
                    continue
                if kind is not None:
                    groups.setdefault(key, {})[kind] = member
    except (tarfile.TarError, EOFError) as error:
        refused["(rest of the shard)"] = f"broken archive: {error}"
    return groups, refused


def build_index(shard: str, tokenizer: Tokenizer, prompt: str) -> ShardIndex:
    """Read a shard from start to end and write its index beside it, atomically."""
    groups, refused = _members(shard)
    rows, keys = [], []
    with open(shard, "rb") as file:
        for key, members in groups.items():
            if missing := {"image", "caption"} - members.keys():
                refused[key] = f"missing {' and '.join(sorted(missing))}"
                continue
            image, caption = members["image"], members["caption"]
            contents = []
            for member in (image, caption):
                file.seek(member.offset_data)
                contents.append(file.read(member.size))
            if len(contents[0]) < image.size or len(contents[1]) < caption.size:
                refused[key] = "truncated archive"
                continue
            is_json = caption.name.lower().endswith(".json")
            try:
                height, width = check_image(contents[0])
                ids, loss = tokenize(parse_turns(contents[1], is_json, prompt), tokenizer)
            except ValueError as error:
                refused[key] = str(error)
                continue
            offsets = (image.offset_data, caption.offset_data, image.size, caption.size)
            rows.append((*offsets, height, width, len(ids), sum(loss), zlib.crc32(contents[0]), is_json))
            keys.append(key)
    index = ShardIndex(shard, np.array(rows, dtype=ROW), keys, refused)
    target = index_path(shard)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    meta = json.dumps({"header": _header(shard, tokenizer, prompt), "keys": keys, "refused": refused})
    with open(partial, "wb") as out:
        np.savez(out, rows=index.rows, meta=np.frombuffer(meta.encode(), dtype=np.uint8))
        out.flush()
        os.fsync(out.fileno())
    os.replace(partial, target)
    return index


def load_index(shard: str, tokenizer: Tokenizer, prompt: str) -> ShardIndex:
    """The index of a shard.

    Raises:
        ValueError: it is missing, or does not fit the shard, the tokenizer or the prompt; says what to run.
    """
    path = index_path(shard)
    remedy = f"run: python tools/prepare_data.py {shard} --tokenizer TOKENIZER"
    if not path.is_file():
        raise ValueError(f"{shard} has no index; {remedy}")
    try:
        with np.load(path, allow_pickle=False) as stored:
            rows = stored["rows"]
            meta = json.loads(stored["meta"].tobytes())
    except Exception as error:
        raise ValueError(f"{path} is damaged ({error}); {remedy}") from error
    expected = _header(shard, tokenizer, prompt)
    reasons = {
        "format": "has another format version",
        "shard_size": "is older than its shard, whose size changed",
        "shard_mtime_ns": "is older than its shard, which changed",
        "tokenizer": "was made with another tokenizer",
        "prompt": f"was made with another prompt than data.prompt = {prompt!r}",
    }
    for field, reason in reasons.items():
        if meta["header"].get(field) != expected[field]:
            raise ValueError(f"{path} {reason}; {remedy}")
    return ShardIndex(shard, rows, meta["keys"], meta["refused"])
