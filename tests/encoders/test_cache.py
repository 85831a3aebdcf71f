"""The feature cache: what a kill leaves is used, anything else is refused."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from genlip_megatron.encoders import cache as cache_module
from genlip_megatron.encoders.cache import FeatureCache
from genlip_megatron.encoders.interface import Features
from genlip_megatron.encoders.others import PixelEncoder


@dataclass(frozen=True)
class Noise:
    number: int
    width: int = 32

    @property
    def stamp(self) -> str:
        return f"{self.number} {self.width}"

    def read(self) -> Image.Image:
        pixels = np.random.default_rng(self.number).integers(0, 256, (16, self.width, 3))
        return Image.fromarray(pixels.astype(np.uint8))


class Counting(PixelEncoder):
    """Counts the images that it encodes, and fails at the image ``last``."""

    def __init__(self, last: int = 1000, **options: Any) -> None:
        super().__init__("pixels", **{"patch": 8, "colour": True, **options})
        self.images, self.last = 0, last

    def encode(self, images: Sequence[Tensor]) -> list[Features]:
        self.images += len(images)
        if self.images > self.last:
            raise KeyboardInterrupt
        return super().encode(images)


IMAGES = [Noise(number, 16 + 8 * (number % 3)) for number in range(10)]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "_PART", 4)


def make(folder: Path, encoder: PixelEncoder, images: Sequence[Noise] = IMAGES, **options: Any) -> FeatureCache:
    return FeatureCache(folder, encoder, images, encoder.to_tensor, "as it is", **options)


def test_every_image_has_the_features_of_the_encoder(tmp_path: Path) -> None:
    encoder = PixelEncoder("pixels", patch=8, colour=True)
    cache = make(tmp_path / "cache", encoder)
    cache.fill(batch_size=3)
    for number in (9, 0, 5, 4, 9):  # any order
        (expected,) = encoder.encode([encoder.to_tensor(IMAGES[number].read())])
        patches, grid = cache[number]
        assert torch.equal(patches, expected.patches) and grid == expected.grid
    assert len(cache) == 10


def test_finished_parts_survive_a_kill_and_half_written_ones_are_not_used(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        make(folder, Counting(last=7)).fill(batch_size=2)
    assert [path.name for path in folder.glob("features*")] == ["features-00000.safetensors"]
    (folder / ".features-00001.safetensors.partial").write_bytes(b"half")
    encoder, done = Counting(), []
    cache = make(folder, encoder)
    cache.fill(batch_size=2, progress=done.append)
    assert encoder.images == 6 and sum(done) == 10
    assert cache[5][0].shape == (2 * 4, 3)


def test_ranks_share_the_parts(tmp_path: Path) -> None:
    encoders = [Counting(), Counting()]
    caches = [make(tmp_path / "cache", encoder) for encoder in encoders]
    for rank, cache in enumerate(caches):
        cache.fill(rank=rank, world_size=2)
    assert [encoder.images for encoder in encoders] == [6, 4]
    assert torch.equal(caches[0][6][0], caches[1][6][0])


def test_dtype_and_pooling(tmp_path: Path) -> None:
    encoder = PixelEncoder("pixels", patch=8, colour=True)
    whole, pooled = make(tmp_path / "a", encoder, dtype=torch.bfloat16), make(tmp_path / "b", encoder, pool=True)
    whole.fill(), pooled.fill()
    assert whole[1][0].dtype == torch.bfloat16 and pooled[1][1] == (1, 1)
    torch.testing.assert_close(whole[1][0].float().mean(0), pooled[1][0][0], rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder": PixelEncoder("other", patch=8)}, "made with another encoder, pixels"),
        ({"images": IMAGES[:9]}, "made with another images, 10, not 9"),
        ({"images": [*IMAGES[:9], Noise(77, 16)]}, "made with another image list"),
        ({"dtype": torch.float16}, "made with another dtype, float32, not float16"),
        ({"pool": True}, "made with another pool"),
    ],
)
def test_another_cache_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    encoder = PixelEncoder("pixels", patch=8, colour=True)
    make(tmp_path / "cache", encoder).fill()
    with pytest.raises(ValueError, match=message):
        make(tmp_path / "cache", **{"encoder": encoder, **change})


def test_a_folder_of_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cache.json").write_text("[]")
    with pytest.raises(ValueError, match="is not that of a feature cache"):
        make(tmp_path, PixelEncoder("pixels", patch=8))
    (tmp_path / "cache.json").rename(tmp_path / "thesis.txt")
    with pytest.raises(ValueError, match="not a feature cache"):
        make(tmp_path, PixelEncoder("pixels", patch=8))


def test_a_small_disk_is_refused_after_the_first_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 100})())
    encoder = Counting()
    with pytest.raises(ValueError, match="needs .* GB, and .* GB are free"):
        make(tmp_path / "cache", encoder).fill(batch_size=2)
    assert encoder.images == 2
