"""Scan a shard: read it once from start to end, decode every image, count tokens, and write its index.

A bad image is found here and not in training. Nothing is ever extracted to disk.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import mmap
import os
import posixpath
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from xxhash import xxh3_128_hexdigest

from genlip_megatron import storage
from genlip_megatron.data.content import COMPRESSED, describe, only_zeros
from genlip_megatron.data.image import IMAGE_SUFFIXES, OTHER_IMAGE_SUFFIXES, check_image
from genlip_megatron.data.index import FORMAT_VERSION, ROW, Header, ShardIndex, index_path, load_index, write_index
from genlip_megatron.data.text import Turns, check_turns, parse_turns, tokenize_many
from genlip_megatron.outputs import check_file
from genlip_megatron.tokenizer import Tokenizer

CAPTION_SUFFIXES = (".json", ".txt")
PICKLE_SUFFIXES = (".pkl", ".pickle", ".pyd", ".pt", ".pth")
MAX_TEXT_TOKENS = 65_535
BLOCK = tarfile.BLOCKSIZE
# Larger files are not images or captions, and would only cost memory.
MAX_IMAGE_BYTES, MAX_CAPTION_BYTES = 256 << 20, 1 << 20
# The end mark is two blocks of zeros. Writers fill up records, usually of 10 KiB, at most of 256 KiB.
MAX_END_ZEROS = 256 << 10
# Each broken header costs a search, and malicious files can make it a long one.
MAX_BROKEN_HEADERS = 100
# Files that operating systems leave beside people's files, and headers that some tars contain as files: not samples.
_SYSTEM_FILES = re.compile(
    r"(^|/)(\._[^/]*|\.DS_Store|Thumbs\.db|desktop\.ini|(__MACOSX|@eaDir|\.@__thumb|\.thumbnails|\.AppleDouble"
    r"|\.ipynb_checkpoints|\.Trash(es|-\d+)?|\$RECYCLE\.BIN|PaxHeaders?(\.[^/]*)?)(/.*)?)$",
    re.IGNORECASE,
)
FURTHER_FIELDS, SYSTEM_FILES = "further fields of samples", "files of macOS, Windows and other systems"

logger = logging.getLogger(__name__)


@dataclass
class _Members:
    """The tar members of one sample, by kind."""

    key: str
    image: tarfile.TarInfo | None = None
    json: tarfile.TarInfo | None = None
    txt: tarfile.TarInfo | None = None
    other: tarfile.TarInfo | None = None  # an image in a format that is not supported
    twice: list[str] = field(default_factory=list)
    count: int = 0
    further: list[str] = field(default_factory=list)  # names of further fields

    def add(self, kind: str, member: tarfile.TarInfo) -> None:
        if getattr(self, kind) is not None:
            self.twice.append(kind)
        setattr(self, kind, member)
        self.count += 1

    @property
    def complete(self) -> bool:
        """Whether it has an image, of any format, and a caption."""
        return bool((self.image or self.other) and (self.json or self.txt))


class UnreadableShard(ValueError):
    """The file has no tar header."""


def _next_header(content: memoryview, position: int) -> int | None:
    """Position of the next valid tar header at or after ``position``, or None."""
    for start in range(position, len(content) - BLOCK + 1, BLOCK):
        if content[start + 257 : start + 262] == b"ustar":
            try:
                tarfile.TarInfo.frombuf(bytes(content[start : start + BLOCK]), "utf-8", "surrogateescape")
                return start
            except tarfile.HeaderError:
                continue
    return None


def _headers(path: str, content: memoryview, refused: dict[str, str]) -> Iterator[tarfile.TarInfo]:
    """Every member's header. After a broken one reading continues at the next valid header."""
    start: int | None = 0
    broken = 0
    while start is not None:
        position = start  # of the next header
        with open(path, "rb") as file:
            file.seek(start)
            try:
                with tarfile.open(fileobj=file, mode="r:") as archive:
                    while (member := archive.next()) is not None:
                        if not position < archive.offset <= len(content) + BLOCK:
                            if member.isreg() and member.size > 0:
                                yield member  # ends after the file's end, and will be refused
                            raise tarfile.ReadError("impossible size in a header")
                        position = archive.offset
                        archive.members.clear()  # type: ignore[attr-defined]  # saves memory
                        yield member
            except Exception as error:  # a malicious header can raise anything
                logger.debug("%s, byte %d: %r", path, position, error)
        if any(content[position : position + BLOCK]):
            broken += 1
            if broken > MAX_BROKEN_HEADERS:
                refused[f"(from byte {position})"] = f"more than {MAX_BROKEN_HEADERS} broken tar headers: given up"
                return
            refused[f"(byte {position})"] = "broken tar header"
            position += BLOCK
            start = _next_header(content, position)
        elif position >= len(content):
            refused["(end)"] = "no end mark: the shard may be cut short (some writers leave the mark out)"
            return
        elif (start := _next_header(content, position)) is not None:
            refused[f"(byte {position})"] = (
                "zeros between members: some are lost, unless this is several shards in one file"
            )
        elif not only_zeros(content[position:]):
            refused[f"(byte {position})"] = "the bytes after the end mark are not tar: members may be lost"
        elif len(content) - position > MAX_END_ZEROS:
            refused[f"(byte {position})"] = "zeros to the end of the shard: its data may never have arrived"


