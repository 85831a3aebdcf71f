"""Preparing a data set at once, in parts or after a kill gives the same files and a complete report."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from genlip_megatron.config import DataConfig
from genlip_megatron.data.dataset import Dataset, open_dataset
from genlip_megatron.data.index import PLAN_ROW
from genlip_megatron.tokenizer import load_tokenizer
from tests.data.shards import CAPTION, many, write_shard

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five shards, one with a bad sample."""
    data = tmp_path / "data"
    data.mkdir()
    for i in range(5):
        bad = {"bad.jpg": b"garbage", "bad.json": CAPTION} if i == 2 else {}
        write_shard(data / f"part-{i:05d}.tar", many(6, 10 * i) | bad)
    return data


@pytest.fixture
def prepare(demo_data: Path) -> Callable[..., str]:
    """Run the tool with the demo's tokenizer; returns its output, or the last line of its errors."""

    def run(*words: object, status: int = 0) -> str:
        command = [sys.executable, "tools/prepare_data.py", *words, "--tokenizer", demo_data / "tokenizer.model"]
        done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == status, done.stderr
        return done.stdout if status == 0 else done.stderr.splitlines()[-1]

    return run


@pytest.fixture
def opened(demo_data: Path) -> Callable[..., Dataset]:
    fingerprint = load_tokenizer(demo_data / "tokenizer.model").fingerprint
    return lambda *paths, **data: open_dataset(list(map(str, paths)), DataConfig(**data), fingerprint, "S")


