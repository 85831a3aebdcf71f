"""Image bytes -> resized uint8 patches: Pillow on the CPU, or DALI on the CPU or GPU.

Both apply EXIF orientation, composite transparency on white, and resize bilinearly with antialiasing.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from genlip_megatron.batch import PATCH_SIZE, PATCH_VALUES
from genlip_megatron.data.index import IMAGE_FORMATS


@dataclass(frozen=True)
class ImageTask:
    """An encoded image and the size it is wanted in.

    ``center_crop`` resizes the shorter side to the target first, then crops the middle; else the aspect is ignored.
    """

    content: bytes
    height: int
    width: int
    center_crop: bool = False


def to_patches(pixels: np.ndarray) -> np.ndarray:
    """uint8 [rows * columns, 768] from uint8 [height, width, 3]; each patch as (channel, row, column)."""
    height, width, _ = pixels.shape
    grid = pixels.reshape(height // PATCH_SIZE, PATCH_SIZE, width // PATCH_SIZE, PATCH_SIZE, 3)
    return np.ascontiguousarray(grid.transpose(0, 2, 4, 1, 3)).reshape(-1, PATCH_VALUES)


def open_rgb(content: bytes) -> Image.Image:
    """The image upright in RGB, transparency over white."""
    image: Image.Image = ImageOps.exif_transpose(Image.open(io.BytesIO(content), formats=IMAGE_FORMATS))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(canvas, image)
    return image.convert("RGB")


def decode_with_pillow(task: ImageTask) -> np.ndarray:
    """uint8 patches [n, 768] of one image. Raises whatever Pillow raises on a bad image."""
    image = open_rgb(task.content)
    if task.center_crop:
        scale = max(task.height / image.height, task.width / image.width)
        size = (max(task.width, round(image.width * scale)), max(task.height, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.BILINEAR)
        left, top = (image.width - task.width) // 2, (image.height - task.height) // 2
        image = image.crop((left, top, left + task.width, top + task.height))
    else:
        image = image.resize((task.width, task.height), Image.Resampling.BILINEAR)
    return to_patches(np.asarray(image))


class PillowDecoder:
    """Decodes with Pillow in threads (its codecs release the interpreter lock)."""

    def __init__(self, num_threads: int) -> None:
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")

    def __call__(self, tasks: Sequence[ImageTask]) -> list[np.ndarray | str]:
        """Patches of each image, or why it could not be decoded."""
        return list(self._pool.map(self._decode, tasks))

    @staticmethod
    def _decode(task: ImageTask) -> np.ndarray | str:
        try:
            return decode_with_pillow(task)
        except Exception as error:  # any codec error means the same: this image is bad
            return f"image does not decode: {error}"

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)