def _refusal(member: tarfile.TarInfo, suffix: str) -> str | None:
    """The reason why a member must not be read, or None."""
    if not member.isreg() or member.issparse():
        return "not a plain file: a link, device or sparse file"
    if member.name.startswith("/") or ".." in Path(member.name).parts:
        return "path leaves the archive"
    if suffix in PICKLE_SUFFIXES:
        return "pickled data is never read"
    return None


def _members(shard: str, path: str, content: memoryview) -> tuple[list[_Members], dict[str, str], dict[str, int]]:
    """(members by sample, {refused key: reason}, {kind: number of ignored members}) from the shard's headers.

    Raises:
        UnreadableShard: the shard has no header.
    """
    groups: dict[str, _Members] = {}
    refused: dict[str, str] = {}
    headers, system_files = 0, 0
    for member in _headers(path, content, refused):
        headers += 1
        if member.isdir():
            continue
        if _SYSTEM_FILES.search(member.name):
            system_files += 1
            continue
        key, suffix = os.path.splitext(member.name)
        suffix = suffix.lower()
        if reason := _refusal(member, suffix):
            refused[member.name] = reason
            continue
        kind = "image" if suffix in IMAGE_SUFFIXES else "other" if suffix in OTHER_IMAGE_SUFFIXES else suffix[1:]
        if kind in ("image", "other") or suffix in CAPTION_SUFFIXES:
            # "./a/0.jpg" and "a/0.txt" belong together.
            groups.setdefault(posixpath.normpath(key), _Members(key)).add(kind, member)
    if not headers:
        raise UnreadableShard(f"{shard} is not a tar file but {_what_else(content)}")
    ignored = {SYSTEM_FILES: system_files, FURTHER_FIELDS: _merge_further_fields(groups)}
    return list(groups.values()), refused, {kind: count for kind, count in ignored.items() if count}


def _merge_further_fields(groups: dict[str, _Members]) -> int:
    """Remove members that only add to another sample, as 0.mask.png adds to 0.jpg; returns their number.

    A key ends at the last dot, because files may be called photo.v1.0.jpg. A key without an image or a caption that
    would match another sample if it ended at an earlier dot is a further field of that sample.
    """
    count = 0
    for key in [key for key, members in groups.items() if not members.complete]:
        folder, name = posixpath.split(key)
        stems = (posixpath.join(folder, name[:end]) for end in range(len(name) - 1, 0, -1) if name[end] == ".")
        if owner := next((groups[stem] for stem in stems if stem in groups), None):
            further = groups.pop(key)
            count += further.count
            member = further.image or further.other or further.json or further.txt
            assert member is not None
            owner.further.append(posixpath.basename(member.name))
    return count


def _what_else(content: memoryview) -> str:
    """What kind of file a shard without tar headers is."""
    if only_zeros(content):
        return "only zeros: an empty tar, or a file whose data were never written"
    if content[257:262] == b"ustar":
        return "a tar file without a valid header"
    found = describe(content)
    return f"{found}: compressed shards are not supported; decompress it first" if found in COMPRESSED else found


def _caption(
    members: _Members, content: memoryview, tokenizer: Tokenizer, prompt: str
) -> tuple[tarfile.TarInfo, Turns]:
    """(the member with the caption, its turns): json, or txt if json is missing or holds no caption."""
    problem = ValueError("missing caption")
    if members.further:
        problem = ValueError(f"missing caption: {members.further[0]} is not read, only KEY.json and KEY.txt are")
    for member in (members.json, members.txt):
        if member is None:
            continue
        try:
            turns = parse_turns(bytes(_bytes(content, member, MAX_CAPTION_BYTES)), member is members.json, prompt)
            check_turns(turns, tokenizer)
        except ValueError as error:
            problem = error if problem.args[0].startswith("missing caption") else problem
            continue
        return member, turns
    raise problem


def check_size(size: int, most: int) -> None:
    """Raise ValueError for an image or caption of too many bytes."""
    if size > most:
        raise ValueError(f"file is too large: {size} bytes, above {most}")


