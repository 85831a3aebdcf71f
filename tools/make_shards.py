#!/usr/bin/env python3
"""Pack your own images and captions into WebDataset tar shards, for tools/prepare_data.py to index.

    tools/make_shards.py photos --output data                      # photos/a/1.jpg beside photos/a/1.json or 1.txt
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
source, so their bytes do not depend on the number of workers. docs/data.md has the details.
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
        raise ValueError(f"image path does not end in {', '.join(IMAGE_SUFFIXES)}: {image[:200]!r}")
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
        record = read_record(row.caption)
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


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[BinaryIO]:
    """A file that takes its name when the block ends without an error."""
    with atomic_path(target) as partial, open(partial, "wb") as file:
        yield file


def pack(rows: Iterator[Row], root: str, options: argparse.Namespace) -> tuple[int, Counter[str]]:
    """(samples written, skipped rows by reason). Raises ValueError if earlier shards exist without --overwrite."""
    samples, skipped, output = 0, Counter[str](), Path(options.output)
    shard_name = re.compile(rf"{re.escape(options.prefix)}-\d{{5,}}\.tar")
    earlier = [path for path in output.glob("*.tar") if shard_name.fullmatch(path.name)]
    if earlier and not options.overwrite:
        there = f"{len(earlier)} shards of --prefix {options.prefix} already exist"
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
        with replacing(output / f"{options.prefix}.skipped.jsonl") as listing, contextlib.ExitStack() as shard:
            results = read_ahead(pool, rows, root, ROWS_A_WORKER * options.workers)
            for row, (reason, members) in tqdm(results, desc="pack", unit="row", file=sys.stderr):
                if reason:
                    skipped[reason.split(":")[0]] += 1
                    listing.write(json.dumps({**row.where, "reason": reason}).encode() + b"\n")
                    continue
                while earlier:  # only once there is a first sample to replace them
                    earlier.pop().unlink()
                if samples % options.samples_per_shard == 0:
                    shard.close()
                    number = samples // options.samples_per_shard
                    file = shard.enter_context(replacing(output / f"{options.prefix}-{number:05d}.tar"))
                    archive = shard.enter_context(tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT))
                for suffix, content in members.items():
                    member = tarfile.TarInfo(f"{samples:09d}{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
                samples += 1
    finally:
        pool.shutdown(cancel_futures=True)
    return samples, skipped


@command
def main() -> None:
    parser = StrictParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE", help=f"folder, or table: {', '.join(TABLE_SUFFIXES)}")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the shards")
    parser.add_argument("--prefix", default="train", help="prefix of the shards' names (default: train)")
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
        rows, root = open_source(options)
        samples, skipped = pack(rows, root, options)
    except (ValueError, BrokenProcessPool) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except OSError as error:  # only writing raises it; read errors are ValueErrors or skipped rows
        parser.exit(2, f"{parser.prog}: error: --output {options.output}: cannot be written: {error.strerror}\n")
    for reason, count in skipped.most_common():
        print(f"  skipped {count}: {reason}")
    if samples == 0:
        parser.exit(1, f"{parser.prog}: error: SOURCE {options.source}: no row can be packed; see the reasons above\n")
    print(f"{samples} samples in {math.ceil(samples / options.samples_per_shard)} shards, {skipped.total()} skipped; "
          f"next: python tools/prepare_data.py {shlex.quote(options.output)} --tokenizer tokenizer.json")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
