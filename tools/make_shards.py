#!/usr/bin/env python3
"""Pack your own images and captions into WebDataset tar shards, for tools/prepare_data.py to index.

    tools/make_shards.py photos --output data                      # photos/a/1.jpg beside photos/a/1.json or 1.txt
    tools/make_shards.py table.csv --output data --prefix val      # columns "image" and "caption"
    tools/make_shards.py llava.json --output data --conversations-column conversations --image-root photos

    SOURCE            what it holds
    folder            searched recursively in sorted order; NAME.json, else NAME.txt beside NAME.jpg (or NAME.jpg.txt)
    .csv              a header; separated by ',' ';' or tab; quotes as in RFC 4180
    .tsv              a header; no quotes: a line is a row, and '"' is a letter
    .jsonl .json      a record a line; a list of records
    .parquet          also .arrow and .feather
    .gz               of .csv, .tsv, .jsonl and .json

An image column holds paths, which may not leave --image-root unless they are absolute, or the images' bytes. Captions
and sizes are checked as prepare_data.py does; whether images decode is for prepare_data.py to find out. Image bytes are
copied as they are. What cannot be packed is listed in PREFIX.skipped.jsonl, with a table's row and line from 1.
Workers read the files and this process writes the shards in the order of the source, so they are the same bytes for
any number of workers. docs/data.md has the details.
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
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from PIL import Image
from tqdm import tqdm

from genlip_megatron.atomic_write import atomic_path
from genlip_megatron.command import WorkerPool, command
from genlip_megatron.config import DEFAULT_PROMPT
from genlip_megatron.config.command_line import StrictParser
from genlip_megatron.data.image import IMAGE_SUFFIXES, OTHER_IMAGE_SUFFIXES
from genlip_megatron.data.scan import CAPTION_SUFFIXES, MAX_CAPTION_BYTES, MAX_IMAGE_BYTES
from genlip_megatron.data.tables import TABLE_SUFFIXES, column_names, table_rows, table_suffix
from genlip_megatron.data.text import parse_turns
from genlip_megatron.outputs import check_file, json_lines

ROWS_A_WORKER = 16  # memory holds the images of twice as many
# What pandas writes and reads for a missing value, in lower case. As a caption none of them teaches anything.
MISSING = {"", "nan", "-nan", "none", "null", "na", "n/a", "<na>", "#n/a", "#n/a n/a", "#na"}
# Regular expressions.
MAGIC = {rb"\xff\xd8\xff": ".jpg", rb"\x89PNG\r\n\x1a\n": ".png", rb"RIFF....WEBP": ".webp"}


class Row(NamedTuple):
    """What the source says of one sample."""

    where: dict[str, Any]  # how the list of skipped rows names it
    image: str | bytes = ""  # a path, absolute or below the root, or the image itself
    caption: Sequence[str] | bytes = ()  # the files to try in order, or the record itself
    problem: str = ""  # why the source cannot be used here


def leaves(root: str, path: str) -> bool:
    """Whether a path is a link to somewhere outside ``root``."""
    top = os.path.realpath(root)
    return os.path.islink(path) and os.path.commonpath((top, os.path.realpath(path))) != top


def folder_rows(root: str, folder: str = "") -> Iterator[Row]:
    """One row for each image below ``root``, sorted by path; hidden names and __MACOSX are left out."""
    try:
        with os.scandir(os.path.join(root, folder)) as entries:
            shown = (entry for entry in entries if entry.name[0] != "." and entry.name != "__MACOSX")
            found = {entry.name: entry.is_dir(follow_symlinks=False) for entry in shown}
    except OSError as error:
        yield Row({"path": folder}, problem=f"folder is unreadable: {error.strerror}")
        return
    images, others = Counter[str](), dict[str, list[str]]()  # by stem
    for name in sorted(name for name, is_folder in found.items() if not is_folder):
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in IMAGE_SUFFIXES:
            images[stem] += 1
        else:
            others.setdefault(stem, []).append(name)
    for name in sorted(found):
        path = os.path.join(folder, name)
        stem, suffix = os.path.splitext(name)
        if found[name]:
            yield from folder_rows(root, path)
        elif suffix.lower() in OTHER_IMAGE_SUFFIXES:
            yield Row({"path": path}, problem=other_format(suffix))
        elif suffix.lower() in IMAGE_SUFFIXES:
            beside = others.get(stem, []) + others.get(name, [])  # NAME.txt, NAME.jpg.txt
            kinds = [[file for file in beside if file.lower().endswith(kind)] for kind in CAPTION_SUFFIXES]
            captions = [file for files in kinds for file in files]
            problem = ""
            if not captions:
                problem = f"caption is missing or empty: no {stem}.json, {stem}.txt or {name}.txt"
                problem += f"; found: {', '.join(beside)}" if beside else ""
            elif max(map(len, kinds)) > 1:
                problem = f"more than one caption of a kind: {', '.join(captions)}"
            elif images[stem] > 1 and any(os.path.splitext(file)[0] == stem for file in captions):
                problem = f"more than one image: {', '.join(captions)} may be of any of {images[stem]}"
            elif any(leaves(root, os.path.join(root, folder, part)) for part in (name, *captions)):
                problem = "a link that leaves the folder"
            yield Row({"path": path}, path, [os.path.join(root, folder, file) for file in captions], problem)
        elif os.path.isdir(os.path.join(root, path)):  # a link: following it might never end
            yield Row({"path": path}, problem="linked folder is not followed")


def other_format(suffix: str) -> str:
    """The reason for which an image of another format is skipped."""
    return f"image is {suffix.lower()}: only JPEG, PNG and WebP are read; convert it"


def find_column(source: str, names: Sequence[str], flag: str, wanted: Sequence[str]) -> str:
    """The first of ``wanted`` among a table's columns: exactly, else but for case and spaces around it."""
    for name in wanted:
        for form in (str, lambda text: text.strip().casefold()):
            found = [column for column in names if form(column) == form(name)]
            if len(found) > 1:
                raise ValueError(f"{flag} {name}: {len(found)} columns of {source} have this name")
            if found:
                return found[0]
    hint = f"name yours with {flag}" + (" or --conversations-column" if flag == "--caption-column" else "")
    if any(os.path.splitext(name.strip())[1].lower() in IMAGE_SUFFIXES for name in names):
        hint = "the first line must name the columns"
    has = textwrap.shorten(", ".join(names), 1000) or "none"
    raise ValueError(f"{flag} {wanted[0]}: no such column in {source}; it has: {has}; {hint}")


