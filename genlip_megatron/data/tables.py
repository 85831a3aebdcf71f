"""Read tables of images and captions row by row in bounded memory: .csv, .tsv, .jsonl, .json, .parquet, .arrow.

Every row yields its cells or an error; a bad row costs no other row. An error that ends the table early (a truncated
file, a .json that is not a list) is a ValueError.

.csv has quotes as in RFC 4180, so a field may span lines, and a misplaced quote would swallow the rows after it. Such a
record is refused with its first line only, and reading continues at its second line. A record is refused if

* a closing quote is not followed by a separator or the end of the line, or no closing quote comes within
  MAX_FIELD_LINES and MAX_CAPTION_BYTES;
* its image path spans several lines, or a line other than the one with its image path looks like a row: it has enough
  fields, and an image path in the image column.

.tsv has no quotes: every line is a row, and ``"`` is an ordinary character. A quoted line is refused.

Python's csv module reads .csv, because pyarrow and pandas give up the whole file at an unclosed quote.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import itertools
import json
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

from genlip_megatron.data.image import IMAGE_SUFFIXES, OTHER_IMAGE_SUFFIXES
from genlip_megatron.data.scan import MAX_CAPTION_BYTES

TEXT_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json")
TABLE_SUFFIXES = (*TEXT_SUFFIXES, ".parquet", ".arrow", ".feather")
MAX_LINE_BYTES = 64 << 20  # also of a record in .json
# A .csv record ends after this many lines or MAX_CAPTION_BYTES, because the lines of a refused record are read again.
MAX_FIELD_LINES = 1000
# JSON has no header: its columns are those of its first rows.
HEADER_ROWS = 10_000
# Small, because rows may contain images.
BATCH_ROWS = 64
CHUNK = 1 << 16
_TOO_LONG = f"its line is above {MAX_LINE_BYTES} bytes"
_SPACE = re.compile(r"\s*")

Where = dict[str, int]  # the row, and in a text table its line, from 1
Cells = dict[str, Any]


class _Line(NamedTuple):
    number: int
    text: str | None  # with its line end; None if longer than MAX_LINE_BYTES


def table_suffix(path: str) -> str:
    """The suffix of a path (for text tables without .gz) if it is in TABLE_SUFFIXES, else ""."""
    stem, suffix = os.path.splitext(path.lower())
    suffix, allowed = (os.path.splitext(stem)[1], TEXT_SUFFIXES) if suffix == ".gz" else (suffix, TABLE_SUFFIXES)
    return suffix if suffix in allowed else ""


def column_names(path: str) -> list[str]:
    """A table's columns in order; for JSON those of its first HEADER_ROWS rows.

    Raises:
        ValueError: the table, or all of its rows, cannot be read.
    """
    suffix = table_suffix(path)
    with _naming(path, [0]):
        if suffix in (".csv", ".tsv"):
            header = next(_fields(path, suffix), None)
            if header is None:
                raise ValueError("the file is empty")
            if isinstance(header[1], str):
                raise ValueError(f"its first line must name the columns, but {header[1]}")
            return header[1]
        if suffix not in TEXT_SUFFIXES:
            return _arrow(path, [])[0]
        names, problem = dict[str, None](), ""
        for _, cells in itertools.islice(_json_rows(path, suffix), HEADER_ROWS):
            if isinstance(cells, str):
                problem = problem or cells
            else:
                names.update(dict.fromkeys(cells))
        if problem and not names:
            raise ValueError(f"none of the first {HEADER_ROWS} rows can be read; the first one: {problem}")
        return list(names)


def plain_columns(path: str) -> list[str]:
    """Columns of short values (text, numbers, truth values) of a .parquet, .arrow or .feather; [] for text tables.

    Raises:
        ValueError: the table cannot be read.
    """
    if table_suffix(path) in TEXT_SUFFIXES:
        return []
    import pyarrow.types

    types = pyarrow.types
    tests = [types.is_string, types.is_large_string, types.is_integer, types.is_floating, types.is_boolean]
    with _naming(path, [0]):
        return [field.name for field in _schema(path) if any(test(field.type) for test in tests)]


def _schema(path: str) -> Any:
    import pyarrow
    import pyarrow.ipc
    import pyarrow.parquet

    if table_suffix(path) == ".parquet":
        return pyarrow.parquet.read_schema(path)
    source = pyarrow.memory_map(path)
    try:
        return pyarrow.ipc.open_file(source).schema
    except pyarrow.ArrowInvalid:  # Hugging Face data sets are cached as streams
        source.seek(0)
        return pyarrow.ipc.open_stream(source).schema


def table_rows(path: str, image_column: str, columns: Sequence[str]) -> Iterator[tuple[Where, Cells | str]]:
    """(its place, its cells or the error) of every row, in order.

    Args:
        path: ends in one of TABLE_SUFFIXES, or in one of TEXT_SUFFIXES and .gz.
        image_column: column of the image paths.
        columns: columns to read from .parquet and .arrow; other formats give all.

    Raises:
        ValueError: the file cannot be read any further; names the last good row.
    """
    suffix, done = table_suffix(path), [0]
    rows: Iterator[tuple[int, Cells | str]]
    with _naming(path, done):
        if suffix in (".csv", ".tsv"):
            fields = _fields(path, suffix, image_column)
            _, header = next(fields)
            rows = ((n, x if isinstance(x, str) else dict(zip(header, x, strict=True))) for n, x in fields)
        elif suffix in TEXT_SUFFIXES:
            rows = _json_rows(path, suffix)
        else:
            rows = _arrow(path, columns)[1]
        for line, cells in rows:
            done[0] += 1
            yield {"row": done[0], **({"line": line} if line else {})}, cells


@contextlib.contextmanager
def _naming(path: str, done: list[int]) -> Iterator[None]:
    """Turn any error into one line about SOURCE: decompressors and pyarrow raise many classes."""
    try:
        yield
    except Exception as error:
        after = f" after row {done[0]}" if done[0] else ""
        reason = " ".join(str(error).split())
        raise ValueError(f"SOURCE {path}: cannot be read as {table_suffix(path)}{after}: {reason}") from error


@contextlib.contextmanager
def _open(path: str) -> Iterator[BinaryIO]:
    with gzip.open(path) if path.lower().endswith(".gz") else open(path, "rb") as file:
        start = file.peek(3)[:3]  # type: ignore[union-attr]
        if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise ValueError("it is UTF-16; save it as UTF-8")
        if start == b"\xef\xbb\xbf":
            file.read(3)
        yield file  # type: ignore[misc]


def _lines(path: str) -> Iterator[_Line]:
    """Lines that end in LF or CR LF. Bytes that are not UTF-8 pass, so that they cost only their own row."""
    with _open(path) as file:
        for number in itertools.count(1):
            line = file.readline(MAX_LINE_BYTES)
            if not line:
                return
            text = None
            if len(line) < MAX_LINE_BYTES or line.endswith(b"\n"):
                text = line.decode("utf-8", "surrogateescape")
            while len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE_BYTES)
            yield _Line(number, text)


def _fields(path: str, suffix: str, image_column: str = "") -> Iterator[tuple[int, list[str] | str]]:
    """(number of its first line, its fields or the error) of each record, header first."""
    return _tsv(_lines(path)) if suffix == ".tsv" else _csv(_lines(path), image_column)


def _miscount(fields: int, columns: int) -> str:
    return f"row is malformed: the number of fields is {fields}, of columns {columns}"


def _csv(lines: Iterator[_Line], image_column: str) -> Iterator[tuple[int, list[str] | str]]:
    first = next((line for line in lines if line.text is None or line.text.strip()), None)
    if first is None:
        return
    header: list[str] = []
    ahead, text = deque([first]), first.text or ""
    separator = max(",;\t", key=text.count)  # the comma if equally frequent
    spaced = f"{separator} " in text  # then a quote may follow the space
    csv.field_size_limit(MAX_LINE_BYTES + MAX_CAPTION_BYTES)
    while True:
        taken: list[_Line] = []
        record = _record_lines(ahead, lines, taken)
        cells: list[str] = []
        problem = ""
        try:
            cells = next(csv.reader(record, delimiter=separator, skipinitialspace=spaced, strict=True))
        except StopIteration:
            return
        except csv.Error as error:
            problem = f"row is malformed: {str(error).split(' - ')[0]}"  # without advice for programmers
        else:
            if not "".join(cells).strip() and len(cells) < 2:
                continue
            if header and len(cells) != len(header):
                problem = _miscount(len(cells), len(header))
            elif image_column in header and len(taken) > 1:
                i = header.index(image_column)
                rows = sum(_looks_like_row(line.text or "", separator, i, len(header)) for line in taken)
                if "\n" in cells[i] or rows > _is_image_path(cells[i]):
                    problem = "row is malformed: a quoted field runs over lines that look like rows"
        if problem and len(taken) > 1:
            problem += f"; a quote opens in line {taken[0].number} and was followed to line {taken[-1].number}"
            ahead.extendleft(reversed(taken[1:]))
        yield taken[0].number, problem or cells
        header = header or cells


def _record_lines(ahead: deque[_Line], lines: Iterator[_Line], taken: list[_Line]) -> Iterator[str]:
    """Yield the lines of one record and append them to ``taken``; raises csv.Error if it gets too long."""
    size = 0
    while (line := ahead.popleft() if ahead else next(lines, None)) is not None:
        taken.append(line)
        if line.text is None:
            raise csv.Error(_TOO_LONG)
        size += len(line.text) if len(taken) > 1 else 0
        if len(taken) > MAX_FIELD_LINES or size > MAX_CAPTION_BYTES:
            raise csv.Error(f"a quoted field has no end in {MAX_FIELD_LINES} lines of {MAX_CAPTION_BYTES} bytes in all")
        yield line.text


def _looks_like_row(text: str, separator: str, image: int, columns: int) -> bool:
    """Whether a line has enough fields and an image path in the image column, counted from the start or the end."""
    cells = text.split(separator)
    if len(cells) < columns:
        return False
    return _is_image_path(cells[image]) or _is_image_path(cells[image - columns])


def _is_image_path(cell: str) -> bool:
    return os.path.splitext(cell.strip(' "\r\n'))[1].lower() in (*IMAGE_SUFFIXES, *OTHER_IMAGE_SUFFIXES)


def _tsv(lines: Iterator[_Line]) -> Iterator[tuple[int, list[str] | str]]:
    quoted = (
        "row is malformed: a field is quoted, but .tsv has no quotes; rename the table to .csv, which may have tabs"
    )
    columns = 0
    before: tuple[int, list[str], str] | None = None  # the previous line, held back until this one is checked
    for number, text in lines:
        if text is not None and not text.strip(" \r\n"):
            continue
        cells = (text or "").rstrip("\r\n").split("\t")
        columns = columns or len(cells)
        problem = ""
        if text is None:
            problem = f"row is malformed: {_TOO_LONG}"
        elif any(map(_is_quoted, cells)) or (not before and any('"' in name or "\r" in name for name in cells)):
            problem = quoted if '"' in text else "its lines end in CR only; save it with LF or CR LF"
        elif len(cells) != columns:
            problem = _miscount(len(cells), columns)
        if before:
            # Two halves of a quoted field that spans lines: one lacks fields, and the other must not pass as a row.
            if len(cells) < columns == len(before[1]) and _is_half(before[1][-1], str.startswith):
                before = (*before[:2], quoted)
            if len(before[1]) < columns == len(cells) and _is_half(cells[0], str.endswith):
                problem = quoted
            yield before[0], before[2] or before[1]
        before = number, cells, problem
    if before:
        yield before[0], before[2] or before[1]


def _is_quoted(cell: str) -> bool:
    """Whether a field is quoted as in RFC 4180 and needed it, or is an empty quoted one: ``"a ""b"" c"``, ``""``.

    >>> [_is_quoted(cell) for cell in ('"a ""b"" c"', '""', '"a b"', '"a" and "b"', '"a')]
    [True, True, False, False, False]
    """
    inner = cell[1:-1]
    both = len(cell) > 1 and cell[0] == cell[-1] == '"'
    return both and '"' not in inner.replace('""', "") and (not inner or '"' in inner)


def _is_half(cell: str, at: Any) -> bool:
    return at(cell, '"') and cell.count('"') % 2 == 1


def _json_rows(path: str, suffix: str) -> Iterator[tuple[int, Cells | str]]:
    return _json_list(path) if suffix == ".json" else _json_lines(_lines(path))


def _json_cells(record: Any) -> Cells | str:
    return record if isinstance(record, dict) else "row is malformed: it is no JSON object"


def _json_lines(lines: Iterator[_Line]) -> Iterator[tuple[int, Cells | str]]:
    for number, text in lines:
        if text is None:
            yield number, f"row is malformed: {_TOO_LONG}"
        elif text.strip():
            try:
                record = json.loads(text)
            except (ValueError, RecursionError) as error:
                yield number, f"row is malformed: {error}"
            else:
                yield number, _json_cells(record)


def _json_list(path: str) -> Iterator[tuple[int, Cells | str]]:
    """The values of a JSON list, one by one. An error ends it, because the start of the next value is unknown."""
    decode = json.JSONDecoder().raw_decode
    with _open(path) as file, io.TextIOWrapper(file, "utf-8", "surrogateescape") as stream:
        text = stream.read(CHUNK).lstrip()
        if text[:1] != "[":
            raise ValueError("it must hold a list of records, [{...}, ...]; name it .jsonl if each line is a record")
        sign = _skip_space(text, 1) if text[1:].lstrip()[:1] == "]" else 0  # of "[", "," or "]"
        while text[sign] != "]":
            while True:
                try:
                    record, end = decode(text, _skip_space(text, sign + 1))
                    end = _skip_space(text, end)
                    if text[end] not in ",]":
                        raise ValueError(f"{text[end]!r} follows a record; ',' or ']' expected")
                    break
                except (ValueError, IndexError, RecursionError) as error:  # it may continue in the next chunk
                    rest = len(text) - sign
                    more = stream.read(max(CHUNK, rest)) if rest < MAX_LINE_BYTES else ""
                    if not more:
                        raise ValueError(error if isinstance(error, ValueError) else "the list has no end") from error
                    text, sign = text[sign:] + more, 0
            yield 0, _json_cells(record)
            sign = end
        if text[sign + 1 :].strip() or stream.read(CHUNK).strip():
            raise ValueError("more follows after the list's end")


def _skip_space(text: str, position: int) -> int:
    return _SPACE.match(text, position).end()  # type: ignore[union-attr]


def _arrow(path: str, columns: Sequence[str]) -> tuple[list[str], Iterator[tuple[int, Cells | str]]]:
    """(all columns, rows with the named columns)."""
    # Imported here, because it is large and the workers of tools/make_shards.py do not need it.
    import pyarrow
    import pyarrow.ipc
    import pyarrow.parquet

    if table_suffix(path) == ".parquet":
        # The defaults would read every row group's images at once instead of page by page.
        file = pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
        return file.schema_arrow.names, _batch_rows(file.iter_batches(BATCH_ROWS, columns=columns), columns)
    source = pyarrow.memory_map(path)
    try:
        reader = pyarrow.ipc.open_file(source)
        return reader.schema.names, _batch_rows(map(reader.get_batch, range(reader.num_record_batches)), columns)
    except pyarrow.ArrowInvalid:  # Hugging Face data sets are cached as streams
        source.seek(0)
        stream = pyarrow.ipc.open_stream(source)
        return stream.schema.names, _batch_rows(stream, columns)


def _batch_rows(batches: Iterable[Any], columns: Sequence[str]) -> Iterator[tuple[int, Cells | str]]:
    for batch in batches:
        cells = {name: batch.column(name) for name in columns}
        for i in range(batch.num_rows):
            try:
                yield 0, {name: column[i].as_py() for name, column in cells.items()}
            except (ValueError, OverflowError) as error:  # text that is not UTF-8, or a date beyond Python's range
                yield 0, f"row is malformed: {error}"
