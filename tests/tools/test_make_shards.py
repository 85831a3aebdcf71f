"""Packing user data: every kind of source, the same bytes for any number of workers, no silent loss."""

from __future__ import annotations

import argparse
import contextlib
import csv
import itertools
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.feather
import pyarrow.ipc
import pyarrow.parquet
import pytest

from genlip_megatron.config import DEFAULT_PROMPT
from genlip_megatron.data import tables
from genlip_megatron.data.scan import build_index
from genlip_megatron.data.text import parse_turns
from genlip_megatron.tokenizer import load_tokenizer
from tests.data.shards import image, write_shard
from tools import make_shards

SCRIPT = make_shards.__file__


TURNS = [{"from": "human", "value": "<image>What is it?"}, {"from": "gpt", "value": "A dog, says “Rex”."}]


def pack(source: Path, output: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the tool."""
    command = [sys.executable, SCRIPT, str(source), "--output", str(output), "--workers", "1", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def contents(output: Path) -> dict[str, list[tuple[str, bytes]]]:
    """(name, bytes) of every member of every shard in order; checks that headers hold no time or owner."""
    shards = {}
    for shard in sorted(output.glob("*.tar")):
        assert shard.read_bytes()[257:265] == b"ustar\x0000"
        with tarfile.open(shard) as archive:
            members = archive.getmembers()
            assert all(
                (m.mtime, m.uid, m.gid, m.uname, m.gname, m.pax_headers) == (0, 0, 0, "", "", {}) for m in members
            )
            shards[shard.name] = [(m.name, archive.extractfile(m).read()) for m in members]  # type: ignore[union-attr]
    return {shard: [(name, without_source(name, body)) for name, body in members] for shard, members in shards.items()}


def without_source(name: str, body: bytes) -> bytes:
    """A record without what the tool added about its source."""
    tree = json.loads(body) if name.endswith(".json") else None
    if isinstance(tree, dict) and isinstance(tree.get("source"), dict):
        del tree["source"]
        return make_shards.to_json(tree)
    return body


def refusal(content: bytes) -> str:
    """The error of parse_turns for a .json, up to the colon."""
    with pytest.raises(ValueError) as error:
        parse_turns(content, True, DEFAULT_PROMPT)
    return str(error.value).split(":")[0]


def skipped(output: Path) -> list[dict[str, Any]]:
    """The list of skipped rows."""
    return [json.loads(line) for line in (output / "train.skipped.jsonl").read_text().splitlines()]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of five captioned images in two levels."""
    folder = tmp_path / "photos"
    (folder / "b").mkdir(parents=True)
    for name in ("c.png", "a.JPEG", "b/2.webp", "b/1.jpg", "b-.jpg"):
        (folder / name).write_bytes(f"bytes of {name}".encode())
    (folder / "a.json").write_bytes(b'\xef\xbb\xbf{"caption": "A cat.", "source": "own"}')
    (folder / "a.txt").write_text("not this one")
    (folder / "b-.txt").write_text("Ein Büffel.\n", encoding="utf-8")
    (folder / "b/1.json").write_text(json.dumps({"conversations": TURNS}))
    (folder / "b/2.json").write_text(json.dumps({"conversation": TURNS}))
    (folder / "c.txt").write_text("A cow.")
    return folder


def test_a_split_depends_on_the_images_only_and_keeps_copies_together(tmp_path: Path) -> None:
    """The same images go to validation whatever the order, the other rows and the captions; no image is in both."""
    table = [{"image": f"{i % 40}.png", "caption": f"Caption {i}."} for i in range(80)]  # every image twice
    for i in range(40):
        (tmp_path / f"{i}.png").write_bytes(f"bytes {i}".encode())
    for name, rows in (("all", table), ("turned", table[::-1]), ("half", table[:30])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {}
    for name in ("all", "turned", "half"):
        done = pack(tmp_path / f"{name}.jsonl", tmp_path / name, "--val-fraction", "0.25", "--samples-per-shard", "7")
        assert done.returncode == 0, done.stderr
        for split in ("train", "val"):
            assert f"'{tmp_path / name}/{split}-*.tar' --tokenizer" in done.stdout
            shards = [members for shard, members in contents(tmp_path / name).items() if shard.startswith(split)]
            found[name, split] = [content for members in shards for file, content in members if file.endswith(".png")]
    for name, rows in (("all", 80), ("turned", 80), ("half", 30)):
        assert not set(found[name, "train"]) & set(found[name, "val"])
        assert len(found[name, "train"]) + len(found[name, "val"]) == rows
    assert set(found["all", "val"]) == set(found["turned", "val"]) > set(found["half", "val"]) > set()
    assert len(found["all", "val"]) == 2 * len(set(found["all", "val"]))


def test_the_source_of_a_sample_travels_with_it(photos: Path, tmp_path: Path) -> None:
    """The path in a folder; of a table the row, the path, and other columns of text and numbers, from any format."""
    (tmp_path / "p.png").write_bytes(image("PNG"))
    row = {"image": "p.png", "caption": "A ramp.", "license": "CC0", "score": 0.5, "empty": None, "long": 1001 * "x"}
    expected = {"path": "p.png", "row": 1, "columns": {"license": "CC0", "score": 0.5}}
    (tmp_path / "t.jsonl").write_text(json.dumps(row))
    nested = {**row, "image": {"bytes": image("PNG"), "path": None}, "vector": [0.1, 0.2], "raw": b"\xff"}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([nested]), tmp_path / "t.parquet")
    pyarrow.feather.write_feather(pyarrow.Table.from_pylist([nested]), tmp_path / "t.feather")
    for source in ("t.jsonl", "t.parquet", "t.feather", "photos"):
        done = pack(tmp_path / source, tmp_path / f"out {source}", "--samples-per-shard", "9")
        assert done.returncode == 0, done.stderr
        with tarfile.open(tmp_path / f"out {source}" / "train-00000.tar") as archive:
            records = [json.load(archive.extractfile(m)) for m in archive if m.name.endswith(".json")]  # type: ignore[arg-type]
        if source == "photos":
            places = [{"path": name} for name in ("b/1.jpg", "b/2.webp", "b-.jpg", "c.png")]
            assert [one["source"] for one in records] == ["own", *places]  # the first caption file says one itself
            continue
        (record,) = records
        if source != "t.jsonl":
            del record["source"]["row"]
            assert record["source"] == {"columns": expected["columns"]}
        else:
            assert record == {"caption": "A ramp.", "source": expected}


def test_a_split_that_stays_empty_is_an_error(photos: Path, tmp_path: Path) -> None:
    done = pack(photos, tmp_path / "out", "--val-fraction", "0.001", "--prefix", "own")
    assert done.returncode == 1 and "--val-fraction 0.001: no sample went to val-own-*.tar" in done.stderr


def test_a_folder_is_packed_in_sorted_order_with_its_own_bytes(photos: Path, tmp_path: Path) -> None:
    (photos / ".hidden.jpg").write_bytes(b"left out")
    done = pack(photos, tmp_path / "out", "--samples-per-shard", "3")
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        "5 samples in 2 shards of train, 0 skipped; next:\n"
        f"  python tools/prepare_data.py '{tmp_path}/out/train-*.tar' --tokenizer tokenizer.json\n"
    )
    expected = [
        ("a.JPEG", "jpg", {"caption": "A cat.", "source": "own"}),
        ("b/1.jpg", "jpg", {"conversations": TURNS}),
        ("b/2.webp", "webp", {"conversation": TURNS}),
        ("b-.jpg", "jpg", {"caption": "Ein Büffel."}),
        ("c.png", "png", {"caption": "A cow."}),
    ]
    members = []
    for number, (name, suffix, record) in enumerate(expected):
        members.append((f"{number:09d}.{suffix}", f"bytes of {name}".encode()))
        members.append((f"{number:09d}.json", json.dumps(record, ensure_ascii=False).encode()))
    assert contents(tmp_path / "out") == {"train-00000.tar": members[:6], "train-00001.tar": members[6:]}


