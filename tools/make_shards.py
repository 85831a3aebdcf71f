#!/usr/bin/env python3
"""Pack your own images and captions into WebDataset tar shards, for tools/prepare_data.py to index.

    tools/make_shards.py photos --output data                      # photos/a/1.jpg beside photos/a/1.json or 1.txt
    tools/make_shards.py photos --output data --val-fraction 0.05  # train-*.tar, and val-*.tar for --valid-data
    tools/make_shards.py table.csv --output data --prefix val      # columns "image" and "caption"
    tools/make_shards.py llava.json --output data --conversations-column conversations --image-root photos

    SOURCE            content
    folder            searched recursively in sorted order; NAME.json or NAME.txt beside NAME.jpg (or NAME.jpg.txt)
    .csv              header; separated by ',' ';' or tab; quotes as in RFC 4180
    .tsv              header; no quotes: every line is a row, and '"' is an ordinary character
    .jsonl .json      one record per line; a list of records
    .parquet          also .arrow and .feather
    .gz               of .csv, .tsv, .jsonl and .json

An image column holds the images' bytes or paths; relative paths may not leave --image-root. Captions and sizes are
checked as in prepare_data.py, which also decodes the images later. Image bytes are copied unchanged. Samples that
cannot be packed are listed in PREFIX.skipped.jsonl; rows and lines of tables count from 1. Shards keep the order of the
source, so their bytes do not depend on the number of workers. --val-fraction splits by the images' bytes: the same
images always go to validation, and copies of an image stay together. docs/data.md has the details.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import math
import os
import re
import shlex
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import xxhash
from PIL import Image
from shard_sources import Row, open_source, other_format, to_json
from tqdm import tqdm

from genlip_megatron.atomic_write import atomic_path
from genlip_megatron.command import WorkerPool, command
from genlip_megatron.config import DEFAULT_PROMPT
from genlip_megatron.config.command_line import StrictParser
from genlip_megatron.data.content import describe
from genlip_megatron.data.image import IMAGE_SUFFIXES, OTHER_IMAGE_SUFFIXES
from genlip_megatron.data.scan import MAX_CAPTION_BYTES, MAX_IMAGE_BYTES, check_size
from genlip_megatron.data.tables import TABLE_SUFFIXES
from genlip_megatron.data.text import parse_turns
from genlip_megatron.outputs import check_file, json_lines

ROWS_A_WORKER = 16  # twice as many images per worker are in memory
SUFFIXES = {"a JPEG image": ".jpg", "a PNG image": ".png", "a WebP image": ".webp"}


def read_file(path: str, kind: str, most: int) -> bytes:
    """The bytes of an image or caption file. Raises ValueError if it cannot be used."""
    if not os.path.isfile(path):  # reading a pipe would block
        hint = "; write '/' between folders" if "\\" in path else ""
        raise ValueError(f"{kind} file is missing: {path}{hint}")
    try:
        check_size(os.path.getsize(path), most)
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{kind} file is unreadable: {error}") from error


def check_record(content: bytes) -> bytes:
    """The record to pack. Raises ValueError if prepare_data.py would refuse it."""
    check_size(len(content), MAX_CAPTION_BYTES)
    parse_turns(content, True, DEFAULT_PROMPT)
    return content


def caption_file(path: str) -> bytes:
    content = read_file(path, "caption", MAX_CAPTION_BYTES)
    is_json = path.lower().endswith(".json")
    parse_turns(content, is_json, DEFAULT_PROMPT)
    text = content.decode("utf-8-sig")
    return check_record(to_json(json.loads(text) if is_json else {"caption": text.strip()}))


def read_record(caption: Sequence[str] | bytes) -> bytes:
    """The bytes of KEY.json. Raises ValueError if there is no usable caption."""
    if isinstance(caption, bytes):
        return check_record(caption)
    problems = []
    for path in caption:
        try:
            return caption_file(path)
        except ValueError as error:
            problems.append(error)
    raise problems[0]


def with_source(record: bytes, source: dict[str, Any] | None) -> bytes:
    """The record with the sample's source, unless it says one itself or would be too large. Training reads neither."""
    tree = json.loads(record)
    if not source or not isinstance(tree, dict) or "source" in tree:
        return record
    whole = to_json({**tree, "source": source})
    return whole if len(whole) <= MAX_CAPTION_BYTES else record


