"""Every layout gives the same images and classes."""

from __future__ import annotations

import csv
import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from genlip_megatron.evaluate import labelled
from tests.evaluate.probes import COLOURS, ade_folders, class_folders

NAMES = sorted(COLOURS)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders, and the same images as shards and tables."""
    root = class_folders(tmp_path_factory.mktemp("classes"), 3, 2)
    files = sorted((root / "train").rglob("*.png"))
    with tarfile.open(root / "train-0.tar", "w") as tar, open(root / "train.csv", "w", newline="") as table:
        rows = csv.writer(table)
        rows.writerow(["file", "class"])
        for number, file in enumerate(files):
            members = ("png", file.read_bytes()), ("cls", str(NAMES.index(file.parent.name)).encode())
            for kind, content in members:
                member = tarfile.TarInfo(f"x/{number:03d}.{kind}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            rows.writerow([file.relative_to(root), file.parent.name])
    columns = {
        "image": [{"bytes": file.read_bytes(), "path": file.name} for file in files],
        "label": [NAMES.index(file.parent.name) for file in files],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), root / "train.parquet")
    return root


def test_all_layouts_hold_the_same(data: Path) -> None:
    folders, names = labelled.read_classes([str(data / "train")], "--train")
    assert names == NAMES and [sample.label for sample in folders] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    others = [
        labelled.read_classes([str(data / "train-*.tar")], "--train"),
        labelled.read_classes([str(data / "train.csv")], "--train", "file", "class"),
        labelled.read_classes([str(data / "train.parquet")], "--train"),
    ]
    assert [names for _, names in others] == [["0", "1", "2"], NAMES, ["0", "1", "2"]]
    for samples, _ in others:
        assert [sample.label for sample in samples] == [sample.label for sample in folders]
        for one, other in zip(samples, folders, strict=True):
            assert np.array_equal(np.asarray(one.read()), np.asarray(other.read()))


def test_validation_data_use_the_classes_of_the_training_data(data: Path) -> None:
    val, _ = labelled.read_classes([str(data / "val")], "--val", known=NAMES)
    assert [sample.label for sample in val] == [0, 0, 1, 1, 2, 2]


def test_stamps_change_with_the_file_and_the_label(data: Path) -> None:
    samples, _ = labelled.read_classes([str(data / "train")], "--train")
    changed = labelled.Labelled(samples[0].image, 2)
    assert len({sample.stamp for sample in (*samples, changed)}) == len(samples) + 1


def test_per_class_takes_some_of_each(data: Path) -> None:
    samples, _ = labelled.read_classes([str(data / "train")], "--train")
    assert [sample.label for sample in labelled.per_class(samples, 2, 0)] == [0, 0, 1, 1, 2, 2]
    assert labelled.per_class(samples, 0, 0) == samples


def test_held_out_images_are_a_tenth_and_never_trained_on() -> None:
    train, selection = labelled.held_out(205)
    assert len(selection) == 21 and sorted([*train, *selection]) == list(range(205))


def test_masks_of_folders_and_shards(tmp_path: Path) -> None:
    root = ade_folders(tmp_path, 2, 1)
    folders = labelled.read_masks([str(root / "images" / "training")], "--train")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number, sample in enumerate(folders):
            tar.add(sample.image.path, f"{number}.png")
            tar.add(sample.mask.path, f"{number}.seg.png")
    shards = labelled.read_masks([str(tmp_path / "a.tar")], "--train")
    for one, other in zip(folders, shards, strict=True):
        mask = one.mask.read_mask(True)
        assert np.array_equal(mask, other.mask.read_mask(True)) and set(np.unique(mask)) == {0, 1, 2, 255}
        assert np.array_equal(np.asarray(one.read()), np.asarray(other.read()))
    assert labelled.check_masks(folders, "--train", True, None) == 3
    assert labelled.check_masks(folders, "--train", False, None) == 4
    turned = Image.fromarray(np.zeros((52, 40, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: on its side
    turned.save(folders[1].image.path, "JPEG", exif=exif)
    assert folders[1].image.shape() == folders[1].read().size[::-1] == (40, 52)
    assert labelled.check_masks(folders, "--train", True, None) == 3
    turned.save(folders[1].image.path, "JPEG")
    with pytest.raises(ValueError, match=r"--train: .*1\.png: a mask of 52x40 pixels, but its image has 40x52"):
        labelled.check_masks(folders, "--train", True, None)


def test_one_class_is_too_few_for_any_tool(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "cat" / "0.png")
    with pytest.raises(ValueError, match=r"DATA .*: only one class, cat\. Two or more are needed"):
        labelled.read_classes([str(tmp_path)], "DATA")
