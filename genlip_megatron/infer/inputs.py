"""The images that a command line names (files, folders, globs, indexed shards) as one numbered list."""

from __future__ import annotations

import itertools
import json
import os
import stat
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from genlip_megatron import storage
from genlip_megatron.data import patterns
from genlip_megatron.data.image import IMAGE_SUFFIXES, check_image, decode_rgb
from genlip_megatron.data.index import ShardIndex, read_index
from genlip_megatron.data.read import Piece, ShardReader
from genlip_megatron.data.text import Turns, parse_turns

SUFFIXES = tuple(IMAGE_SUFFIXES)
_EXPECTED = f"expected {', '.join(SUFFIXES)} or indexed .tar files, folders of them, or globs"
_CACHE = "~/.cache/genlip_megatron", 64 * 10**9  # folder and bytes for remote shards, as in training


@dataclass(frozen=True)
class FileImage:
    """An image file."""

    path: str

    @property
    def name(self) -> dict[str, str]:
        """Its name in result rows. They are UTF-8, so other bytes of the path become \\xNN."""
        return {"path": os.fsencode(self.path).decode("utf-8", "backslashreplace")}

    def read(self) -> np.ndarray:
        """uint8 [height, width, 3].

        Raises:
            ValueError: it cannot be read, or does not decode completely.
        """
        try:
            if not stat.S_ISREG(os.stat(self.path).st_mode):  # reading a pipe would block
                raise ValueError("cannot be read: not a regular file")
            content = Path(self.path).read_bytes()
        except OSError as error:
            raise ValueError(f"cannot be read: {error.strerror}") from error
        _, _, plain_jpeg = check_image(content)
        return decode_rgb(content, plain_jpeg)

    def truth(self, prompt: str) -> None:
        """Image files have no caption."""


@dataclass(frozen=True)
class ShardImage:
    """A sample of an indexed shard."""

    index: ShardIndex
    number: int
    reader: ShardReader

    @property
    def name(self) -> dict[str, str]:
        """Its name in result rows."""
        return {"key": self.index.keys[self.number]}

    def _content(self, kind: str) -> bytes:
        row = self.index.rows[self.number]
        piece = Piece(self.index.shard, int(row[f"{kind}_offset"]), int(row[f"{kind}_size"]))
        (content,) = self.reader.read([piece])
        if isinstance(content, OSError):
            raise ValueError(f"cannot be read: {content}")
        if zlib.crc32(content) != int(row[f"{kind}_crc"]):
            raise ValueError(f"the {kind}'s bytes changed since the index was made (crc32)")
        return bytes(content)

    def read(self) -> np.ndarray:
        """uint8 [height, width, 3]; indexing has checked that it decodes completely.

        Raises:
            ValueError: it cannot be read, or has changed since.
        """
        return decode_rgb(self._content("image"), bool(self.index.rows[self.number]["plain_jpeg"]))

    def turns(self, prompt: str) -> Turns:
        """The turns of its caption file, as ``parse_turns``.

        Raises:
            ValueError: it cannot be read, or has changed since.
        """
        is_json = bool(self.index.rows[self.number]["caption_is_json"])
        return parse_turns(self._content("caption"), is_json, prompt)

    def truth(self, prompt: str) -> str:
        """The answers of its caption; errors as ``turns``."""
        return " ".join(text for text, answers in self.turns(prompt) if answers)


class Inputs(Sequence[FileImage | ShardImage]):
    """Every image that ``patterns`` name, in that order; within a folder or glob sorted by name.

    Args:
        patterns: image files, ``.tar`` shards with an index beside them (also remote, or listed in a manifest),
            folders, which are searched at every depth, and globs.
        limit: use only the first N images; 0: all.

    Raises:
        ValueError: a pattern matches nothing or another kind of file, or a shard has no index.
    """

    def __init__(self, patterns: Sequence[str], limit: int = 0) -> None:
        if limit < 0:
            raise ValueError(f"--limit {limit}: must be at least 0, which means all")
        # Image files and indexes of shards.
        self._parts: list[str | ShardIndex] = []
        ends, total = [], 0
        for path in dict.fromkeys(itertools.chain.from_iterable(map(_expand, patterns))):
            part = read_index(path) if path.lower().endswith(".tar") else path
            total += 1 if isinstance(part, str) else len(part.rows)
            self._parts.append(part)
            ends.append(total)
            if 0 < limit <= total:
                break
        self._ends, self._reader = np.array(ends, np.int64), ShardReader(*_CACHE)
        self._length = min(limit or total, total)
        if not self._length:
            raise ValueError(f"{' '.join(patterns)}: no image; {_EXPECTED}")

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, number: int) -> FileImage | ShardImage:  # type: ignore[override]
        """One image, numbered from 0."""
        if not 0 <= number < self._length:
            raise IndexError(number)
        place = int(np.searchsorted(self._ends, number, side="right"))
        part = self._parts[place]
        if isinstance(part, str):
            return FileImage(part)
        return ShardImage(part, number - int(self._ends[place]) + len(part.rows), self._reader)


def check_not_input(output: Path, patterns: Sequence[str]) -> None:
    """Raise ValueError if writing ``output`` would replace one of the inputs."""
    if not output.exists():
        return
    for path in itertools.chain(patterns, *map(_expand, patterns)):
        if os.path.exists(path) and os.path.samefile(path, output):
            raise ValueError(f"--output {output}: it is one of the inputs. Name another file.")


def _expand(pattern: str) -> Iterator[str]:
    """The image files and shards of a pattern.

    Raises:
        ValueError: there are none.
    """
    if pattern.endswith(".dataset.json"):
        yield from patterns.expand_shards(_listed(pattern), "INPUT")
        return
    if storage.is_remote(pattern) and pattern.lower().endswith(SUFFIXES):
        raise ValueError(f"INPUT {pattern}: only .tar shards are read from a store. Copy the image to a local disk")
    if storage.is_remote(pattern) or pattern.lower().endswith(".tar"):
        yield from patterns.expand_shards([pattern], "INPUT")
        return
    try:
        matches = [match for part in patterns.find(pattern).values() for match in part]
    except ValueError as error:
        raise ValueError(f"INPUT {error}") from error
    if not matches:
        raise ValueError(f"INPUT {pattern}: no such file or folder; {_EXPECTED}")
    found = 0
    for match in matches:
        for path in _walk(match) if os.path.isdir(match) else [match]:
            if path.lower().endswith((*SUFFIXES, ".tar")):
                found += 1
                yield path
            elif not os.path.isdir(match) and match == pattern:
                raise ValueError(f"INPUT {pattern}: not an image or shard; {_EXPECTED}")
    if not found:
        raise ValueError(f"INPUT {pattern}: no image or shard in it; {_EXPECTED}")


def _listed(manifest: str) -> list[str]:
    """The shards of a manifest."""
    try:
        entries = json.loads(storage.read_bytes(manifest))["shards"]
        return [storage.join(storage.parent(manifest), entry["path"]) for entry in entries]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"INPUT {manifest}: cannot be read as a manifest ({error})") from None


def _walk(folder: str) -> Iterator[str]:
    """Every file of a folder and its subfolders, sorted by name, without hidden ones."""
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (os.path.join(place, name) for name in sorted(files) if not name.startswith("."))