def read_image(root: str, image: str | bytes) -> tuple[str, bytes]:
    """(suffix in the shard, bytes) of an image. Raises ValueError if it cannot be packed."""
    if isinstance(image, bytes):
        check_size(len(image), MAX_IMAGE_BYTES)
        return image_suffix(image), image
    if re.match(r"[a-z][a-z0-9+.-]*://|data:", image, re.IGNORECASE):
        raise ValueError(f"image is a URL: download it first, for example with img2dataset: {image[:200]}")
    suffix = os.path.splitext(image)[1].lower()
    if suffix in OTHER_IMAGE_SUFFIXES:
        raise ValueError(other_format(suffix))
    if suffix not in IMAGE_SUFFIXES:
        raise ValueError(f"image path does not end in {', '.join(IMAGE_SUFFIXES)}: {image[-80:]!r}")
    path = image if os.path.isabs(image) else os.path.normpath(image)
    if path.split(os.sep)[0] == os.pardir:
        raise ValueError(f"image path leaves --image-root: {image}")
    content = read_file(os.path.join(root, path), "image", MAX_IMAGE_BYTES)
    if not content:
        raise ValueError(f"image file is empty: {path}")
    return IMAGE_SUFFIXES[suffix], content


def image_suffix(content: bytes) -> str:
    """The suffix for an image, from its first bytes."""
    if suffix := SUFFIXES.get(describe(content)):
        return suffix
    try:
        kind = Image.open(io.BytesIO(content)).format
    except Exception:  # Pillow's readers raise many classes
        kind = f"of an unknown format that starts with {content[:12]!r}"
    raise ValueError(f"image is not a JPEG, PNG or WebP: it is {kind}; convert it")


def read_row(root: str, row: Row) -> tuple[str, dict[str, bytes]]:
    """("", {suffix: content} of its members), or (why the row is skipped, {})."""
    try:
        if row.problem:
            raise ValueError(row.problem)
        record = with_source(read_record(row.caption), row.source)
        suffix, image = read_image(root, row.image)
    except ValueError as error:
        return str(error), {}
    return "", {suffix: image, ".json": record}


def read_ahead(pool: ProcessPoolExecutor, rows: Iterator[Row], root: str, window: int) -> Iterator[tuple[Row, Any]]:
    """Each row with its ``read_row``, in order; while one window of rows is consumed, the next is being read."""
    waiting: Iterator[tuple[Row, Any]] = iter(())
    while batch := list(itertools.islice(rows, window)):
        reading = pool.map(read_row, itertools.repeat(root), batch, chunksize=8)
        yield from waiting
        waiting = zip(batch, reading, strict=True)
    yield from waiting


def is_own(shard: Path) -> bool:
    """Whether a file is a shard that this tool packed: numbered samples without times and owners."""
    try:
        with tarfile.open(shard, "r:") as archive:
            member = archive.next()
    except (OSError, tarfile.TarError):
        return False
    facts = (member.mtime, member.uid, member.gid, member.uname, member.gname) if member else ()
    return member is not None and facts == (0, 0, 0, "", "") and re.match(r"\d{9,}\.", member.name) is not None


is_skipped_list = json_lines(lambda keys: "reason" in keys and keys <= {"row", "line", "path", "reason"})


def for_validation(image: bytes, fraction: float) -> bool:
    """Whether a sample goes to validation. Only its image's bytes decide, so copies of an image stay together.

    >>> [sum(for_validation(b"%d" % i, fraction) for i in range(1000)) for fraction in (0, 0.1, 1)]
    [0, 97, 1000]
    """
    return xxhash.xxh3_64_intdigest(image) < fraction * 2**64


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[BinaryIO]:
    """A file that takes its name when the block ends without an error."""
    with atomic_path(target) as partial, open(partial, "wb") as file:
        yield file


class Shards:
    """Numbered shards of one prefix in a folder, each with its final name once it is complete."""

    def __init__(self, output: Path, prefix: str, samples_per_shard: int) -> None:
        self.output, self.prefix, self.samples = output, prefix, 0
        self._samples_per_shard = samples_per_shard
        self._shard = contextlib.ExitStack()

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self._shard.__exit__(*error)

    @property
    def pattern(self) -> str:
        """A glob of these shards."""
        return str(self.output / f"{self.prefix}-*.tar")

    def earlier(self) -> list[Path]:
        """Shards of this prefix that exist already."""
        name = re.compile(rf"{re.escape(self.prefix)}-\d{{5,}}\.tar")
        return [path for path in self.output.glob("*.tar") if name.fullmatch(path.name)]

    def add(self, members: dict[str, bytes]) -> None:
        """Append a sample, given as {suffix: content}."""
        if self.samples % self._samples_per_shard == 0:
            self._shard.close()
            number = self.samples // self._samples_per_shard
            file = self._shard.enter_context(replacing(self.output / f"{self.prefix}-{number:05d}.tar"))
            archive = tarfile.TarFile(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT)
            self._archive = self._shard.enter_context(archive)
        for suffix, content in members.items():
            member = tarfile.TarInfo(f"{self.samples:09d}{suffix}")
            member.size = len(content)
            self._archive.addfile(member, io.BytesIO(content))
        self.samples += 1


