#!/usr/bin/env python3
"""Pack your own images and captions into WebDataset tar shards, for tools/prepare_data.py to index.

    tools/make_shards.py photos --output data                      # photos/a/1.jpg beside photos/a/1.json or 1.txt
    tools/make_shards.py table.csv --output data --prefix val      # columns "image" and "caption"
    tools/make_shards.py table.jsonl --output data --conversations-column conversations --image-root photos

A folder is searched recursively in sorted order, hidden names left out; of a .json and a .txt caption the .json
counts, with all its fields. .csv and .tsv have a header and quotes as in RFC 4180. Relative image paths may not leave
--image-root. Image bytes are copied as they are; whether they decode is for prepare_data.py to find out. What cannot
be packed is listed in PREFIX.skipped.jsonl, a table's rows counted from 1. Workers read the files and this process
writes the shards in the order of the source, so they are the same bytes for any number of workers.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import shlex
import signal
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from tqdm import tqdm

from genlip_megatron.arguments import StrictParser
from genlip_megatron.outputs import check_file, json_lines

IMAGE_SUFFIXES = {".jpg": ".jpg", ".jpeg": ".jpg", ".png": ".png", ".webp": ".webp"}  # found -> in the shard
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
SPEAKERS = ("user", "human", "assistant", "gpt")  # the latter two answer
ROWS_A_WORKER = 16  # memory holds the images of twice as many
MAX_IMAGE_BYTES = 2**31  # the index of a shard has 32 bits for a size
MAX_CSV_FIELD = 2**24  # Python's 128 KiB refuse long conversations; without any, a lost quote would swallow the table


class Row(NamedTuple):
    """What the source says of one sample."""

    where: dict[str, str | int]  # how the list of skipped rows names it
    image: object = None  # path, absolute or below the root
    caption: str | dict[str, Any] = ""  # a caption file's path, or the record itself
    problem: str = ""  # why the source cannot be used here


def leaves(root: str, path: str) -> bool:
    """Whether a path is a link to somewhere outside ``root``."""
    top = os.path.realpath(root)
    return os.path.islink(path) and os.path.commonpath((top, os.path.realpath(path))) != top


def folder_rows(root: str, folder: str = "") -> Iterator[Row]:
    """One row for each image below ``root``, sorted by path."""
    try:
        with os.scandir(os.path.join(root, folder)) as entries:
            found = {entry.name: entry.is_dir(follow_symlinks=False) for entry in entries if entry.name[0] != "."}
    except OSError as error:
        yield Row({"path": folder}, problem=f"folder is unreadable: {error.strerror}")
        return
    for name in sorted(found):
        path = os.path.join(folder, name)
        stem, suffix = os.path.splitext(name)
        if found[name]:
            yield from folder_rows(root, path)
        elif suffix.lower() in IMAGE_SUFFIXES:
            caption = next((stem + kind for kind in (".json", ".txt") if stem + kind in found), "")
            problem = "" if caption else "caption is missing or empty: no .json or .txt of this name"
            if any(leaves(root, os.path.join(root, folder, part)) for part in (name, caption) if part):
                problem = "a link that leaves the folder"
            yield Row({"path": path}, path, os.path.join(root, folder, caption), problem)
        elif os.path.isdir(os.path.join(root, path)):  # a link: following it might never end
            yield Row({"path": path}, problem="linked folder is not followed")


def table_cells(path: str, columns: list[str] | None = None) -> Iterator[dict[str, Any] | str]:
    """The rows of a table, or what is wrong with one; of .parquet only ``columns`` are read."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix == ".parquet":
        try:
            import pyarrow.parquet

            for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1024, columns=columns):
                yield from batch.to_pylist()
        except ImportError as error:
            raise ValueError(f"SOURCE {path}: .parquet needs pyarrow; run: pip install pyarrow") from error
        except Exception as error:  # pyarrow has errors of many kinds
            raise ValueError(f"SOURCE {path}: cannot be read as .parquet: {error}") from error
        return
    csv.field_size_limit(MAX_CSV_FIELD)
    # Bytes that are not UTF-8 pass here, so that only their own row is refused.
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as text:
        rows: Iterator[Any] = map(json.loads, filter(str.strip, text))
        if suffix != ".jsonl":
            rows = csv.DictReader(text, delimiter="\t" if suffix == ".tsv" else ",", strict=True)
        while True:
            try:
                cells = next(rows)
            except StopIteration:
                return
            except (csv.Error, ValueError, RecursionError) as error:
                yield f"row is malformed: {error}"
                continue
            # An unquoted comma in a caption makes one field too many, whose name is None.
            fits = isinstance(cells, dict) and None not in cells
            yield cells if fits else "row is malformed: no JSON object, or more fields than columns"


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
    if not source.lower().endswith(TABLE_SUFFIXES):
        allowed = f"a folder or end in {', '.join(TABLE_SUFFIXES)}"
        raise ValueError(f"SOURCE {source}: must be {allowed}; jq -c '.[]' makes .jsonl of a list in .json")
    if root is not None and not os.path.isdir(root):
        raise ValueError(f"--image-root {root}: no such folder")
    sight = list(itertools.islice(table_cells(source), 100))
    if not sight:
        raise ValueError(f"SOURCE {source}: the table has no rows")
    found = dict.fromkeys(name for cells in sight if isinstance(cells, dict) for name in cells)
    image_column, text_column = image_column or "image", text_column or field
    for flag, name in (("--image-column", image_column), (f"--{field}-column", text_column)):
        if name not in found:
            raise ValueError(f"{flag} {name}: no such column in {source}; it has: {', '.join(found) or 'none'}")
    rows = (
        Row({"row": number}, problem=cells)
        if isinstance(cells, str)
        else Row({"row": number}, cells.get(image_column), {field: cells.get(text_column)})
        for number, cells in enumerate(table_cells(source, [image_column, text_column]), 1)
    )
    return rows, root or os.path.dirname(source)