@pytest.mark.slow
def test_shards_are_full_and_the_same_bytes_for_any_number_of_workers(tmp_path: Path) -> None:
    for number in range(0, 90, 2):
        (tmp_path / f"{number}.jpg").write_bytes(bytes([number]) * (1 + number * 37 % 500))
    with open(tmp_path / "table.csv", "w") as file:
        print("image,caption", *(f"{number}.jpg,Image {number}." for number in range(90)), sep="\n", file=file)
    written = []
    for workers in ("1", "3"):
        output = tmp_path / workers
        assert pack(tmp_path / "table.csv", output, "--workers", workers, "--samples-per-shard", "20").returncode == 0
        written.append({file.name: file.read_bytes() for file in output.iterdir()})
    assert [len(members) // 2 for members in contents(tmp_path / "1").values()] == [20, 20, 5]
    assert written[0] == written[1]
    assert [entry["row"] for entry in skipped(tmp_path / "1")] == list(range(2, 91, 2))


def write_table(path: Path, columns: list[str], rows: list[list[Any]]) -> None:
    """Write a table in the format of the suffix; csv and tsv hold lists as JSON."""
    records = [dict(zip(columns, row, strict=True)) for row in rows]
    cells = [[json.dumps(c) if isinstance(c, list) else c for c in row] for row in rows]
    with open(path, "w", newline="", encoding="utf-8") as file:
        if path.suffix == ".jsonl":
            file.write("\n\n".join(map(json.dumps, records)))
        elif path.suffix == ".json":
            json.dump(records, file, indent=1)
        elif path.suffix == ".tsv":
            file.writelines("\t".join(map(str, row)) + "\n" for row in [columns, *cells])
        elif path.suffix == ".csv":
            csv.writer(file).writerows([columns, *cells])
    table = pyarrow.Table.from_pylist(records)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    elif path.suffix == ".feather":
        pyarrow.feather.write_feather(table, path)
    elif path.suffix == ".arrow":
        with pyarrow.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", tables.TABLE_SUFFIXES)
def test_every_kind_of_table_gives_the_same_samples(suffix: str, photos: Path, tmp_path: Path) -> None:
    space = " " if suffix == ".tsv" else "\n\t"  # impossible in .tsv
    caption = f'A "cow",{space}says she: ' + "moo " * 50_000 + "moo."  # longer than Python's own limit for a field
    images = ["c.png", str(photos / "a.JPEG")]
    write_table(photos / f"t{suffix}", ["id", "image", "caption"], [[1, images[0], caption], [2, images[1], "A cat."]])
    write_table(tmp_path / f"t{suffix}", ["file", "talk"], [[image, TURNS] for image in images])
    captions, talks = tmp_path / "captions", tmp_path / "talks"
    assert pack(photos / f"t{suffix}", captions).returncode == 0
    options = ["--image-root", str(photos), "--image-column", "file", "--conversations-column", "talk"]
    assert pack(tmp_path / f"t{suffix}", talks, *options).returncode == 0
    for output, records in (
        (captions, [{"caption": caption}, {"caption": "A cat."}]),
        (talks, [{"conversations": TURNS}] * 2),
    ):
        (members,) = contents(output).values()
        assert [name for name, _ in members] == ["000000000.png", "000000000.json", "000000001.jpg", "000000001.json"]
        assert [members[0][1], members[2][1]] == [b"bytes of c.png", b"bytes of a.JPEG"]
        assert [json.loads(members[i][1]) for i in (1, 3)] == records


def test_rows_that_cannot_be_packed_are_skipped_counted_and_listed(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(b"outside")
    (photos / "empty.png").touch()
    os.mkfifo(photos / "pipe.png")
    missing, no_caption = "image is missing or empty", "caption is missing or empty"
    images: list[tuple[Any, str]] = [
        ("gone.png", "image file is missing"),
        ("../secret.png", "image path leaves --image-root"),
        ("b/../../secret.png", "image path leaves --image-root"),
        ("pipe.png", "image file is missing"),
        ("empty.png", "image file is empty"),
        ("c.GIF", "image is .gif"),
        ("c.mp4", "image path does not end in .jpg, .jpeg, .jpe, .jfif, .png, .webp"),
        ("b\\1.jpg", "image file is missing"),
        ("https://x.org/c.png", "image is a URL"),
        ("data:image/png;base64,iVBOR", "image is a URL"),
        (["c.png", "c.png"], "image is a list"),
        ({"bytes": "iVBOR"}, "image bytes are text"),
        ({"src": "c.png"}, "image is a record without bytes and path"),
        (5, "image is neither a path nor bytes"),
        ({"bytes": "", "path": None}, missing),
        ([], missing),
        ("nan", missing),
        ("\0.png", "image file is missing"),
    ]
    bad = [(json.dumps({"image": cell, "caption": "x"}), reason) for cell, reason in images]
    bad += [
        ('{"image": "c.png", "caption": " "}', no_caption),
        ('{"image": "c.png"}', no_caption),
        ('{"image": "c.png", "caption": NaN}', no_caption),
        ('{"image": "c.png", "caption": "\\ud800"}', refusal(b'{"caption": "\\ud800"}')),
        ('{"image": "c.png", "caption": {"a": ' + "[" * 900 + "]" * 900 + "}}", refusal(b'{"caption": {"a": []}}')),
        ('{"image": "c.png", "caption": ', "row is malformed"),
        ("[" * 100_000, "row is malformed"),
        ("[]", "row is malformed"),
    ]
    good = '{"image": "c.png", "caption": "x"}'
    (photos / "t.jsonl").write_text("\n".join([good, *(line for line, _ in bad), good]))
    done = pack(photos / "t.jsonl", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    listed = [(entry["row"], entry["reason"].split(":")[0]) for entry in skipped(tmp_path / "out")]
    assert listed == [(number, reason) for number, (_, reason) in enumerate(bad, 2)]
    assert "  skipped 3: row is malformed\n" in done.stdout
    assert f"2 samples in 1 shards of train, {len(bad)} skipped;" in done.stdout

    (photos / "t.csv").write_bytes(b"image,caption\nc.png,one, two\nc.png,\xff\nc.png\n\nc.png,x\nc.png,\xff\xfe\xfd\n")
    assert "1 samples in 1 shards of train, 4 skipped;" in pack(photos / "t.csv", tmp_path / "csv").stdout
    assert [(entry["row"], entry["line"]) for entry in skipped(tmp_path / "csv")] == [(1, 2), (2, 3), (3, 4), (5, 7)]


def read(source: Path, **settings: str) -> list[tuple[dict[str, Any], str, dict[str, bytes]]]:
    """(place, reason to skip it, members without their source) of each row of a source, without packing."""
    unset = dict.fromkeys(("image_root", "image_column", "caption_column", "conversations_column"))
    rows, root = make_shards.open_source(argparse.Namespace(source=str(source), **{**unset, **settings}))
    found = [(row.where, *make_shards.read_row(root, row)) for row in rows]
    return [(at, why, {name: without_source(name, body) for name, body in got.items()}) for at, why, got in found]


def test_missing_values_are_not_captions(photos: Path) -> None:
    missing = ["", "nan", "NaN", "None", "null", "NULL", "NA", "N/A", "<NA>", " nan ", "NaT", "-1.#IND"]
    rows = [("image", "caption"), *(("c.png", text) for text in missing), *((text, "A cow.") for text in missing)]
    (photos / "t.csv").write_text(
        "".join(f"{image},{text}\n" for image, text in [*rows, ("c.png", "Nan bread: none left")])
    )
    *bad, (_, reason, members) = read(photos / "t.csv")
    assert [reason for _, reason, _ in bad] == (
        ["caption is missing or empty"] * len(missing) + ["image is missing or empty"] * len(missing)
    )
    assert reason == "" and json.loads(members[".json"])["caption"] == "Nan bread: none left"
    for cells in ([None, "None", "nan", " ", "A cow."], [float("nan"), None]):
        table = pyarrow.table({"image": ["c.png"] * len(cells), "caption": pyarrow.array(cells)})
        pyarrow.parquet.write_table(table, photos / "t.parquet")
        reasons = [reason for _, reason, _ in read(photos / "t.parquet")]
        assert reasons == ["" if cell == "A cow." else "caption is missing or empty" for cell in cells]


def test_images_in_cells_get_their_suffix_from_their_bytes(photos: Path) -> None:
    jpeg, png, webp, heic = image("JPEG"), image("PNG"), image("WEBP"), b"\0\0\0\x1cftypheic"
    expected: list[tuple[dict[str, Any] | None, str, str, bytes]] = [
        ({"bytes": jpeg, "path": "wrong.gif"}, "", ".jpg", jpeg),
        ({"bytes": png, "path": None}, "", ".png", png),
        ({"bytes": webp, "path": None}, "", ".webp", webp),
        ({"bytes": None, "path": "c.png"}, "", ".png", b"bytes of c.png"),
        ({"bytes": image("GIF"), "path": "a.png"}, "image is not a JPEG, PNG or WebP: it is GIF", "", b""),
        ({"bytes": heic, "path": "a.png"}, "image is not a JPEG, PNG or WebP: it is of an unknown format", "", b""),
        ({"bytes": None, "path": None}, "image is missing or empty", "", b""),
        (None, "image is missing or empty", "", b""),
    ]
    cells = [cell for cell, *_ in expected]
    table = pyarrow.table({"image": cells, "caption": ["x"] * len(cells)})
    pyarrow.parquet.write_table(table, photos / "t.parquet")
    for (_, reason, members), (_, start, suffix, content) in zip(read(photos / "t.parquet"), expected, strict=True):
        assert reason.startswith(start) and (reason == "") == (start == "")
        assert members == ({suffix: content, ".json": b'{"caption": "x"}'} if suffix else {})
    plain = pyarrow.table({"picture": [jpeg], "lists": [[png]], "caption": ["x"]})
    pyarrow.feather.write_feather(plain, photos / "t.feather")
    for column, suffix, content in (("picture", ".jpg", jpeg), ("lists", ".png", png)):
        ((_, _, members),) = read(photos / "t.feather", image_column=column)
        assert members[suffix] == content


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffImage , CAPTION\nc.png, x\n",
        'image, caption\nc.png, "x"\n',
        "file_name,caption\nc.png,x\n",
        "Image,image,caption\ngone.png,c.png,x\n",
        "caption;image\nx;c.png\n",
        'caption\timage\n"x"\tc.png\n',
    ],
)
def test_columns_are_found_despite_case_spaces_and_separator(text: str, photos: Path) -> None:
    (photos / "t.csv").write_text(text, encoding="utf-8")
    assert read(photos / "t.csv") == [
        ({"row": 1, "line": 2}, "", {".png": b"bytes of c.png", ".json": b'{"caption": "x"}'})
    ]


def test_conversations_are_lists_or_json(photos: Path) -> None:
    cells = [json.dumps(TURNS), TURNS, "[", None, "None", "null"]
    rows = [{"image": "c.png", "talk": cell, "caption": "not asked for"} for cell in cells]
    (photos / "t.json").write_text(json.dumps(rows))
    good, bad = json.dumps({"conversations": TURNS}, ensure_ascii=False).encode(), "caption is missing or empty"
    found = read(photos / "t.json", conversations_column="talk")
    assert [members.get(".json", reason) for _, reason, members in found] == [
        good, good, "conversations are not JSON: Expecting value: line 1 column 2 (char 1)", bad, bad, bad,
    ]  # fmt: skip


def test_a_caption_file_is_found_as_in_shards(tmp_path: Path) -> None:
    (tmp_path / "__MACOSX").mkdir()
    for name in (
        *("A.JPG", "b.jfif", "c.jpe", "d.jpg", "e.png", "f.webp", "g.jpg", "h.jpg", "i.jpg", "i.png", "j.jpg", "j.png"),
        *("k.GIF", "l.heic", "o.CR2", "m.jpg", "n.JPEG", "._A.JPG", "__MACOSX/A.JPG", ".h.jpg"),
    ):
        (tmp_path / name).write_bytes(b"bytes")
    for name, text in {
        "A.TXT": "of A", "b.Json": '{"caption": "of b"}', "c.txt": "of c", "d.json": '{"url": "http"}', "d.txt": "of d",
        "e.png.txt": "of e", "f.webp.JSON": '{"caption": "of f"}', "g.txt": "1", "g.TXT": "2", "h.caption": "of h",
        "i.txt": "of either", "j.jpg.txt": "of j.jpg", "j.png.txt": "of j.png", "k.txt": "of k", "l.txt": "of l",
        "m.json": "{", "n.txt": "of n", "n.JPEG.txt": "of n, too", "._A.TXT": "no",
    }.items():  # fmt: skip
        (tmp_path / name).write_text(text)
    found = {
        where["path"]: json.loads(members[".json"])["caption"] if members else reason
        for where, reason, members in read(tmp_path)
    }
    png, gif, other = "of any of 2", "image is .gif: only JPEG, PNG and WebP are read; convert it", "more than one"
    assert found == {
        "A.JPG": "of A", "b.jfif": "of b", "c.jpe": "of c", "d.jpg": "of d", "e.png": "of e", "f.webp": "of f",
        "g.jpg": f"{other} caption of a kind: g.TXT, g.txt",
        "h.jpg": "caption is missing or empty: no h.json, h.txt or h.jpg.txt; found: h.caption",
        "i.jpg": f"{other} image: i.txt may be {png}", "i.png": f"{other} image: i.txt may be {png}",
        "j.jpg": "of j.jpg", "j.png": "of j.png", "k.GIF": gif, "l.heic": gif.replace("gif", "heic"),
        "o.CR2": gif.replace("gif", "cr2"),
        "m.jpg": found["m.jpg"], "n.JPEG": f"{other} caption of a kind: n.txt, n.JPEG.txt",
    }  # fmt: skip
    assert found["m.jpg"].startswith(refusal(b"{"))


ODD_RECORDS: list[bytes] = [
    b'{"caption": "A cat."}', b'\xef\xbb\xbf{"caption": "A cat."}', b'{"caption": "A cat.", "title": "\\ud83d"}',
    b'{"caption": ""}', b'{"caption": null}', b'{"caption": 5}', b'{"caption": ["A cat.", "A pet."]}',
    b'{"caption": NaN}',
    b'{"caption": "\\ud800"}', b'{"caption": "\xff"}', b'{"caption": "a<|im_end|>b"}', b'{"caption": "<image>"}',
    b'{"caption": "nan"}', b"{}", b"[]", b'"A cat."', b"null", b"{", b"", b"[" * 5000,
    b'{"caption": "' + b"x" * (1 << 20) + b'"}', b'{"caption":"x","pad":[' + b"1," * 500_000 + b"1]}",
    json.dumps({"conversations": TURNS}).encode(), json.dumps({"conversation": TURNS}).encode(),
    json.dumps({"conversations": TURNS[:1]}).encode(),
    json.dumps({"conversations": None, "caption": "A cat."}).encode(),
    json.dumps({"conversations": [{"from": "system", "value": "Be brief."}, *TURNS]}).encode(),
    json.dumps({"conversations": "[]"}).encode(),
    json.dumps({"conversations": {"from": ["gpt"], "value": ["x"]}}).encode(),
    json.dumps({"conversations": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}).encode(),
]  # fmt: skip


def test_exactly_what_prepare_data_accepts_is_packed(demo_data: Path, tmp_path: Path) -> None:
    """A caption is packed if and only if indexing accepts it."""
    bodies = [(".json", body) for body in ODD_RECORDS]
    bodies += [
        (".txt", body) for body in (b"A cat.", b" ", b"", b"\xff", b"\xef\xbb\xbfA cat.", b"nan", b"<image>", b"{}")
    ]
    folder = tmp_path / "folder"
    folder.mkdir()
    members = {}
    for number, (suffix, body) in enumerate(bodies):
        members |= {f"{number:04d}.png": image("PNG"), f"{number:04d}{suffix}": body}
    for name, content in members.items():
        (folder / name).write_bytes(content)
    raw = write_shard(tmp_path / "raw.tar", members)
    records = []
    for body in ODD_RECORDS:
        with contextlib.suppress(ValueError, RecursionError):
            records.append(json.loads(body))
    records = [record for record in records if isinstance(record, dict)]
    for kind in ("caption", "conversations"):
        rows = [{"image": "0000.png", kind: record.get(kind)} for record in records]
        (folder / f"{kind}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tokenizer = load_tokenizer(demo_data / "tokenizer.model")
    expected = build_index(raw, tokenizer, DEFAULT_PROMPT)
    for source in (folder, folder / "caption.jsonl", folder / "conversations.jsonl"):
        output = tmp_path / f"out-{source.stem}"
        column = ["--conversations-column", "conversations"] if source.stem == "conversations" else []
        assert pack(source, output, *column).returncode == 0
        index = build_index(str(output / "train-00000.tar"), tokenizer, DEFAULT_PROMPT)
        assert index.refused == {} and len(index.keys) > 0
        packed = sum(name.endswith(".png") for name, _ in contents(output)["train-00000.tar"])
        assert len(index.keys) == packed
        if source == folder:
            listed = {entry["path"][:4]: entry["reason"] for entry in skipped(output)}
            # Compact JSON grows when packed, here above the limit.
            grown = {key for key, reason in listed.items() if key in expected.keys and "too large" in reason}
            assert listed.keys() - grown == expected.refused.keys() and len(grown) == 1
            assert {key: listed[key] for key in expected.refused} == expected.refused


# A source's name and content, and the error.
BAD_SOURCES: list[tuple[str, bytes, str]] = [
    ("list.xlsx", b"PK", r"must be a folder or end in .csv, .tsv, .jsonl, .json, .parquet, .arrow, "),
    ("list.parquet.gz", b"x", r"must be a folder or end in .csv"),
    ("dict.json", b'{"image": []}', r"cannot be read as .json: it must hold a list of records"),
    ("bad.jsonl", b"[", r"cannot be read as .jsonl: none of the first 10000 rows can be read; the first one: "),
    ("blank.csv", b"\n\n", r"cannot be read as .csv: the file is empty"),
    ("quote.csv", b'image,"caption\n', r"cannot be read as .csv: its first line must name the columns"),
    ("quote.tsv", b'"image"\t"caption"\n"a.jpg"\t"x"\n', r"cannot be read as .tsv: .* rename the table to .csv"),
    ("utf16.csv", "image,caption\n".encode("utf-16"), r"cannot be read as .csv: it is UTF-16; save it as UTF-8"),
    ("mac.tsv", b"image\tcaption\ra.jpg\tx\r", r"cannot be read as .tsv: .*end in CR only"),
    ("mac.csv", b"image,caption\ra.jpg,x\r", r"cannot be read as .csv: .*new-line character"),
    ("plain.csv.gz", b"image,caption\n", r"cannot be read as .csv: Not a gzipped file"),
    ("bad.parquet", b"PAR1", r"cannot be read as .parquet: "),
    ("bad.arrow", b"x", r"cannot be read as .arrow: "),
    ("header.csv", b"image,caption\n", r"the table has no rows"),
]
BAD_SETTINGS: list[tuple[str, bytes, list[str], str]] = [
    ("none", b"", [], r"SOURCE \S+none: no readable folder or file"),
    ("", b"", [], r"SOURCE \S+: no .jpg, .jpeg, .jpe, .jfif, .png, .webp file in this folder"),
    ("list.json", b" [ ]", [], r"--image-column image: no such column in \S+list.json; it has: none"),
    ("a.csv", b"a.jpg,x\n", [], r"--image-column image: .* it has: a.jpg, x; the first line must name the columns"),
    ("a.csv", b"image,Caption,CAPTION\n", [], r"--caption-column caption: 2 columns of \S+a.csv have this name"),
    ("a.csv", b"image,text\n", ["--image-column", "url"], r"--image-column url: no such .* it has: image, text"),
    ("a.csv", b"image,text\n", [], r"--caption-column caption: no such column in \S+; it has: image, text"),
    ("a.csv", b"image\n", ["--conversations-column", "x"], r"--conversations-column x: no such column"),
    ("a.csv", b"image\n", ["--image-root", "nowhere"], r"--image-root nowhere: no such folder"),
    ("photos", b"", ["--image-root", "."], r"--image-root and the columns are settings for tables"),
    ("photos", b"", ["--samples-per-shard", "0"], r"--samples-per-shard 0: must be at least 1"),
    ("photos", b"", ["--workers", "0"], r"--workers 0: must be at least 1"),
    ("photos", b"", ["--prefix", "../x"], r"--prefix '../x': must be letters"),
    ("photos", b"", ["--output", "secret.txt"], r"--output secret.txt: cannot be written: File exists"),
]


@pytest.mark.parametrize(
    ("source", "content", "options", "message"),
    [*((name, content, [], rf"SOURCE \S+{name}: {text}") for name, content, text in BAD_SOURCES), *BAD_SETTINGS],
)
def test_bad_input_is_an_error_of_one_line(
    source: str, content: bytes, options: list[str], message: str, photos: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "secret.txt").touch()
    if content:
        (folder / source).write_bytes(content)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    path = str(photos if source == "photos" else folder / source)
    monkeypatch.setattr(sys, "argv", ["make_shards.py", path, "--output", "out", *options])
    with pytest.raises(SystemExit) as stopped:
        make_shards.main()
    assert stopped.value.code == 2 and not (folder / "out").exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"make_shards.py: error: {message}", line)


def test_earlier_shards_are_kept_until_overwrite_replaces_all_of_them(photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert pack(photos, output, "--samples-per-shard", "1").returncode == 0
    assert pack(photos, output, "--prefix", "train-b").returncode == 0
    before = contents(output)
    done = pack(photos, output)
    assert done.returncode == 2 and contents(output) == before
    assert "5 shards of --prefix train already exist. Change one of the two, or use --overwrite" in done.stderr
    (tmp_path / "bad.csv").write_text("image,caption\ngone.jpg,x\n")
    assert pack(tmp_path / "bad.csv", output, "--overwrite").returncode == 1 and contents(output) == before
    assert pack(photos, output, "--overwrite").returncode == 0
    assert list(contents(output)) == ["train-00000.tar", "train-b-00000.tar"]


def test_a_full_disk_leaves_complete_shards_and_one_line(tmp_path: Path) -> None:
    for name, size in (("1.jpg", 1000), ("2.jpg", 1000), ("3.jpg", 300_000)):
        (tmp_path / name).write_bytes(bytes(size))
        (tmp_path / name).with_suffix(".txt").write_text("x")
    command = [sys.executable, SCRIPT, str(tmp_path), "--output", str(tmp_path / "out"), "--samples-per-shard", "2"]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = subprocess.run([*command, "--workers", "1"], capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 2 and "out: cannot be written: File too large" in done.stderr.splitlines()[-1]
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["train-00000.tar"]
    assert len(contents(tmp_path / "out")["train-00000.tar"]) == 4


def test_a_killed_run_leaves_no_incomplete_shard(tmp_path: Path) -> None:
    size = 2**24
    with open(tmp_path / "1.jpg", "wb") as file:
        file.truncate(size)
    (tmp_path / "t.csv").write_text("image,caption\n" + "1.jpg,x\n" * 12)
    command = [sys.executable, SCRIPT, str(tmp_path / "t.csv"), "--output", str(tmp_path / "out"), "--workers", "1"]
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    with subprocess.Popen([*command, "--samples-per-shard", "1"], **options) as run:  # type: ignore[call-overload]
        while not any(size // 4 < file.stat().st_size < size for file in (tmp_path / "out").glob("*.tar*")):
            assert run.poll() is None, "ended before it could be killed"
            time.sleep(0.0005)
        os.killpg(run.pid, signal.SIGKILL)
    for shard in (tmp_path / "out").glob("train*.tar"):
        with tarfile.open(shard) as archive:
            assert len(archive.getmembers()) == 2 and shard.stat().st_size > size


def test_rows_are_read_at_most_two_windows_ahead() -> None:
    taken = 0

    def rows() -> Iterator[make_shards.Row]:
        nonlocal taken
        for taken in itertools.count(1):
            yield make_shards.Row({"row": taken}, problem="x")

    with ThreadPoolExecutor(1) as pool:
        for used, (row, _) in enumerate(itertools.islice(make_shards.read_ahead(pool, rows(), "", 5), 23), 1):
            assert row.where == {"row": used} and taken <= used + 10


def test_links_that_leave_the_folder_are_not_followed(photos: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("a secret")
    (photos / "linked.jpg").symlink_to(secret)
    (photos / "linked.txt").write_text("a caption")
    (photos / "told.jpg").write_bytes(image())
    (photos / "told.txt").symlink_to(secret)
    (photos / "loop").symlink_to(photos)
    done = pack(photos, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    refused = {row["path"]: row["reason"] for row in skipped(tmp_path / "out")}
    assert refused == {
        "linked.jpg": "a link that leaves the folder",
        "loop": "linked folder is not followed",
        "told.jpg": "a link that leaves the folder",
    }
    assert not any(b"a secret" in content for shard in contents(tmp_path / "out").values() for _, content in shard)