def pack(rows: Iterator[Row], root: str, options: argparse.Namespace) -> tuple[list[Shards], Counter[str]]:
    """(shards of each split, skipped rows by reason). Raises ValueError if earlier shards exist without --overwrite."""
    skipped, output = Counter[str](), Path(options.output)
    prefixes = [options.prefix, *([validation_prefix(options.prefix)] if options.val_fraction else [])]
    splits = [Shards(output, prefix, options.samples_per_shard) for prefix in prefixes]
    earlier = [path for shards in splits for path in shards.earlier()]
    if earlier and not options.overwrite:
        there = f"{len(earlier)} shards of --prefix {' and '.join(prefixes)} already exist"
        raise ValueError(f"--output {output}: {there}. Change one of the two, or use --overwrite to replace them.")
    for path in earlier:
        if path.is_symlink() or not is_own(path):
            raise ValueError(
                f"--output {output}: --overwrite: {path.name} was not packed by this tool. Name another folder."
            )
    output.mkdir(parents=True, exist_ok=True)
    check_file(output / f"{options.prefix}.skipped.jsonl", is_skipped_list)
    # Spawned before .parquet reading starts threads, whose locks forked workers could inherit in a locked state.
    pool = WorkerPool(options.workers)
    try:
        with contextlib.ExitStack() as files:
            listing = files.enter_context(replacing(output / f"{options.prefix}.skipped.jsonl"))
            for shards in splits:
                files.enter_context(shards)
            results = read_ahead(pool, rows, root, ROWS_A_WORKER * options.workers)
            for row, (reason, members) in tqdm(results, desc="pack", unit="row", file=sys.stderr):
                if reason:
                    skipped[reason.split(":")[0]] += 1
                    listing.write(json.dumps({**row.where, "reason": reason}).encode() + b"\n")
                    continue
                while earlier:  # only once there is a first sample to replace them
                    earlier.pop().unlink()
                image = next(content for suffix, content in members.items() if suffix != ".json")
                splits[for_validation(image, options.val_fraction)].add(members)
    finally:
        pool.shutdown(cancel_futures=True)
    return splits, skipped


def validation_prefix(prefix: str) -> str:
    """The prefix of the validation shards beside those of ``prefix``; no glob ``PREFIX-*`` matches both."""
    return "val" if prefix == "train" else f"val-{prefix}"


@command
def main() -> None:
    parser = StrictParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE", help=f"folder, or table: {', '.join(TABLE_SUFFIXES)}")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the shards")
    parser.add_argument("--prefix", default="train", help="prefix of the shards' names (default: train)")
    parser.add_argument(
        "--val-fraction",
        type=float,
        default=0.0,
        metavar="F",
        help="fraction of the images that goes to validation shards: val-*.tar, or val-PREFIX-*.tar (default: 0)",
    )
    parser.add_argument("--samples-per-shard", type=int, default=10000, help="samples per shard (default: 10000)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    parser.add_argument("--overwrite", action="store_true", help="remove earlier shards of this prefix")
    parser.add_argument(
        "--image-root", metavar="DIR", help="folder of relative image paths (default: the table's folder)"
    )
    parser.add_argument("--image-column", metavar="NAME", help="column of images (default: image or file_name)")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--caption-column", metavar="NAME", help="column of captions (default: caption)")
    text.add_argument("--conversations-column", metavar="NAME", help="column of conversations, as (JSON) lists")
    options = parser.parse_args()
    try:
        for name in ("samples_per_shard", "workers"):
            if getattr(options, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)}: must be at least 1")
        if not re.fullmatch(r"\w[\w.-]*", options.prefix, re.ASCII):
            raise ValueError(f"--prefix {options.prefix!r}: must be letters, digits, '_', '-' and '.'")
        if not 0 <= options.val_fraction < 1:
            raise ValueError(f"--val-fraction {options.val_fraction}: must be at least 0 and below 1")
        rows, root = open_source(options)
        splits, skipped = pack(rows, root, options)
    except (ValueError, BrokenProcessPool) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except OSError as error:  # only writing raises it; read errors are ValueErrors or skipped rows
        parser.exit(2, f"{parser.prog}: error: --output {options.output}: cannot be written: {error.strerror}\n")
    for reason, count in skipped.most_common():
        print(f"  skipped {count}: {reason}")
    if not any(shards.samples for shards in splits):
        parser.exit(1, f"{parser.prog}: error: SOURCE {options.source}: no row can be packed; see the reasons above\n")
    for shards in splits:
        if not shards.samples:
            parser.exit(
                1,
                f"{parser.prog}: error: --val-fraction {options.val_fraction}: no sample went to "
                f"{shards.prefix}-*.tar. Choose a fraction nearer to 0.5\n",
            )
    packed = ", ".join(
        f"{shards.samples} samples in {math.ceil(shards.samples / options.samples_per_shard)} shards of {shards.prefix}"
        for shards in splits
    )
    print(f"{packed}, {skipped.total()} skipped; next:")
    for shards in splits:
        print(f"  python tools/prepare_data.py {shlex.quote(shards.pattern)} --tokenizer tokenizer.json")


if __name__ == "__main__":
    sys.exit(main())
