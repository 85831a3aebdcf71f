"""Packing one's own data: every kind of source, the same bytes for any number of workers, nothing lost silently."""

from __future__ import annotations

import csv
import importlib.util
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

import pytest

from tools import make_shards

SCRIPT = make_shards.__file__
TURNS = [{"from": "human", "value": "<image>What is it?"}, {"from": "gpt", "value": "A dog, says “Rex”."}]


def pack(source: Path, output: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the tool."""
    command = [sys.executable, SCRIPT, str(source), "--output", str(output), "--workers", "1", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def contents(output: Path) -> dict[str, list[tuple[str, bytes]]]:
    """(name, bytes) of every member of every shard, in order; also that each says nothing of when and where."""
    shards = {}
    for shard in sorted(output.glob("*.tar")):
        assert shard.read_bytes()[257:265] == b"ustar\x0000"
        with tarfile.open(shard) as archive:
            members = archive.getmembers()
            assert all(
                (m.mtime, m.uid, m.gid, m.uname, m.gname, m.pax_headers) == (0, 0, 0, "", "", {}) for m in members
            )
            shards[shard.name] = [(m.name, archive.extractfile(m).read()) for m in members]  # type: ignore[union-attr]
    return shards


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


def test_a_folder_is_packed_in_sorted_order_with_its_own_bytes(photos: Path, tmp_path: Path) -> None:
    (photos / ".hidden.jpg").write_bytes(b"left out")
    done = pack(photos, tmp_path / "out", "--samples-per-shard", "3")
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        "5 samples in 2 shards, 0 skipped; "
        f"next: python tools/prepare_data.py {tmp_path / 'out'} --tokenizer tokenizer.json\n"
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
    """A table of the kind that the suffix says; csv and tsv hold lists as JSON."""
    if path.suffix == ".jsonl":
        path.write_text("\n\n".join(json.dumps(dict(zip(columns, row, strict=True))) for row in rows))
    elif path.suffix == ".parquet":
        import pyarrow.parquet

        data = dict(zip(columns, map(list, zip(*rows, strict=True)), strict=True))
        pyarrow.parquet.write_table(pyarrow.table(data), path)
    else:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerow(columns)
            writer.writerows([[json.dumps(c) if isinstance(c, list) else c for c in row] for row in rows])


@pytest.mark.parametrize("suffix", make_shards.TABLE_SUFFIXES)
def test_every_kind_of_table_gives_the_same_samples(suffix: str, photos: Path, tmp_path: Path) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    caption = 'A "cow",\nsays\tshe: ' + "moo " * 50_000  # longer than Python's own limit for a field
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
    bad = [
        ('{"image": "gone.png", "caption": "x"}', "image file is missing"),
        ('{"image": "../secret.png", "caption": "x"}', "image path leaves --image-root"),
        ('{"image": "b/../../secret.png", "caption": "x"}', "image path leaves --image-root"),
        ('{"image": "pipe.png", "caption": "x"}', "image file is missing"),
        ('{"image": "empty.png", "caption": "x"}', "image file is empty or above 2 GiB"),
        ('{"image": "c.gif", "caption": "x"}', "image path does not end in .jpg, .jpeg, .png, .webp"),
        ('{"image": {"bytes": ""}, "caption": "x"}', "image path does not end in .jpg, .jpeg, .png, .webp"),
        ('{"image": "c.png", "caption": " "}', "caption is missing or empty"),
        ('{"image": "c.png"}', "caption is missing or empty"),
        ('{"image": "c.png", "caption": NaN}', "caption is malformed"),
        ('{"image": "c.png", "caption": "\\ud800"}', "caption is unreadable"),
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
    assert "  skipped 3: row is malformed\n" in done.stdout and "2 samples in 1 shards, 14 skipped;" in done.stdout

    (photos / "t.csv").write_bytes(b"image,caption\nc.png,one, two\nc.png,\xff\nc.png\n\nc.png,x\n")
    assert "1 samples in 1 shards, 3 skipped;" in pack(photos / "t.csv", tmp_path / "csv").stdout
    assert [entry["row"] for entry in skipped(tmp_path / "csv")] == [1, 2, 3]


def test_images_of_a_folder_without_a_usable_caption_are_skipped(photos: Path, tmp_path: Path) -> None:
    (photos / "c.txt").unlink()
    (photos / "a.json").write_text('{"caption": null}')
    (photos / "b/1.json").write_text(json.dumps({"conversations": TURNS[:1]}))
    (photos / "b/2.json").write_text(json.dumps({"conversations": [{"from": "system", "value": "x"}]}))
    (photos / "loop").symlink_to(photos)
    assert "1 samples in 1 shards, 5 skipped;" in pack(photos, tmp_path / "out").stdout
    assert [entry["path"] for entry in skipped(tmp_path / "out")] == ["a.JPEG", "b/1.jpg", "b/2.webp", "c.png", "loop"]


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("none", [], r"SOURCE \S+none: no readable folder or file"),
        (
            "list.json",
            [],
            r"SOURCE \S+list.json: must be a folder or end in .csv, .tsv, .jsonl, .parquet",
        ),
        ("empty", [], r"SOURCE \S+empty: no .jpg, .jpeg, .png, .webp file in this folder"),
        ("header.csv", [], r"SOURCE \S+header.csv: the table has no rows"),
        ("t.csv", ["--image-column", "url"], r"--image-column url: no such column in \S+; it has: image, text"),
        ("t.csv", [], r"--caption-column caption: no such column in \S+; it has: image, text"),
        ("t.csv", ["--conversations-column", "x"], r"--conversations-column x: no such column"),
        ("t.csv", ["--image-root", "nowhere"], r"--image-root nowhere: no such folder"),
        ("photos", ["--image-root", "."], r"--image-root and the columns are settings of a table"),
        ("photos", ["--samples-per-shard", "0"], r"--samples-per-shard 0: must be at least 1"),
        ("photos", ["--workers", "0"], r"--workers 0: must be at least 1"),
        ("photos", ["--prefix", "../x"], r"--prefix '../x': must be letters"),
        ("photos", ["--output", "list.json"], r"--output list.json: cannot be written: File exists"),
    ],
)
def test_bad_input_is_one_line_that_names_it(
    source: str, options: list[str], message: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "header.csv").write_text("image,caption\n")
    (tmp_path / "t.csv").write_text("image,text\na.jpg,x\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["make_shards.py", str(tmp_path / source), "--output", "out", *options])
    with pytest.raises(SystemExit) as stopped:
        make_shards.main()
    assert stopped.value.code == 2 and not (tmp_path / "out").exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"make_shards.py: error: {message}", line)


@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is not None, reason="pyarrow is installed")
def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    done = pack(tmp_path / "t.parquet", tmp_path / "out")
    assert done.returncode == 2 and "t.parquet: .parquet needs pyarrow; run: pip install pyarrow" in done.stderr


def test_earlier_shards_are_kept_until_overwrite_replaces_all_of_them(photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert pack(photos, output, "--samples-per-shard", "1").returncode == 0
    assert pack(photos, output, "--prefix", "train-b").returncode == 0
    before = contents(output)
    done = pack(photos, output)
    assert done.returncode == 2 and contents(output) == before
    assert "5 shards of --prefix train are there already; choose another of the two, or let --overwrite" in done.stderr
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


def test_rows_are_read_only_as_far_ahead_as_two_windows() -> None:
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
    image = next(path for path in photos.rglob("*") if path.suffix in (".jpg", ".png"))
    (photos / "linked.jpg").symlink_to(secret)
    (photos / "linked.txt").write_text("a caption")
    (photos / "told.jpg").write_bytes(image.read_bytes())
    (photos / "told.txt").symlink_to(secret)
    done = pack(photos, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    refused = {row["path"]: row["reason"] for row in skipped(tmp_path / "out")}
    assert refused["linked.jpg"] == refused["told.jpg"] == "a link that leaves the folder"
    assert not any(b"a secret" in content for shard in contents(tmp_path / "out").values() for _, content in shard)
