"""Image bytes -> resized uint8 patches: Pillow on the CPU, or DALI on the CPU or GPU.

Both apply EXIF orientation, composite transparency on white, and resize bilinearly with antialiasing.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from genlip_megatron.batch import PATCH_SIZE, PATCH_VALUES
from genlip_megatron.data.index import IMAGE_FORMATS

_JPEG_MAGIC = b"\xff\xd8"


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


class Decoder(Protocol):
    """Decodes many images at once."""

    def __call__(self, tasks: Sequence[ImageTask]) -> list[Tensor | str]:
        """uint8 patches [n, 768] of each image, or why it could not be decoded."""
        ...

    def close(self) -> None:
        """End threads."""
        ...


class PillowDecoder:
    """Decodes with Pillow in threads (its codecs release the interpreter lock)."""

    def __init__(self, num_threads: int) -> None:
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")

    def __call__(self, tasks: Sequence[ImageTask]) -> list[Tensor | str]:
        """uint8 patches [n, 768] of each image on the CPU, or why it could not be decoded."""
        return list(self._pool.map(self._decode, tasks))

    @staticmethod
    def _decode(task: ImageTask) -> Tensor | str:
        try:
            return torch.from_numpy(decode_with_pillow(task))
        except Exception as error:  # any codec error means the same: this image is bad
            return f"image does not decode: {error}"

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)


class DaliDecoder:
    """Decodes JPEG with DALI's dynamic mode, on the CPU or (hardware JPEG included) on the GPU.

    Other formats go through Pillow, which composites transparency. A bad image fails its whole DALI batch: the
    batch is then decoded image by image, so that the bad ones are named and the rest is kept.
    """

    def __init__(self, num_threads: int, device: torch.device) -> None:
        import nvidia.dali.experimental.dynamic as dynamic
        from nvidia.dali import types

        self._dali: Any = dynamic
        self._types: Any = types
        self._dali.set_num_threads(num_threads)
        self._device = "gpu" if device.type == "cuda" else "cpu"
        self._pillow = PillowDecoder(num_threads)
        self._target = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, tasks: Sequence[ImageTask]) -> list[Tensor | str]:
        """uint8 patches [n, 768] of each image on the decoder's device, or why it could not be decoded."""
        if self._stream is None:
            return self._decode_all(tasks)
        # A thread starts on the first GPU, and DALI works on the thread's GPU: the rank's own must be named. On a
        # stream of its own, decoding does not wait for the training step. DALI's buffers are free again once
        # ``results`` exist, so they must be finished by then.
        with torch.cuda.device(self._target), torch.cuda.stream(self._stream):
            results = self._decode_all(tasks)
            self._stream.synchronize()
        for result in results:
            if isinstance(result, Tensor):
                result.record_stream(torch.cuda.default_stream(self._target))
        return results

    def _decode_all(self, tasks: Sequence[ImageTask]) -> list[Tensor | str]:
        jpeg = [i for i, task in enumerate(tasks) if task.content.startswith(_JPEG_MAGIC)]
        other = [i for i in range(len(tasks)) if i not in set(jpeg)]
        results: dict[int, Tensor | str] = {}
        for i, result in zip(other, self._pillow([tasks[i] for i in other]), strict=True):
            results[i] = result if isinstance(result, str) else result.to(self._target)
        for crop in (False, True):
            group = [i for i in jpeg if tasks[i].center_crop == crop]
            results |= zip(group, self._decode([tasks[i] for i in group], crop), strict=True)
        return [results[i] for i in range(len(tasks))]

    def _decode(self, tasks: list[ImageTask], crop: bool) -> list[Tensor | str]:
        if not tasks:
            return []
        try:
            return list(self._batch(tasks, crop))
        except RuntimeError as error:
            if len(tasks) == 1:
                return [f"image does not decode: {error}"]
            return [result for task in tasks for result in self._decode([task], crop)]

    def _batch(self, tasks: list[ImageTask], crop: bool) -> list[Tensor]:
        dali = self._dali
        encoded = dali.batch([np.frombuffer(task.content, np.uint8) for task in tasks])
        sizes = dali.batch([np.array([task.height, task.width], np.float32) for task in tasks])
        # On the GPU the header is parsed on the CPU and the rest decoded on the device.
        pixels = dali.decoders.image(encoded, device=self._device, output_type=self._types.RGB)
        mode = "not_smaller" if crop else "stretch"
        pixels = dali.resize(pixels, size=sizes, mode=mode, interp_type=self._types.INTERP_LINEAR, antialias=True)
        patches = []
        for task, image in zip(tasks, pixels.evaluate().tensors, strict=True):
            tensor = torch.from_dlpack(image) if self._device == "gpu" else torch.from_numpy(np.array(image))
            if crop:
                top, left = (tensor.shape[0] - task.height) // 2, (tensor.shape[1] - task.width) // 2
                tensor = tensor[top : top + task.height, left : left + task.width]
            grid = tensor.reshape(task.height // PATCH_SIZE, PATCH_SIZE, task.width // PATCH_SIZE, PATCH_SIZE, 3)
            patches.append(grid.permute(0, 2, 4, 1, 3).reshape(-1, PATCH_VALUES))
        return patches

    def close(self) -> None:
        """End the threads of the Pillow fallback; DALI's belong to the process."""
        self._pillow.close()


def make_decoder(name: str, num_threads: int, device: torch.device) -> Decoder:
    """The decoder called ``name``; "auto" is DALI on a GPU, and Pillow without one (as fast there, and no start-up).

    Raises:
        ValueError: DALI was asked for, or is needed, but is not installed.
    """
    if name == "pillow" or (name == "auto" and device.type != "cuda"):
        return PillowDecoder(num_threads)
    if importlib.util.find_spec("nvidia.dali") is None:
        raise ValueError(
            f"data.decoder = {name!r}: DALI is not installed; pip install nvidia-dali-cuda130, or use --decoder pillow"
        )
    return DaliDecoder(num_threads, device)
