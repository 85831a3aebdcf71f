"""Tables: every good row is read, and a bad row does not affect others."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genlip_megatron.data import tables

COLUMNS = ["image", "caption"]
texts = st.text("ab\",;\n\t \\'é", max_size=12)


def read(path: Path) -> list[tuple[int | None, list[Any] | str]]:
    """(line, image and caption, or the error) of each row; checks that rows count from 1."""
    rows = list(tables.table_rows(str(path), "image", COLUMNS))
    assert [where["row"] for where, _ in rows] == list(range(1, len(rows) + 1))
    return [(w.get("line"), c if isinstance(c, str) else [c.get(name) for name in COLUMNS]) for w, c in rows]


def write_csv(rows: list[list[str]], **dialect: Any) -> str:
    file = io.StringIO(newline="")
    csv.writer(file, **dialect).writerows([COLUMNS, *rows])
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tables")


@settings(deadline=None, max_examples=100)
@given(st.lists(texts), st.sampled_from(["\n", "\r\n"]), st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
       st.sampled_from(",;\t"))  # fmt: skip
def test_csv_round_trip(folder: Path, captions: list[str], end: str, quotes: Any, sep: str) -> None:
    rows = [[f"{i}.jpg", caption] for i, caption in enumerate(captions)]
    text = write_csv(rows, lineterminator=end, quoting=quotes, delimiter=sep)
    (folder / "t.csv").write_bytes(text.encode())
    assert [cells for _, cells in read(folder / "t.csv")] == rows


@settings(deadline=None, max_examples=200)
@given(st.lists(texts, min_size=1, max_size=8), st.booleans(), st.randoms(use_true_random=False))
def test_an_extra_or_missing_quote_loses_only_its_row(
    folder: Path, captions: list[str], first: bool, rng: random.Random
) -> None:
    rows = [[f"{i}.jpg", caption] for i, caption in enumerate(captions)]
    order = slice(None) if first else slice(None, None, -1)
    parts = [write_csv([row[order]], lineterminator="\n").split("\n", 1)[1] for row in rows]
    hit = rng.randrange(len(parts))
    at = rng.randrange(len(parts[hit]))
    changed = parts[hit][:at] + ("" if parts[hit][at] == '"' else '"' + parts[hit][at]) + parts[hit][at + 1 :]
    header = ",".join(COLUMNS[order]) + "\n"
    (folder / "t.csv").write_bytes((header + "".join([*parts[:hit], changed, *parts[hit + 1 :]])).encode())
    found = [cells for _, cells in read(folder / "t.csv")]
    assert [row for row in rows if row not in found] in ([], [rows[hit]])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('1.jpg,"a 12" pizza"\n2.jpg,a 12" pizza\n', ["', ' expected", ["2.jpg", 'a 12" pizza']]),
        # Closed by chance, so it is a record of two fields.
        ('1.jpg,"open\n2.jpg,b\n3.jpg,closed"\n4.jpg,d\n',
         ["runs over lines that look like rows; a quote opens in line 2 and was followed to line 4",
          ["2.jpg", "b"], ["3.jpg", 'closed"'], ["4.jpg", "d"]]),
        ('1.jpg,"open\n2.jpg,b\n', ["unexpected end of data", ["2.jpg", "b"]]),
        ('1.jpg,"one\n\ntwo, 3.jpg"\n2.jpg,b\n', [["1.jpg", "one\n\ntwo, 3.jpg"], ["2.jpg", "b"]]),
        ("1.jpg,a,b\n2.jpg\n\n \n3.jpg,\n", ["fields is 3, of columns 2", "fields is 1, of columns 2", ["3.jpg", ""]]),
        ("1.jpg,a\x00b\n2.jpg,\x85\u2028\x0c\n", [["1.jpg", "a\x00b"], ["2.jpg", "\x85\u2028\x0c"]]),
    ],
)  # fmt: skip
def test_rows_after_a_bad_one_in_csv_are_read(folder: Path, text: str, expected: list[Any]) -> None:
    (folder / "t.csv").write_bytes(("image,caption\n" + text).encode())
    found = read(folder / "t.csv")
    assert len(found) == len(expected)
    for (_, cells), want in zip(found, expected, strict=True):
        assert want.replace("', '", "','") in cells if isinstance(want, str) else cells == want


def test_an_unclosed_quote_ends_after_a_limit_of_lines(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MAX_FIELD_LINES", 5)
    (folder / "t.csv").write_text('image,caption\n1.jpg,"open\n' + "2.jpg,b\n" * 20)
    (_, problem), *others = read(folder / "t.csv")
    assert "no end in 5 lines" in problem and others == [(line, ["2.jpg", "b"]) for line in range(3, 23)]


def test_in_tsv_every_line_is_a_row_and_quotes_are_ordinary(folder: Path) -> None:
    texts = ['"Hello" she said', '"unclosed', 'ends"', '"all of it"', "a, b", "  spaces ", "é\u2028\x85"]
    lines = [f"{i}.jpg\t{text}" for i, text in enumerate(texts)]
    (folder / "t.tsv").write_bytes("\r\n".join(["\ufeffimage\tcaption", *lines, "", "x\ty\tz", "x"]).encode())
    *good, (first, more), (last, less) = read(folder / "t.tsv")
    assert good == [(i, [f"{i - 2}.jpg", text]) for i, text in enumerate(texts, 2)]
    assert (first, last) == (10, 11) and "fields is 3, of columns 2" in more and "fields is 1, of columns 2" in less


@pytest.mark.parametrize("columns", [COLUMNS, COLUMNS[::-1]])
def test_a_quoted_tsv_gives_no_partial_captions(folder: Path, columns: list[str]) -> None:
    rows = [["1.jpg", 'a "cow"'], ["2.jpg", "two\nlines"], ["3.jpg", "one\ttab"], ["4.jpg", "plain"]]
    with open(folder / "t.tsv", "w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows(
            [columns, *(row if columns is COLUMNS else row[::-1] for row in rows)]
        )
    found = read(folder / "t.tsv")
    assert [cells for _, cells in found if not isinstance(cells, str)] == [["4.jpg", "plain"]] and len(found) == 5
    (folder / "t.csv").write_bytes((folder / "t.tsv").read_bytes())
    assert [cells for _, cells in read(folder / "t.csv")] == rows


@pytest.mark.parametrize("chunk", [7, 1 << 16])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_list_in_json_is_read_in_chunks(
    folder: Path, chunk: int, indent: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "CHUNK", chunk)
    rows = [{"image": f"{i}.jpg", "caption": ['x"]}', {"[": "é"}, 1.5, None][i % 4]} for i in range(9)]
    text = json.dumps([*rows, 12, "text", []], indent=indent, ensure_ascii=False)
    (folder / "t.json").write_text(f"\ufeff \n{text} \n", encoding="utf-8")
    *good, number, word, empty = read(folder / "t.json")
    assert good == [(None, [row["image"], row["caption"]]) for row in rows]
    assert number == word == empty == (None, "row is malformed: it is no JSON object")


@pytest.mark.parametrize(
    ("text", "done"),
    [
        ("[{}", 0),
        ("[{},", 1),
        ("[{}] [{}]", 1),
        ("[{},]", 1),
        ("[{}, {'a'}]", 1),
        ("[{}; {}]", 0),
        ("[{}, " + "[" * 9999, 1),
    ],
)
def test_a_broken_json_names_the_last_good_row(folder: Path, text: str, done: int) -> None:
    (folder / "t.json").write_text(text)
    rows = []
    after = f" after row {done}" if done else ""
    with pytest.raises(ValueError, match=rf"SOURCE \S+t.json: cannot be read as .json{after}: "):
        for row in tables.table_rows(str(folder / "t.json"), "image", COLUMNS):
            rows.append(row)
    assert len(rows) == done


def test_compressed_tables_are_read_and_truncated_ones_are_errors(folder: Path) -> None:
    rows = [[f"{i}.jpg", random.Random(i).randbytes(200).hex()] for i in range(2000)]
    content = gzip.compress(write_csv(rows).encode())
    (folder / "t.csv.gz").write_bytes(content)
    assert [cells for _, cells in read(folder / "t.csv.gz")] == rows
    (folder / "t.csv.gz").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"t.csv.gz: cannot be read as .csv after row \d+: "):
        read(folder / "t.csv.gz")


def test_a_cell_that_is_not_utf8_loses_only_its_row(folder: Path) -> None:
    cells = pyarrow.array([b"good", b"\xff", b"good"])
    text = pyarrow.StringArray.from_buffers(3, cells.buffers()[1], cells.buffers()[2])
    pyarrow.parquet.write_table(pyarrow.table({"image": ["1.jpg"] * 3, "caption": text}), folder / "t.parquet")
    (_, first), (_, bad), (_, last) = read(folder / "t.parquet")
    assert first == last == ["1.jpg", "good"] and bad.startswith("row is malformed: ")


def test_few_parquet_images_are_in_memory_at_a_time(folder: Path) -> None:
    images = [{"bytes": random.Random(i).randbytes(20_000), "path": None} for i in range(1000)]
    table = pyarrow.table({"image": images, "caption": ["x"] * 1000})
    pyarrow.parquet.write_table(table, folder / "t.parquet", row_group_size=100)
    del table
    before, most = pyarrow.total_allocated_bytes(), 0
    for _ in tables.table_rows(str(folder / "t.parquet"), "image", COLUMNS):
        most = max(most, pyarrow.total_allocated_bytes())
    assert most - before < 12e6  # of 20 MB


def test_lines_above_the_limit_lose_only_their_row(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MAX_LINE_BYTES", 100)
    for suffix, separator in ((".csv", ","), (".tsv", "\t")):
        lines = [separator.join(row) for row in (COLUMNS, ["1.jpg", "x" * 250], ["2.jpg", "x" * 93], ["3.jpg", "a"])]
        (folder / f"t{suffix}").write_text("\n".join(lines))
        found = read(folder / f"t{suffix}")
        assert [line for line, _ in found] == [2, 3, 4] and found[2][1] == ["3.jpg", "a"]
        assert [isinstance(cells, str) for _, cells in found] == [True, False, False]
    (folder / "t.jsonl").write_text("\n".join(json.dumps({"image": "a", "caption": "x" * n}) for n in (1, 300, 2)))
    assert [isinstance(cells, str) for _, cells in read(folder / "t.jsonl")] == [False, True, False]