def open_source(options: argparse.Namespace) -> tuple[Iterator[Row], str]:
    """(rows, folder where relative image paths start); a ValueError says what is wrong with SOURCE or its settings."""
    source, root, image_column = options.source, options.image_root, options.image_column
    field = "caption" if options.conversations_column is None else "conversations"
    text_column = options.conversations_column or options.caption_column
    if os.path.isdir(source):
        if any((root, image_column, text_column)):
            raise ValueError(f"--image-root and the columns are settings of a table, but SOURCE {source} is a folder")
        if next(folder_rows(source), None) is None:
            raise ValueError(f"SOURCE {source}: no {', '.join(IMAGE_SUFFIXES)} file in this folder")
        return folder_rows(source), source
    if not os.path.isfile(source) or not os.access(source, os.R_OK):
        raise ValueError(f"SOURCE {source}: no readable folder or file of this name")
    if not table_suffix(source):
        raise ValueError(f"SOURCE {source}: must be a folder or end in {', '.join(TABLE_SUFFIXES)}")
    if root is not None and not os.path.isdir(root):
        raise ValueError(f"--image-root {root}: no such folder")
    names = column_names(source)
    # Hugging Face's image folders call it file_name.
    images = find_column(source, names, "--image-column", [image_column] if image_column else ["image", "file_name"])
    texts = find_column(source, names, f"--{field}-column", [text_column or field])
    table = table_rows(source, images, [images, texts])
    first = next(table, None)
    if first is None:
        raise ValueError(f"SOURCE {source}: the table has no rows")
    rows = (table_row(where, cells, images, texts, field) for where, cells in itertools.chain([first], table))
    return rows, root or os.path.dirname(source)


def table_row(where: dict[str, int], cells: dict[str, Any] | str, images: str, texts: str, field: str) -> Row:
    """The row of a table's cells, of which ``field`` says what the text column holds."""
    try:
        if isinstance(cells, str):
            raise ValueError(cells)
        return Row(where, caption=caption_cell(field, cells.get(texts)), image=image_cell(cells.get(images)))
    except ValueError as error:
        return Row(where, problem=str(error))


