"""``tools/probe.py``: a comparison, its resumption, and every kind of bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import probe
import pytest
import torch
from PIL import Image

from genlip_megatron.encoders.interface import Encoder
from tests.evaluate.probes import ade_folders, class_folders


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``train`` and ``val`` of classes, ``images`` and ``annotations``."""
    root = class_folders(tmp_path_factory.mktemp("data"))
    return ade_folders(root)


def classify(data: Path, *flags: str, encoder: str = "colour") -> list[str]:
    command = ["classify", "--encoder", *encoder.split(), "--size", "32", "--workers", "0", "--device", "cpu"]
    return [*command, "--train", str(data / "train"), "--val", str(data / "val"), *flags]


def segment(data: Path, *flags: str) -> list[str]:
    folders = ["--train", str(data / "images" / "training"), "--val", str(data / "images" / "validation")]
    return ["segment", "--encoder", "colour", "--size", "32", "--workers", "0", "--device", "cpu", *folders, *flags]


def test_a_comparison_is_one_table_and_one_picture(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    command = classify(data, "--head", "knn", "--output", str(output), encoder="colour pixels")
    assert probe.main(command) == 0
    printed = capsys.readouterr()
    assert "encoder colour | accuracy 100.0% | held out 100.0%" in printed.out and "00:00" in printed.err
    table = json.loads((output / "results.json").read_text())
    assert [row["settings"]["encoder"] for row in table["encoders"]] == ["colour", "pixels"]
    assert table["classes"] == 3 and "torch" in table["versions"] and table["command"]
    assert all(len(row["settings"]["fingerprint"]) == 32 for row in table["encoders"])
    with Image.open(output / "results.png") as picture:
        assert picture.format == "PNG" and picture.width >= 1000
    monkeypatch.setattr(Encoder, "encode", None)  # finished encoders are not measured again
    assert probe.main(command) == 0
    assert json.loads((output / "results.json").read_text())["encoders"] == table["encoders"]


@pytest.mark.parametrize(
    "flags",
    [("--head", "mean-linear"), ("--preset", "cached"), ("--preset", "aimv2", "--no-rand-augment")],
)
def test_every_trained_protocol_of_classification_runs(flags: tuple[str, ...], data: Path, tmp_path: Path) -> None:
    short = ("--max-steps", "3", "--batch-size", "8", "--output", str(tmp_path / "out"))
    assert probe.main(classify(data, *flags, *short)) == 0
    row = json.loads((tmp_path / "out" / "results.json").read_text())["encoders"][0]
    assert row["steps"] == 3 and 0 <= row["accuracy"] <= 1 and row["settings"]["protocol"] == flags[1]


def test_without_augmentation_features_are_computed_once(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    encode = Encoder.encode

    def counted(self: Encoder, images: Any) -> Any:
        seen.append(len(images))
        return encode(self, images)

    monkeypatch.setattr(Encoder, "encode", counted)
    flags = ("--head", "mean-linear", "--no-augment", "--max-steps", "20", "--batch-size", "8")
    assert probe.main(classify(data, *flags, "--output", str(tmp_path / "out"))) == 0
    row = json.loads((tmp_path / "out" / "results.json").read_text())["encoders"][0]
    assert sum(seen) == row["train_images"] + row["held_out_images"] + row["val_images"]
    assert row["settings"]["augment"] is False


def test_options_without_effect_are_refused(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command, words in (
        (classify(data, "--head", "knn", "--no-augment"), "--no-augment: knn has no augmentation"),
        (segment(data, "--preset", "knn-capi", "--max-steps", "3"), "--preset knn-capi: trains nothing"),
        (segment(data, "--cache", "x"), "--preset dinov2: computes features for each step"),
        (classify(data, "--cache-dtype", "bf16"), "capi: computes features for each step"),
        (classify(data, "--preset", "cached", "--no-rand-augment"), "--no-rand-augment: only --preset aimv2"),
    ):
        assert probe.main([*command, "--output", "unused"]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("preset", ["dinov2", "knn-capi"])
def test_segmentation_runs(preset: str, data: Path, tmp_path: Path) -> None:
    short = ("--max-steps", "3", "--batch-size", "4") if preset == "dinov2" else ()
    assert probe.main(segment(data, "--preset", preset, *short, "--output", str(tmp_path / "out"))) == 0
    row = json.loads((tmp_path / "out" / "results.json").read_text())["encoders"][0]
    assert 0 < row["miou"] <= 1 and len(row["iou"]) == 3


def _flat(root: Path) -> None:
    for number, path in enumerate(sorted((root / "train").rglob("*.png"))):
        path.rename(root / "train" / f"{number}.png")
    for folder in (root / "train").glob("*/"):
        folder.rmdir() if folder.is_dir() else None


def _one_class(root: Path) -> None:
    for part in ("train", "val"):
        for name in ("green", "red"):
            (root / part / name).rename(root / f"{part}-{name}")


def _empty_class(root: Path) -> None:
    (root / "train" / "pink").mkdir()


def _unknown_class(root: Path) -> None:
    (root / "val" / "red").rename(root / "val" / "pink")


def _table(rows: str) -> None:
    return lambda root: (root / "train.csv").write_text(f"image,label\n{rows}")  # type: ignore[return-value]


def _no_mask(root: Path) -> None:
    (root / "annotations" / "training" / "3.png").unlink()


def _high_label(root: Path) -> None:
    Image.fromarray(np.full((40, 52), 9, np.uint8)).save(root / "annotations" / "validation" / "1.png")


def _one_mask_class(root: Path) -> None:
    for path in (root / "annotations" / "training").iterdir():
        Image.fromarray(np.full((40, 52), 1, np.uint8)).save(path)


def _colour_mask(root: Path) -> None:
    Image.new("RGB", (52, 40)).save(root / "annotations" / "training" / "1.png")


def _other_cache(root: Path) -> None:
    folder = root / "cache" / "colour" / "train"
    folder.mkdir(parents=True)
    keys = ("encoder", "fingerprint", "transform", "images", "image list", "dtype", "pool")
    (folder / "cache.json").write_text(json.dumps({**dict.fromkeys(keys, "x"), "encoder": "runs/old"}))


TABLE = ("--train", "train.csv")
BAD = {
    "no classes": (_flat, (), "a folder without classes. Put the images of each class into a subfolder"),
    "one class": (_one_class, (), "only one class, blue"),
    "an empty class": (_empty_class, (), "class folder pink holds no image"),
    "a class of only the validation data": (_unknown_class, (), "has label pink, outside the 3 classes of --train"),
    "a missing label": (_table("train/red/0.png,\n"), TABLE, "row 1 has no label"),
    "a negative label": (
        _table("train/red/0.png,-1\ntrain/red/1.png,1\n"),
        TABLE,
        "has label -1. Number classes from 0",
    ),
    "a missing image": (_table("train/red/99.png,0\n"), TABLE, "names train/red/99.png, which does not exist"),
    "no such column": (_table("train/red/0.png,0\n"), (*TABLE, "--label-column", "class"), "no column class, only"),
    "no such data": (None, ("--train", "nowhere"), "--train nowhere: no such folder or table"),
    "no such encoder": (None, ("--encoder", "nowhere"), "--encoder nowhere: no such folder"),
    "a hub name offline": (None, ("--encoder", "hf:google/siglip"), "Without a network, name a folder"),
    "unequal grids": (None, ("--encoder", "colour", "pixels", "--size", "32", "64"), "unequal grids of patches"),
    "a size without whole patches": (None, ("--size", "40"), "no whole number of 16 x 16 patches"),
    "too many sizes": (None, ("--size", "32", "64"), "2 sizes for 1 encoders"),
    "an encoder twice": (None, ("--encoder", "colour", "colour"), "two of the same name"),
    "a preset of another head": (None, ("--head", "knn", "--preset", "capi"), "--preset capi: works only with"),
    "another encoder's cache": (_other_cache, ("--preset", "cached", "--cache", "cache"), "another encoder, runs/old"),
    "a negative number": (None, ("--max-steps", "-1"), "--max-steps -1: must be at least 0"),
    "no RandAugment": (None, ("--preset", "aimv2"), "RandAugment needs timm"),
}
BAD_MASKS = {
    "a missing mask": (_no_mask, (), "3.png has no mask"),
    "a label outside the range": (_high_label, (), "has label 9, outside the 3 classes of --train"),
    "one class": (_one_mask_class, (), "its masks hold 1 classes"),
    "a mask of three channels": (_colour_mask, (), "a mask needs one 8-bit number for each pixel"),
    "no images folder": (None, ("--train", "annotations"), "no part of the path is named images"),
}


@pytest.mark.parametrize("case", [*BAD, *(f"masks: {name}" for name in BAD_MASKS)])
def test_bad_input_is_one_line_before_any_feature_is_computed(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    masks = case.startswith("masks: ")
    change, flags, message = BAD_MASKS[case.removeprefix("masks: ")] if masks else BAD[case]
    if case == "no RandAugment":
        monkeypatch.setitem(sys.modules, "timm", None)
        monkeypatch.setitem(sys.modules, "timm.data.auto_augment", None)
    ade_folders(tmp_path / "data") if masks else class_folders(tmp_path / "data", 4, 1)
    if change is not None:
        change(tmp_path / "data")
    monkeypatch.chdir(tmp_path / "data")
    monkeypatch.setattr(Encoder, "encode", None)
    make = segment if masks else classify
    assert probe.main(make(Path(), "--output", str(tmp_path / "out"), *flags)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("probe.py: error: ") and message in error


def test_an_output_of_other_settings_is_refused(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert probe.main(classify(data, "--head", "knn", "--output", str(tmp_path))) == 0
    assert probe.main(classify(data, "--head", "knn", "--seed", "1", "--output", str(tmp_path))) == 2
    assert "holds a probe with another seed, 0, not 1" in capsys.readouterr().err
    assert probe.main(classify(data, "--head", "knn", "--cache-dtype", "bf16", "--output", str(tmp_path))) == 2
    assert "holds a probe with another cache_dtype, float32, not bfloat16" in capsys.readouterr().err


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """A process with one thread, so that its sums have one order."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, check=True, env=environment, timeout=300, capture_output=True, text=True)


def scores(output: Path) -> dict[str, Any]:
    """What a probe of one encoder found."""
    (row,) = json.loads((output / "results.json").read_text())["encoders"]
    return {key: value for key, value in row.items() if key != "seconds"}


TRAINED = {"classify": classify, "segment": segment}


@pytest.mark.slow
@pytest.mark.parametrize("task", TRAINED)
def test_two_ranks_of_torchrun_find_what_one_process_finds(task: str, data: Path, tmp_path: Path) -> None:
    command = [probe.__file__, *TRAINED[task](data, "--max-steps", "4", "--batch-size", "8", "--workers", "2")]
    run(sys.executable, *command, "--output", str(tmp_path / "1"))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run(sys.executable, *launch, *command, "--output", str(tmp_path / "2"))
    assert scores(tmp_path / "2") == scores(tmp_path / "1")


@pytest.mark.slow
@pytest.mark.parametrize("task", TRAINED)
def test_a_killed_process_that_is_run_again_finds_what_an_unbroken_one_finds(
    task: str, data: Path, tmp_path: Path
) -> None:
    flags = ("--max-steps", "60", "--batch-size", "4", "--workers", "2")
    command = [sys.executable, probe.__file__, *TRAINED[task](data, *flags)]
    run(*command, "--output", str(tmp_path / "whole"))
    killed = [*command, "--save-interval", "1", "--output", str(tmp_path / "killed")]
    state = tmp_path / "killed" / "colour" / "state.pt"
    with subprocess.Popen(killed, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True) as process:
        while not state.exists() and process.poll() is None:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert 0 < torch.load(state)["step"] < 60 and not (state.parent / "result.json").exists()
    assert " 0/60 " not in run(*killed).stderr  # it did not start from the beginning
    assert scores(tmp_path / "killed") == scores(tmp_path / "whole")
    assert not state.exists()
