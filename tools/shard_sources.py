"""Where ``make_shards.py`` gets its samples: a folder of images and captions, or a table."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import re
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from genlip_megatron.data.image import IMAGE_SUFFIXES, OTHER_IMAGE_SUFFIXES
from genlip_megatron.data.scan import CAPTION_SUFFIXES
from genlip_megatron.data.tables import TABLE_SUFFIXES, column_names, plain_columns, table_rows, table_suffix

# How pandas writes a missing value, in lower case. None of these is a useful caption.
MISSING = {"", "nan", "-nan", "none", "null", "na", "n/a", "<na>", "#n/a", "#n/a n/a", "#na"}
MISSING |= {"nat", "1.#ind", "-1.#ind", "1.#qnan", "-1.#qnan"}


class Row(NamedTuple):
    """One sample of the source."""

    where: dict[str, Any]  # its place, for the list of skipped rows
    image: str | bytes = ""  # a path, absolute or below the root, or the image's bytes
    caption: Sequence[str] | bytes = ()  # the files to try in order, or the record
    problem: str = ""  # why it cannot be used
    source: dict[str, Any] | None = None  # its place and other columns, which travel with the sample


def leaves(root: str, path: str) -> bool:
    """Whether a path is a link that leads out of ``root``."""
    top = os.path.realpath(root)
    return os.path.islink(path) and os.path.commonpath((top, os.path.realpath(path))) != top


def folder_rows(root: str, folder: str = "") -> Iterator[Row]:
    """One row per image below ``root``, sorted by path; hidden names and __MACOSX are skipped."""
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
            files = [os.path.join(root, folder, file) for file in captions]
            yield Row({"path": path}, path, files, problem, {"path": path})
        elif os.path.isdir(os.path.join(root, path)):  # a link: following it could loop forever
            yield Row({"path": path}, problem="linked folder is not followed")


def other_format(suffix: str) -> str:
    """Why an image of another format is skipped."""
    return f"image is {suffix.lower()}: only JPEG, PNG and WebP are read; convert it"


def find_column(source: str, names: Sequence[str], flag: str, wanted: Sequence[str]) -> str:
    """The first of ``wanted`` among a table's columns; an exact match, or one up to case and surrounding spaces."""
    for name in wanted:
        for form in (str, lambda text: text.strip().casefold()):
            found = [column for column in names if form(column) == form(name)]
            if len(found) > 1:
                raise ValueError(f"{flag} {name}: {len(found)} columns of {source} have this name")
            if found:
                return found[0]
    hint = f"name yours with {flag}" + (" or --conversations-column" if flag == "--caption-column" else "")
    links = [name for name in names if re.fullmatch(r"(image_?|img_?)?(url|link)s?", name.strip(), re.IGNORECASE)]
    if flag == "--image-column" and links:
        hint = f"column {links[0]} holds links: download the images with img2dataset, whose shards need no packing"
    if any(os.path.splitext(name.strip())[1].lower() in IMAGE_SUFFIXES for name in names):
        hint = "the first line must name the columns"
    has = textwrap.shorten(", ".join(names), 1000) or "none"
    raise ValueError(f"{flag} {wanted[0]}: no such column in {source}; it has: {has}; {hint}")


def open_source(options: argparse.Namespace) -> tuple[Iterator[Row], str]:
    """(rows, folder of relative image paths). Raises ValueError if SOURCE or its settings are wrong."""
    source, root, image_column = options.source, options.image_root, options.image_column
    field = "caption" if options.conversations_column is None else "conversations"
    text_column = options.conversations_column or options.caption_column
    if os.path.isdir(source):
        if any((root, image_column, text_column)):
            raise ValueError(f"--image-root and the columns are settings for tables, but SOURCE {source} is a folder")
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
    table = table_rows(source, images, list(dict.fromkeys([images, texts, *plain_columns(source)])))
    first = next(table, None)
    if first is None:
        raise ValueError(f"SOURCE {source}: the table has no rows")
    rows = (table_row(where, cells, images, texts, field) for where, cells in itertools.chain([first], table))
    return rows, root or os.path.dirname(source)