def is_missing(cell: object) -> bool:
    """Whether a table's cell says that there is no value.

    >>> [is_missing(cell) for cell in (None, float("nan"), " NaN", b"", [], 0, "A cat.")]
    [True, True, True, True, True, False, False]
    """
    if isinstance(cell, str):
        return cell.strip().casefold() in MISSING
    return cell is None or cell != cell or cell in (b"", [], {})


def caption_cell(field: str, cell: object) -> bytes:
    """The record that a table's cell stands for."""
    if is_missing(cell):
        raise ValueError("caption is missing or empty")
    if isinstance(cell, str):
        if any("\udc80" <= letter <= "\udcff" for letter in cell):
            raise ValueError("caption is not UTF-8: save the table as UTF-8")
        try:
            cell = json.loads(cell) if field == "conversations" else cell
        except (ValueError, RecursionError) as error:
            raise ValueError(f"conversations are not JSON: {error}") from error
    return to_json({field: cell})


def image_cell(cell: Any) -> str | bytes:
    """The path or the bytes of the one image in a table's cell."""
    if isinstance(cell, list) and len(cell) == 1:
        cell = cell[0]
    if isinstance(cell, dict):  # as data sets of the hub have it
        content = cell.get("bytes")
        if not cell.keys() & {"bytes", "path"}:
            raise ValueError(f"image is a record without bytes and path: {str(list(cell))[:200]}")
        if isinstance(content, str) and content:
            raise ValueError("image bytes are text: base64 is not read; use files or .parquet")
        cell = cell.get("path") if is_missing(content) else content
    if is_missing(cell):
        raise ValueError("image is missing or empty")
    if isinstance(cell, list):
        raise ValueError("image is a list: a sample has one image")
    if not isinstance(cell, str | bytes):
        raise ValueError(f"image is neither a path nor bytes: {type(cell).__name__}")
    return cell


def to_json(record: object) -> bytes:
    """JSON as it is packed; a ValueError says what cannot be written."""
    try:
        return json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half of a surrogate pair, perhaps in a field that is of no use here
        return json.dumps(record).encode()
    except (TypeError, RecursionError) as error:
        raise ValueError(f"caption is no text: {error}") from error


def check_size(size: int, most: int) -> None:
    """Refuse what the index refuses."""
    if size > most:
        raise ValueError(f"file is too large: {size} bytes, above {most}")


def read_file(path: str, kind: str, most: int) -> bytes:
    """The bytes of an image or caption file; a ValueError says why it cannot be used."""
    if not os.path.isfile(path):  # opening a pipe would wait for its writer
        hint = "; write '/' between folders" if "\\" in path else ""
        raise ValueError(f"{kind} file is missing: {path}{hint}")
    try:
        check_size(os.path.getsize(path), most)
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{kind} file is unreadable: {error}") from error


def check_record(content: bytes) -> bytes:
    """A record as it is packed; a ValueError says why prepare_data.py would refuse it."""
    check_size(len(content), MAX_CAPTION_BYTES)
    parse_turns(content, True, DEFAULT_PROMPT)
    return content


def caption_file(path: str) -> bytes:
    """The record in a caption file."""
    content = read_file(path, "caption", MAX_CAPTION_BYTES)
    is_json = path.lower().endswith(".json")
    parse_turns(content, is_json, DEFAULT_PROMPT)
    text = content.decode("utf-8-sig")
    return check_record(to_json(json.loads(text) if is_json else {"caption": text.strip()}))


def read_record(caption: Sequence[str] | bytes) -> bytes:
    """The bytes of KEY.json; a ValueError says why there is nothing to learn from it."""
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
    """(suffix in the shard, bytes) of an image; a ValueError says why it cannot be packed."""
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
    """The suffix that an image's first bytes call for."""
    for magic, suffix in MAGIC.items():
        if re.match(magic, content, re.DOTALL):
            return suffix
    try:
        kind = Image.open(io.BytesIO(content)).format
    except Exception:  # each of Pillow's readers has errors of its own
        kind = f"of an unknown format that starts with {content[:12]!r}"
    raise ValueError(f"image is no JPEG, PNG or WebP: it is {kind}; convert it")


