"""Features on disk, so that a probe computes them once. Finished parts survive a kill; others are computed again."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
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
        pool: keep only the mean over the patches of an image, [1, D].
        read: reads and transforms images of ``images`` by their numbers, in order, perhaps in worker processes; None:
            one by one. An error is a text.

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
        pool: bool = False,
        read: Callable[[Sequence[int]], Iterable[Tensor]] | None = None,
    ) -> None:
        self.folder, self._encoder, self._images = Path(folder), encoder, images
        self._transform, self._dtype, self._pool, self._read = transform, dtype, pool, read
        digest = hashlib.blake2b(digest_size=16)
        for image in images:
            digest.update(image.stamp.encode() + b"\n")
        self._record = {
            "encoder": encoder.name,
            "fingerprint": encoder.fingerprint,
            "transform": transform_name,
            "images": len(images),
            "image list": digest.hexdigest(),
            "dtype": str(dtype).removeprefix("torch."),
            "pool": "mean" if pool else "none",
        }
        self._check(self._record)
        self._open: dict[int, tuple[Any, list[int], list[tuple[int, int]]]] = {}

    def _check(self, record: dict[str, Any]) -> None:
        path = self.folder / RECORD
        if not path.is_file():
            if self.folder.exists() and any(not path.name.startswith(".") for path in self.folder.iterdir()):
                raise ValueError(f"--cache {self.folder}: not a feature cache. Name a new or empty folder.")
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            differing = [key for key, value in record.items() if key != "encoder" and found[key] != value]
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"--cache {self.folder}: its {RECORD} is not that of a feature cache. Name another folder."
            ) from None
        if "fingerprint" in differing:
            raise ValueError(
                f"--cache {self.folder}: made with another encoder, {found['encoder']} with other weights or settings. "
                "Name another folder."
            )
        if differing:
            key = differing[0]
            raise ValueError(
                f"--cache {self.folder}: made with another {key}, {found[key]}, not {record[key]}. Name another folder."
            )

    def _path(self, part: int) -> Path:
        return self.folder / f"features-{part:05d}.safetensors"

    def fill(
        self,
        batch_size: int = 32,
        progress: Callable[[int], Any] = lambda images: None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Compute the parts that are missing.

        Args:
            batch_size: images in a batch.
            progress: called with the number of images that each step finished.
            rank, world_size: this process computes every ``world_size``-th part. The caller waits for the other
                processes, before the call until they have opened the cache, after it until they have filled it.

        Raises:
            ValueError: an image cannot be read, or the disk is too small.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        atomic_write.write(self.folder / RECORD, json.dumps(self._record, indent=1), label=str(rank))
        count = len(self._images)
        parts = {n: range(n * _PART, min((n + 1) * _PART, count)) for n in range(rank, -(-count // _PART), world_size)}
        missing = {part: numbers for part, numbers in parts.items() if not self._path(part).is_file()}
        progress(sum(map(len, parts.values())) - sum(map(len, missing.values())))
        numbers_left = list(itertools.chain.from_iterable(missing.values()))
        # One iterator for all parts: workers read the next part while this one is written.
        ready = iter(self._read(numbers_left) if self._read else map(self._tensor, numbers_left))
        for part, numbers in missing.items():
            patches, grids = [], []
            for start in range(0, len(numbers), batch_size):
                tensors = [next(ready) for _ in range(min(batch_size, len(numbers) - start))]
                with torch.inference_mode():
                    for features in self._encoder.encode(tensors):
                        kept = features.patches.float().mean(0, keepdim=True) if self._pool else features.patches
                        patches.append(kept.to("cpu", self._dtype))
                        grids.append((1, 1) if self._pool else features.grid)
                if numbers[start] == numbers_left[0]:
                    self._check_space(sum(kept.nbytes for kept in patches) / len(patches), len(numbers))
                progress(len(tensors))
            with atomic_write.atomic_path(self._path(part)) as partial:
                save_file({"patches": torch.cat(patches), "grids": torch.tensor(grids)}, partial)

    def _tensor(self, number: int) -> Tensor:
        return self._transform(self._images[number].read())

    def _check_space(self, image_bytes: float, part: int) -> None:
        """Raise ValueError if the parts that are missing do not fit on the disk."""
        missing = sum(not self._path(n).is_file() for n in range((len(self._images) + _PART - 1) // _PART))
        needed, free = missing * part * image_bytes, shutil.disk_usage(self.folder).free
        if needed > free:
            raise ValueError(
                f"--cache {self.folder}: needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free. Name a "
                "folder on a larger disk, use fewer images, or a preset without a cache."
            )

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, number: int) -> tuple[Tensor, tuple[int, int]]:
        """(features [h * w, D], (h, w)) of one image. Only this image is read from the disk."""
        part, row = divmod(number, _PART)
        if part not in self._open:
            file = safe_open(self._path(part), "pt")
            grids = file.get_tensor("grids")
            starts = [0, *grids.prod(dim=1).cumsum(0).tolist()]
            self._open[part] = file, starts, [(rows, columns) for rows, columns in grids.tolist()]
        file, starts, shapes = self._open[part]
        return file.get_slice("patches")[starts[row] : starts[row + 1]], shapes[row]