def read_record(caption: str | dict[str, Any]) -> bytes:
    """The bytes of KEY.json; a ValueError says why there is nothing to learn from it."""
    try:
        record: Any = caption
        if isinstance(caption, str):
            text = Path(caption).read_text(encoding="utf-8-sig")
            record = json.loads(text) if caption.endswith(".json") else {"caption": text.strip()}
        elif isinstance(cell := caption.get("conversations"), str):
            record = {"conversations": json.loads(cell or "null")}
        content = json.dumps(record, ensure_ascii=False).encode()
    except (OSError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"caption is unreadable: {error}") from error
    turns: Any = record.get("conversations", record.get("conversation")) if isinstance(record, dict) else [None]
    if turns is None:
        turns = [{"from": "assistant", "value": record.get("caption") or ""}]
    for turn in turns if isinstance(turns, list) else [None]:
        if not isinstance(turn, dict) or turn.get("from") not in SPEAKERS or not isinstance(turn.get("value"), str):
            raise ValueError(f"caption is malformed: neither text nor turns of from ({', '.join(SPEAKERS)}) and value")
    if not any(turn["from"] in SPEAKERS[2:] and turn["value"].replace("<image>", "").strip() for turn in turns):
        raise ValueError("caption is missing or empty")
    return content


def read_image(root: str, image: object) -> tuple[str, bytes]:
    """(suffix in the shard, bytes) of an image file; a ValueError says why it cannot be packed."""
    suffix = os.path.splitext(image)[1].lower() if isinstance(image, str) else ""
    if not isinstance(image, str) or suffix not in IMAGE_SUFFIXES:
        raise ValueError(f"image path does not end in {', '.join(IMAGE_SUFFIXES)}: {str(image)[:200]}")
    path = image if os.path.isabs(image) else os.path.normpath(image)
    if path.split(os.sep)[0] == os.pardir:
        raise ValueError(f"image path leaves --image-root: {image}")
    path = os.path.join(root, path)
    if not os.path.isfile(path):  # opening a pipe would wait for its writer
        raise ValueError(f"image file is missing: {path}")
    try:
        content = Path(path).read_bytes() if os.path.getsize(path) < MAX_IMAGE_BYTES else b""
    except OSError as error:
        raise ValueError(f"image file is unreadable: {error}") from error
    if not content:
        raise ValueError(f"image file is empty or above 2 GiB: {path}")
    return IMAGE_SUFFIXES[suffix], content


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


is_skipped_list = json_lines(lambda keys: keys in ({"row", "reason"}, {"path", "reason"}))


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[BinaryIO]:
    """A file that takes its name only once it is complete."""
    partial = target.with_name(f".{target.name}.partial")
    with open(partial, "wb") as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)


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
    pool = ProcessPoolExecutor(options.workers, mp_context=multiprocessing.get_context("spawn"))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C does, end the workers too
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
    parser.add_argument("--image-column", metavar="NAME", help="the table's image paths (default: image)")
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
    main()