def files(folder: Path) -> dict[str, bytes]:
    """{name: content} of all files that preparing wrote."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".tar"}


def test_shards_of_several_splits_in_one_manifest_are_a_warning(prepare: Any, folder: Path) -> None:
    assert "WARNING" not in prepare(folder)
    write_shard(folder / "val-00000.tar", many(3, 100))
    assert prepare(folder).splitlines()[-1] == (
        f"WARNING: the shards have 2 prefixes: part (5 shards), val (1), and {folder}/dataset.json lists them all. If "
        "one is for validation, index each split by its own glob, such as 'shards/train-*.tar'"
    )
    assert "WARNING" not in prepare(f"{folder}/val-*.tar")


def test_report_manifest_and_quarantine(prepare: Any, folder: Path, demo_data: Path) -> None:
    printed = prepare(folder, "--seq-length", 190)
    assert "5 shards (0 unchanged)" in printed and "30 good samples, 1 refused" in printed
    assert "refused 1: image does not decode" in printed
    for title in ("image height in pixels:", "image width in pixels:", "text tokens:", "packs of 190 tokens", "fill "):
        assert title in printed
    assert (
        "stage 1, 224x224: data.seq_length = 190: an image of 196 patches and its closing tokens do not fit" in printed
    )
    (line,) = (folder / "part.quarantine.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert record["shard"] == str(folder / "part-00002.tar") and record["key"] == "bad"
    assert record["reason"].startswith("image does not decode")
    manifest = json.loads((folder / "part.dataset.json").read_text())
    assert manifest["samples"] == 30 and [shard["samples"] for shard in manifest["shards"]] == [6] * 5
    assert manifest["tokenizer"] == load_tokenizer(demo_data / "tokenizer.model").fingerprint
    plan = np.fromfile(folder / "part.dataset.plan", PLAN_ROW)
    assert len(plan) == 30 and plan.itemsize == 8 and set(plan["width"]) == {32, 48, 64, 80, 96}


@pytest.mark.slow
def test_unchanged_shards_are_skipped_by_time_or_checksum(prepare: Any, folder: Path) -> None:
    prepare(folder)
    before = files(folder)
    assert "(5 unchanged)" in prepare(folder)
    assert files(folder) == before
    os.utime(folder / "part-00000.tar")
    assert "(5 unchanged)" in prepare(folder)
    shard = folder / "part-00001.tar"
    content = shard.read_bytes()
    shard.write_bytes(content.replace(b"One red circle.", b"Two red circles", 1))
    assert len(content) == shard.stat().st_size
    assert "(4 unchanged)" in prepare(folder)
    assert "(0 unchanged)" in prepare(folder, "--prompt", "Look.")


@pytest.mark.slow
def test_parts_write_the_same_files_as_one_call(prepare: Any, folder: Path, tmp_path: Path) -> None:
    whole = shutil.copytree(folder, tmp_path / "whole", copy_function=shutil.copy2)
    prepare(whole)
    for i in range(2):
        printed = prepare(folder, "--part", f"{i}/2")
        assert f"{3 - i} shards (0 unchanged)" in printed and not (folder / "part.dataset.json").exists()
    assert "(5 unchanged)" in prepare(folder)
    ours, expected = files(folder), files(whole)
    ours.pop("part.quarantine.jsonl"), expected.pop("part.quarantine.jsonl")  # names its folder
    assert ours == expected


def test_a_killed_run_continues_where_it_stopped(prepare: Any, folder: Path, demo_data: Path, tmp_path: Path) -> None:
    whole = shutil.copytree(folder, tmp_path / "whole", copy_function=shutil.copy2)
    prepare(whole)
    tokenizer = str(demo_data / "tokenizer.model")
    command = [sys.executable, "tools/prepare_data.py", str(folder), "--tokenizer", tokenizer, "--workers", "1"]
    process = subprocess.Popen(
        command, cwd=ROOT, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    while not list(folder.glob("*.index.safetensors")) and process.poll() is None:
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    # Leftover of a killed write.
    leftover = folder / ".part-00004.tar.index.safetensors.1.partial"
    leftover.write_bytes(b"half")
    os.utime(leftover, (0, 0))  # a recent one may belong to a running process
    assert not (folder / "part.dataset.json").exists()
    printed = prepare(folder)
    assert "(0 unchanged)" not in printed
    ours, expected = files(folder), files(whole)
    ours.pop("part.quarantine.jsonl"), expected.pop("part.quarantine.jsonl")
    assert ours == expected


def test_manifest_and_shards_by_name_are_the_same_data(prepare: Any, opened: Any, folder: Path, tmp_path: Path) -> None:
    prepare(folder, "--manifest", tmp_path / "all.dataset.json")
    data = {"image_mode": "native", "cache_dir": str(tmp_path / "cache")}
    by_name, by_manifest = opened(folder, **data), opened(tmp_path / "all.dataset.json", **data)
    mixed = opened(folder / "part-00000.tar", tmp_path / "all.dataset.json", **data)
    assert by_name.fingerprint == by_manifest.fingerprint != mixed.fingerprint
    ids = np.arange(30)
    assert (by_name.lengths(ids) == by_manifest.lengths(ids)).all()
    assert [by_name.key(i) for i in ids] == [by_manifest.key(i) for i in ids]
    # Six samples come before the manifest's thirty.
    assert len(mixed) == 36 and (mixed.lengths(ids[::-1] + 6) == by_name.lengths(ids)[::-1]).all()
    assert mixed.key(35) == by_name.key(29)


def flip(path: Path) -> None:
    """Change one bit."""
    content = bytearray(path.read_bytes())
    content[9] ^= 2
    path.write_bytes(content)


def without_a_shard(path: Path) -> None:
    """Remove a shard from a manifest."""
    tree = json.loads(path.read_text())
    del tree["shards"][1]
    path.write_text(json.dumps(tree))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "part.dataset.plan").unlink(), "is missing or does not hold 30 samples"),
        (lambda folder: os.truncate(folder / "part.dataset.plan", 8), "is missing or does not hold 30 samples"),
        (lambda folder: flip(folder / "part.dataset.plan"), "checksum differs from the manifest's"),
        (lambda folder: without_a_shard(folder / "part.dataset.json"), "its shards' samples do not add up"),
        (lambda folder: (folder / "part.dataset.json").write_text("[]"), "is not a manifest of tools/prepare_data.py"),
        (lambda folder: (folder / "part.dataset.json").unlink(), "no such manifest. tools/prepare_data.py writes it"),
    ],
)
@pytest.mark.slow
def test_a_damaged_manifest_is_refused(damage: object, message: str, prepare: Any, opened: Any, folder: Path) -> None:
    prepare(folder)
    damage(folder)  # type: ignore[operator]
    with pytest.raises(ValueError, match=message):
        opened(folder / "part.dataset.json")


@pytest.mark.parametrize("samples", ["more", "others of the same sizes"])
def test_an_index_that_changed_after_the_manifest_is_refused(
    samples: str, prepare: Any, opened: Any, folder: Path
) -> None:
    prepare(folder)
    renamed = {f"x{name}": content for name, content in many(6, 30).items()}
    write_shard(folder / "part-00003.tar", many(7) if samples == "more" else renamed)
    printed = prepare(folder / "part-00003.tar")
    assert "part.dataset.json stays unchanged: it lists 4 other shards. Name all shards" in printed
    dataset = opened(folder / "part.dataset.json")
    assert len(dataset.index(2).rows) == 6
    with pytest.raises(ValueError, match="changed since the manifest was written. Run tools/prepare_data.py again"):
        dataset.index(3)
    assert dataset.key(20) == "(sample 2)"


def test_a_restored_index_is_read_again(
    prepare: Any, opened: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(folder)
    dataset = opened(folder / "part.dataset.json")
    (folder / "part-00001.tar.index.safetensors").rename(folder / "away")
    for _ in range(2):
        with pytest.raises(ValueError, match="has no index"):
            dataset.index(1)
    (folder / "away").rename(folder / "part-00001.tar.index.safetensors")
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 31)
    assert len(dataset.index(1).rows) == 6


def test_an_unusable_shard_does_not_stop_the_others(prepare: Any, folder: Path, demo_data: Path) -> None:
    (folder / "part-00001.tar").write_bytes(b"")
    printed = prepare(folder)
    assert "24 good samples, 2 refused" in printed and "refused 1: empty file" in printed
    for written in folder.glob("part.*"):
        written.unlink()
    (folder / "part-00005.tar").write_bytes(gzip.compress(b"x" * 5000))
    (folder / "part-00006.tar").write_bytes(bytes(10240))
    (folder / "part-00007.tar").symlink_to(folder / "nowhere")
    shards = f"{folder}/part-0000[0-7].tar"
    words = [sys.executable, "tools/prepare_data.py", shards, "--tokenizer", demo_data / "tokenizer.model"]
    for _ in range(2):  # in the second run the others are unchanged
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1
        assert "3 shards could not be indexed. Run it again for them, or skip them with --skip-unrea" in done.stderr
        assert "part-00005.tar is not a tar file but gzip: compressed shards are not supported" in done.stdout
        assert "part-00006.tar is not a tar file but only zeros" in done.stdout
        assert not (folder / "part.dataset.json").exists()
    assert "24 good samples" in prepare(shards, "--skip-unreadable")
    records = [json.loads(line) for line in (folder / "part.quarantine.jsonl").read_text().splitlines()]
    lost = {Path(record["shard"]).name for record in records if record["key"] == "(shard)"}
    assert lost == {f"part-0000{i}.tar" for i in (1, 5, 6, 7)}
    message = prepare(f"{folder}/part-0000[5-7].tar", "--skip-unreadable", status=1)
    assert "none of the 3 shards can be read" in message


def test_the_report_names_the_shards_that_lost_most(prepare: Any, folder: Path) -> None:
    (folder / "part-00005.tar").write_bytes(b"")
    write_shard(folder / "part-00006.tar", {"0.cls": b"3"})
    write_shard(folder / "part-00007.tar", many(4) | {f"{i}.jpg": b"x" for i in range(9)})
    with tarfile.open(folder / "part-00001.tar") as archive:
        third = archive.getmember("0012.jpg").offset
    os.truncate(folder / "part-00001.tar", third)
    for i in range(8, 30):
        write_shard(folder / f"part-{i:05d}.tar", many(1, i) | {"x.jpg": b"x"})
    lines = prepare(folder).splitlines()
    first = lines.index("27 of 30 shards lost samples, the worst first:") + 1
    names = [line.split("part-")[1][:5] for line in lines[first : first + 5]]
    assert names[:4] == ["00006", "00005", "00001", "00007"]
    assert "0 good samples, 1 refused (1 no sample)" in lines[first]
    assert "4 good samples, 9 refused (9 missing caption)" in lines[first + 3]
    assert "and 7 more; see " in lines[first + 20] and lines[first + 21].endswith("written")


def test_a_manifest_follows_its_shards_when_one_is_deleted(prepare: Any, folder: Path) -> None:
    prepare(folder)
    (folder / "part-00004.tar").unlink()
    assert "24 good samples" in prepare(folder)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["/nowhere"], "'/nowhere' matches no .tar file"),
        (["DATA", "--part", "2/2"], "expected i/n with 0 <= i < n"),
        (["DATA", "--workers", "0"], "must be at least 1"),
        (["DATA", "--manifest", "x.txt"], "must end in .json"),
        (["nowhere://x"], "nowhere:// cannot be read"),
    ],
)
def test_a_user_error_is_one_line(words: list[str], message: str, prepare: Any, folder: Path) -> None:
    words = [str(folder) if word == "DATA" else word for word in words]
    assert message in prepare(*words, status=2)
    assert not list(folder.glob("*.index*"))