def read_row(root: str, row: Row) -> tuple[str, dict[str, bytes]]:
    """(why the row is skipped, contents of its members by suffix), one of them empty."""
    try:
        if row.problem:
            raise ValueError(row.problem)
        record = read_record(row.caption)
        suffix, image = read_image(root, row.image)
    except ValueError as error:
        return str(error), {}
    return "", {suffix: image, ".json": record}


def read_ahead(pool: ProcessPoolExecutor, rows: Iterator[Row], root: str, window: int) -> Iterator[tuple[Row, Any]]:
    """Each row with its ``read_row``, in order; while one window of rows is used, the next is under way."""
    waiting: Iterator[tuple[Row, Any]] = iter(())
    while batch := list(itertools.islice(rows, window)):
        reading = pool.map(read_row, itertools.repeat(root), batch, chunksize=8)
        yield from waiting
        waiting = zip(batch, reading, strict=True)
    yield from waiting


def is_own(shard: Path) -> bool:
    """Whether a file is a shard that this tool packed: numbered samples, without times and owners."""
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
    """(samples written, skipped rows by reason); earlier shards are a ValueError unless they may be overwritten."""
    samples, skipped, output = 0, Counter[str](), Path(options.output)
    shard_name = re.compile(rf"{re.escape(options.prefix)}-\d{{5,}}\.tar")
    earlier = [path for path in output.glob("*.tar") if shard_name.fullmatch(path.name)]
    if earlier and not options.overwrite:
        there = f"{len(earlier)} shards of --prefix {options.prefix} are there already"
        raise ValueError(f"--output {output}: {there}; choose another of the two, or let --overwrite remove them")
    for path in earlier:
        if path.is_symlink() or not is_own(path):
            raise ValueError(f"--output {output}: --overwrite: {path.name} was not packed by this tool; choose another")
    output.mkdir(parents=True, exist_ok=True)
    check_file(output / f"{options.prefix}.skipped.jsonl", is_skipped_list)
    # Reading .parquet starts threads, whose locks a forked worker could inherit closed.
    pool = WorkerPool(options.workers)
    try:
        with replacing(output / f"{options.prefix}.skipped.jsonl") as listing, contextlib.ExitStack() as shard:
            results = read_ahead(pool, rows, root, ROWS_A_WORKER * options.workers)
            for row, (reason, members) in tqdm(results, desc="pack", unit="row", file=sys.stderr):
                if reason:
                    skipped[reason.split(":")[0]] += 1
                    listing.write(json.dumps({**row.where, "reason": reason}).encode() + b"\n")
                    continue
                while earlier:  # not before there is something to put in their place
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
    """Check the settings, pack, and say what to run next."""
    parser = StrictParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE", help=f"folder, or table: {', '.join(TABLE_SUFFIXES)}")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the shards")
    parser.add_argument("--prefix", default="train", help="start of the shards' names (default: train)")
    parser.add_argument("--samples-per-shard", type=int, default=10000, help="samples a shard (default: 10000)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    parser.add_argument("--overwrite", action="store_true", help="remove earlier shards of this prefix")
    parser.add_argument("--image-root", metavar="DIR", help="start of relative image paths (default: table's folder)")
    parser.add_argument("--image-column", metavar="NAME", help="the table's images (default: image or file_name)")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--caption-column", metavar="NAME", help="the table's captions (default: caption)")
    text.add_argument("--conversations-column", metavar="NAME", help="the table's conversations, as (JSON) lists")
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
    except OSError as error:  # what fails on the way in is a ValueError or a skipped row
        parser.exit(2, f"{parser.prog}: error: --output {options.output}: cannot be written: {error.strerror}\n")
    for reason, count in skipped.most_common():
        print(f"  skipped {count}: {reason}")
    if samples == 0:
        parser.exit(1, f"{parser.prog}: error: SOURCE {options.source}: no row can be packed, see the reasons above\n")
    print(f"{samples} samples in {math.ceil(samples / options.samples_per_shard)} shards, {skipped.total()} skipped; "
          f"next: python tools/prepare_data.py {shlex.quote(options.output)} --tokenizer tokenizer.json")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