def table_row(where: dict[str, int], cells: dict[str, Any] | str, images: str, texts: str, field: str) -> Row:
    """The row from a table's cells; ``field`` ("caption" or "conversations") is the content of the text column."""
    try:
        if isinstance(cells, str):
            raise ValueError(cells)
        image = image_cell(cells.get(images))
        path = {"path": image} if isinstance(image, str) else {}
        others = {name: cell for name, cell in cells.items() if name not in (images, texts) and is_plain(cell)}
        source = {**path, "row": where["row"], **({"columns": others} if others else {})}
        return Row(where, image, caption_cell(field, cells.get(texts)), source=source)
    except ValueError as error:
        return Row(where, problem=str(error))


def is_plain(cell: object) -> bool:
    """Whether a table's cell is worth keeping beside a sample: text of up to 1000 letters, or a number.

    >>> [is_plain(cell) for cell in ("CC0", 3, True, None, float("nan"), b"", ["a"], 1001 * "a")]
    [True, True, True, False, False, False, False, False]
    """
    if isinstance(cell, str) and len(cell) > 1000:
        return False
    return isinstance(cell, str | int | float) and cell not in (math.inf, -math.inf) and not is_missing(cell)


def is_missing(cell: object) -> bool:
    """Whether a table's cell holds no value.

    >>> [is_missing(cell) for cell in (None, float("nan"), " NaN", b"", [], 0, "A cat.")]
    [True, True, True, True, True, False, False]
    """
    if isinstance(cell, str):
        return cell.strip().casefold() in MISSING
    return cell is None or cell != cell or cell in (b"", [], {})


def caption_cell(field: str, cell: object) -> bytes:
    """The caption record of a table's cell."""
    if is_missing(cell):
        raise ValueError("caption is missing or empty")
    if isinstance(cell, str):
        if any("\udc80" <= letter <= "\udcff" for letter in cell):
            raise ValueError("caption is not UTF-8: save the table as UTF-8")
        try:
            cell = json.loads(cell) if field == "conversations" else cell
        except (ValueError, RecursionError) as error:
            raise ValueError(f"conversations are not JSON: {error}") from error
    elif field == "caption" and isinstance(cell, list):
        raise ValueError(f"caption is a list: a sample has one caption, this row has {len(cell)}; write a row for each")
    return to_json({field: cell})


def image_cell(cell: Any) -> str | bytes:
    """The path or the bytes of the one image in a table's cell."""
    if isinstance(cell, list) and len(cell) == 1:
        cell = cell[0]
    if isinstance(cell, dict):  # Hugging Face data sets
        content = cell.get("bytes")
        if not cell.keys() & {"bytes", "path"}:
            raise ValueError(f"image is a record without bytes and path: {str(list(cell))[:200]}")
        if isinstance(content, str) and content:
            raise ValueError("image bytes are text: base64 is not supported; use files or .parquet")
        cell = cell.get("path") if is_missing(content) else content
    if is_missing(cell):
        raise ValueError("image is missing or empty")
    if isinstance(cell, list):
        raise ValueError("image is a list: a sample has one image")
    if isinstance(cell, str) and re.match(r"\s*\{\s*['\"](bytes|path)['\"]", cell):
        raise ValueError("image is the text of a record: such a table keeps no bytes; write it as .parquet")
    if not isinstance(cell, str | bytes):
        raise ValueError(f"image is neither a path nor bytes: {type(cell).__name__}")
    return cell


def to_json(record: object) -> bytes:
    """The JSON to pack. Raises ValueError if the record cannot be written as JSON."""
    try:
        return json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half of a surrogate pair, maybe in an unused field
        return json.dumps(record).encode()
    except (TypeError, RecursionError) as error:
        raise ValueError(f"caption is not text: {error}") from error
