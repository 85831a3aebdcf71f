"""Data sets from packages: which pictures are photographs, what is a class, and masks that match their scenes."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from genlip_megatron.evaluate import real_data


@pytest.fixture
def stamps(tmp_path: Path) -> Path:
    """24 photographs of animals, 21 of food, one drawing, and three photographs of space."""
    rng = np.random.default_rng(0)
    for name, count in (("animals", 24), ("food", 21), ("space", 3)):
        folder = tmp_path / name / "some"
        folder.mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 256, (60, 50, 4), dtype=np.uint8)
            pixels[..., 3] = 255
            pixels[:10, :, 3] = 0
            Image.fromarray(pixels).save(folder / f"{number}.png")
            (folder / f"{number}.txt").write_text(f"A {name} number {number}.\nes.utf8=Otra.", encoding="utf-8")
    Image.new("RGBA", (60, 50), "red").save(tmp_path / "animals" / "drawing.png")
    return tmp_path


def test_photographs_and_captions(stamps: Path) -> None:
    assert {name: len(found) for name, found in real_data.photographs(stamps).items()} == {"animals": 24, "food": 21}
    assert real_data.stamps(stamps)[0][1:] == ("animals", "A animals number 0.")
    assert len(real_data.stamps(stamps)) == 48  # the drawing has no caption


def test_folds_share_no_picture_and_hold_all(stamps: Path, tmp_path: Path) -> None:
    folds = real_data.write_folds(real_data.photographs(stamps), tmp_path / "folds", 4, 32)
    held = []
    for train, val in folds:
        inside, outside = ({path.relative_to(part) for path in part.rglob("*.png")} for part in (train, val))
        assert not inside & outside and len(inside | outside) == 45
        held += list(outside)
    assert len(held) == len(set(held)) == 45


def test_masks_match_their_scenes(stamps: Path, tmp_path: Path) -> None:
    train, val = real_data.write_scenes(real_data.photographs(stamps), tmp_path / "scenes", 6, 3, size=96)
    for part, count in ((train, 6), (val, 3)):
        images = sorted(part.iterdir())
        assert len(images) == count
        for path in images:
            mask = np.asarray(Image.open(tmp_path / "scenes/annotations" / part.name / path.name))
            assert set(np.unique(mask)) <= {1, 2, 3} and 0.02 < (mask > 1).mean() < 0.9


def test_clothes_have_their_captions(tmp_path: Path) -> None:
    pixels, labels = np.arange(3 * 784, dtype=np.int64).astype(np.uint8), np.array([7, 0, 9], np.uint8)
    for kind, header, content in (("images-idx3", 16, pixels), ("labels-idx1", 8, labels)):
        (tmp_path / f"train-{kind}-ubyte.gz").write_bytes(gzip.compress(bytes(header) + content.tobytes()))
    samples = real_data.fashion(tmp_path, "train", 2)
    assert [label for _, label in samples] == [7, 0]
    np.testing.assert_array_equal(np.asarray(samples[1][0]), pixels[784:1568].reshape(28, 28))
    table = real_data.write_captions(real_data.fashion_captions(samples, 32), tmp_path / "table")
    rows = list(csv.reader(table.open(encoding="utf-8")))
    assert rows[1:] == [["00000.png", "A photo of a sneaker."], ["00001.png", "A photo of a t-shirt."]]
    assert Image.open(tmp_path / "table/00000.png").size == (32, 32)
