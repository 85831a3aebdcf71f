"""Features on disk, so that a probe computes them once. Finished parts survive a kill; others are computed again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from genlip_megatron import atomic_write
from genlip_megatron.encoders.interface import Encoder

RECORD = "cache.json"
_PART = 512  # images in a file


class CacheImage(Protocol):
    """An image of a data set."""

    @property
    def stamp(self) -> str:
        """Changes when the image may have: its path, size and time of change, or its checksum."""

    def read(self) -> Image.Image:
        """The image.

        Raises:
            ValueError: it cannot be read.
        """


class FeatureCache:
    """Patch features of a list of images, in files of 512 images.

    Args:
        folder: where the files go; it may hold an unfinished cache of the same features.
        encoder: computes them.
        images: the images in order.
        transform: makes an image tensor [3, height, width] of an image.
        transform_name: what the transform is; another one makes other features.
        dtype: of the files.

    Raises:
        ValueError: the folder holds something else, or features of another encoder, transform or list of images.
    """

    def __init__(
        self,
        folder: Path,
        encoder: Encoder,
        images: Sequence[CacheImage],
        transform: Callable[[Image.Image], Tensor],
        transform_name: str,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.folder, self._encoder, self._images = Path(folder), encoder, images
        self._transform, self._dtype = transform, dtype
        digest = hashlib.blake2b(digest_size=16)
        for image in images:
            digest.update(image.stamp.encode() + b"\n")
        record = {
            "encoder": encoder.name,
            "fingerprint": encoder.fingerprint,
            "transform": transform_name,
            "images": len(images),
            "image list": digest.hexdigest(),
            "dtype": str(dtype).removeprefix("torch."),
        }
        self._check(record)
        self.folder.mkdir(parents=True, exist_ok=True)
        atomic_write.write(self.folder / RECORD, json.dumps(record, indent=1))
        self._open: tuple[int, dict[str, Tensor]] = (-1, {})

    def _check(self, record: dict[str, Any]) -> None:
        path = self.folder / RECORD
        if not path.is_file():
            if self.folder.exists() and any(self.folder.iterdir()):
                raise ValueError(f"--cache {self.folder}: not a feature cache. Name a new or empty folder.")
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            differing = [key for key, value in record.items() if key != "encoder" and found[key] != value]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"--cache {self.folder}: its {RECORD} is not that of a feature cache") from None
        if differing:
            key = differing[0]
            raise ValueError(
                f"--cache {self.folder}: made with another {key}, {found[key]}, not {record[key]}. Name another folder."
            )

    def _path(self, part: int) -> Path:
        return self.folder / f"features-{part:05d}.safetensors"

    def fill(self, batch_size: int = 32, progress: Callable[[int], Any] = lambda images: None) -> None:
        """Compute the parts that are missing.

        Args:
            batch_size: images in a batch.
            progress: called with the number of images that each step finished.

        Raises:
            ValueError: an image cannot be read.
        """
        for part in range((len(self._images) + _PART - 1) // _PART):
            chosen = self._images[part * _PART : (part + 1) * _PART]
            if self._path(part).is_file():
                progress(len(chosen))
                continue
            patches, grids = [], []
            for start in range(0, len(chosen), batch_size):
                tensors = [self._transform(image.read()) for image in chosen[start : start + batch_size]]
                with torch.inference_mode():
                    for features in self._encoder.encode(tensors):
                        patches.append(features.patches.to("cpu", self._dtype))
                        grids.append(features.grid)
                progress(len(tensors))
            partial = self._path(part).with_suffix(".partial")
            save_file({"patches": torch.cat(patches), "grids": torch.tensor(grids)}, partial)
            partial.replace(self._path(part))

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, number: int) -> tuple[Tensor, tuple[int, int]]:
        """(features [h * w, D], (h, w)) of one image; consecutive numbers are fast."""
        part, row = divmod(number, _PART)
        if self._open[0] != part:
            self._open = part, load_file(self._path(part))
        tensors = self._open[1]
        counts = tensors["grids"].prod(dim=1)
        start = int(counts[:row].sum())
        rows, columns = tensors["grids"][row].tolist()
        return tensors["patches"][start : start + rows * columns], (rows, columns)