def _bytes(content: memoryview, member: tarfile.TarInfo, most: int) -> memoryview:
    check_size(member.size, most)
    end = member.offset_data + member.size
    if end > len(content):
        raise ValueError("truncated archive")
    return content[member.offset_data : end]


def _check(members: _Members, content: memoryview, tokenizer: Tokenizer, prompt: str) -> tuple[list, Turns]:
    """(the sample's row with zero tokens, its turns). Raises ValueError for a bad sample."""
    # An image in another format beside a readable one is ignored.
    if twice := [kind for kind in members.twice if kind != "other"]:
        raise ValueError(f"more than one {twice[0]}")
    if members.image is None and members.other is not None:
        suffix = os.path.splitext(members.other.name)[1].lower()
        raise ValueError(f"image is {suffix}: only JPEG, PNG and WebP are read")
    if members.image is None:
        raise ValueError(f"missing image: {members.further[0]} is not read" if members.further else "missing image")
    caption, turns = _caption(members, content, tokenizer, prompt)
    image = _bytes(content, members.image, MAX_IMAGE_BYTES)
    height, width, plain = check_image(image)
    crc = zlib.crc32(image), zlib.crc32(_bytes(content, caption, MAX_CAPTION_BYTES))
    offsets = [members.image.offset_data, caption.offset_data, members.image.size, caption.size]
    return [*offsets, height, width, 0, 0, *crc, caption is members.json, plain], turns


@contextlib.contextmanager
def _mapped(shard: str) -> Iterator[tuple[str, memoryview]]:
    """(a local path of the shard, its bytes)."""
    with storage.local_copy(shard) as path, open(path, "rb") as file:
        # The map is not closed here: it closes with its last view. An empty file cannot be mapped.
        size = os.path.getsize(path)
        yield path, memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b"")


def build_index(shard: str, tokenizer: Tokenizer, prompt: str) -> ShardIndex:
    """Read a shard from start to end and write its index beside it, atomically.

    Raises:
        ValueError: the index would replace a file that is not an index.
        UnreadableShard: the shard is not a tar file.
        OSError: the shard cannot be read.
    """
    # These also recognise a damaged index.
    marks = (b"shard_checksum", b"shard_stamp", b"key_ends")
    check_file(index_path(shard), lambda content: any(mark in content for mark in marks), "the index")
    size, stamp = storage.state(shard)
    with _mapped(shard) as (path, content):
        checksum = xxh3_128_hexdigest(content)
        groups, refused, ignored = _members(shard, path, content) if size else ([], {"(shard)": "empty file"}, {})
        rows, keys, texts = [], [], []
        for members in groups:
            try:
                row, turns = _check(members, content, tokenizer, prompt)
            except Exception as error:  # one bad sample must not cost the others
                refused[members.key] = str(error) if isinstance(error, ValueError) else f"unreadable: {error!r}"
                continue
            rows.append(row)
            keys.append(members.key)
            texts.append(turns)
    good = []
    for i, (ids, loss) in enumerate(tokenize_many(texts, tokenizer)):
        if len(ids) > MAX_TEXT_TOKENS:
            refused[keys[i]] = f"caption is too long: {len(ids)} tokens, above {MAX_TEXT_TOKENS}"
            continue
        rows[i][6:8] = len(ids), sum(loss)
        good.append(i)
    if not groups:
        refused.setdefault("(shard)", "no sample: no member is an image or a caption")
    table = np.array([tuple(rows[i]) for i in good], dtype=ROW)
    header = Header(FORMAT_VERSION, size, stamp, checksum, tokenizer.fingerprint, prompt)
    return write_index(ShardIndex(shard, table, [keys[i] for i in good], refused, header, ignored))


def refresh_index(shard: str, tokenizer: Tokenizer, prompt: str) -> tuple[ShardIndex, bool]:
    """(the shard's index, whether it was up to date); built again if shard, tokenizer, prompt or rules changed.

    A shard of the same size with another time stamp is compared by checksum, so a copy is not decoded again.
    """
    with contextlib.suppress(ValueError):
        index = load_index(shard, tokenizer.fingerprint, prompt)
        size, stamp = storage.state(shard)
        if index.header.format == FORMAT_VERSION and index.header.shard_size == size:
            if index.header.shard_stamp == stamp:
                return index, True
            with _mapped(shard) as (_, content):
                same = xxh3_128_hexdigest(content) == index.header.shard_checksum
            if same:
                header = dataclasses.replace(index.header, shard_stamp=stamp)
                return write_index(dataclasses.replace(index, header=header)), True
    return build_index(shard, tokenizer, prompt), False
