"""Image bytes -> resized uint8 patches, in CPU threads or with DALI on the CPU or GPU.

Every decoder resizes bilinearly with antialiasing, as Pillow does. ``image.py`` converts unusual images to RGB.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor

from genlip_megatron.batch import PATCH_SIZE, PATCH_VALUES
from genlip_megatron.data.image import decode_rgb

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageTask:
    """An encoded image and its target size.

    ``center_crop`` scales the image to cover the target, then crops the middle; otherwise the aspect ratio is ignored.
    ``plain_jpeg`` says that the index found an upright RGB or grey JPEG.
    """

    content: bytes | memoryview
    height: int
    width: int
    center_crop: bool = False
    plain_jpeg: bool = False


def to_patches(pixels: np.ndarray) -> np.ndarray:
    """uint8 [rows * columns, 768] from uint8 [height, width, 3]; each patch as (channel, row, column)."""
    height, width, _ = pixels.shape
    grid = pixels.reshape(height // PATCH_SIZE, PATCH_SIZE, width // PATCH_SIZE, PATCH_SIZE, 3)
    return np.ascontiguousarray(grid.transpose(0, 2, 4, 1, 3)).reshape(-1, PATCH_VALUES)


@functools.lru_cache(maxsize=512)
def _runs(rows: int, columns: int) -> np.ndarray:
    """int64 [rows * columns * 16]: for each pixel row of each patch its number among the image's runs of 16 pixels."""
    patch_row, column, line = np.ogrid[:rows, :columns, :PATCH_SIZE]
    return ((patch_row * PATCH_SIZE + line) * columns + column).ravel()


def many_to_patches(images: Sequence[Tensor]) -> list[Tensor]:
    """``to_patches`` of many images [height, width, 3] of any sizes, with three kernels in total.

    A pixel row of a patch is a run of 48 bytes in its image, so all patches are one gather of runs.
    """
    if not images:
        return []
    grids = [(image.shape[0] // PATCH_SIZE, image.shape[1] // PATCH_SIZE) for image in images]
    runs = [_runs(*grid) for grid in grids]
    first = np.cumsum([0, *map(len, runs)])
    places = torch.from_numpy(np.concatenate([run + start for run, start in zip(runs, first[:-1], strict=True)]))
    pixels = torch.cat([image.reshape(-1, PATCH_SIZE * 3) for image in images])
    gathered = pixels.index_select(0, places.to(pixels.device)).view(-1, PATCH_SIZE, PATCH_SIZE, 3)
    patches = gathered.permute(0, 3, 1, 2).reshape(-1, PATCH_VALUES)
    return list(patches.split([rows * columns for rows, columns in grids]))


def _scaled_size(height: int, width: int, task: ImageTask) -> tuple[int, int]:
    """(height, width) to scale an image of this size to: the target or, with a crop, the smallest that covers it."""
    if not task.center_crop:
        return task.height, task.width
    scale = max(task.height / height, task.width / width)
    return max(task.height, round(height * scale)), max(task.width, round(width * scale))


def _resized(pixels: np.ndarray, size: tuple[int, int], plain: bool) -> np.ndarray:
    """uint8 [*size, 3] by an antialiased bilinear filter: Pillow's (``plain``), the reference for every decoder, or
    torch's vectorised kernel, four times as fast and at most two levels from Pillow's result.
    """
    if pixels.shape[:2] == size:
        return pixels
    if plain:
        return np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BILINEAR))
    # [1, 3, H, W], channels last in memory, is torch's fast path. torch.from_numpy wants writable memory.
    image = torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy()).permute(2, 0, 1)[None]
    scaled = torch.nn.functional.interpolate(image, size=size, mode="bilinear", antialias=True)
    return scaled[0].permute(1, 2, 0).numpy()


class CpuDecoder:
    """Decodes in threads (codecs release the GIL), with libjpeg-turbo and torch, or (``plain``) with Pillow."""

    def __init__(self, num_threads: int, plain: bool = False) -> None:
        self._plain = plain
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")

    def __call__(self, tasks: Sequence[ImageTask]) -> list[Tensor | str]:
        """uint8 patches [n, 768] of each image on the CPU, or the error."""
        return list(self._pool.map(self._decode, tasks))

    def _decode(self, task: ImageTask) -> Tensor | str:
        try:
            pixels = decode_rgb(task.content, task.plain_jpeg and not self._plain)
            size = _scaled_size(pixels.shape[0], pixels.shape[1], task)
            top, left = (size[0] - task.height) // 2, (size[1] - task.width) // 2
            middle = _resized(pixels, size, self._plain)[top : top + task.height, left : left + task.width]
            return torch.from_numpy(to_patches(middle))
        except ValueError as error:
            return str(error)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _sound_header(content: bytes | memoryview) -> bool:
    """Whether a JPEG's header can be read. DALI 2.4 crashes (segmentation fault) on one that cannot."""
    try:
        simplejpeg.decode_jpeg_header(content)
    except ValueError:
        return False
    return True


class DaliDecoder:
    """Decodes plain JPEG with DALI's dynamic mode, on the CPU or on the GPU (with hardware JPEG).

    Other images go to the CPU decoder, which handles transparency, CMYK and so on. One bad image fails its whole DALI
    batch; the batch is then decoded in halves, down to the bad images, so that the others are kept.
    """

    def __init__(self, num_threads: int, device: torch.device) -> None:
        import nvidia.dali.experimental.dynamic as dynamic
        from nvidia.dali import types

        self._dali: Any = dynamic
        self._types: Any = types
        self._device = "gpu" if device.type == "cuda" else "cpu"
        self._cpu = CpuDecoder(num_threads)
        self._target = device
        # A stream of its own keeps decoding from waiting for the training step. DALI and torch share it, so neither
        # waits for the other.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        place = {"device_id": device.index or 0, "cuda_stream": self._stream} if self._stream is not None else {}
        self._context = dynamic.EvalContext(num_threads=num_threads, **place)
        self._turn = threading.Lock()  # one thread at a time may use the context

    def __call__(self, tasks: Sequence[ImageTask]) -> list[Tensor | str]:
        """uint8 patches [n, 768] of each image on the decoder's device, or the error."""
        with self._turn, self._context:
            if self._stream is None:
                return self._decode_all(tasks)
            # DALI reuses its buffers once ``results`` exist, so its work must be finished by then.
            with torch.cuda.device(self._target), torch.cuda.stream(self._stream):
                results = self._decode_all(tasks)
                self._stream.synchronize()
        for result in results:
            if isinstance(result, Tensor):
                result.record_stream(torch.cuda.default_stream(self._target))
        return results

    def _decode_all(self, tasks: Sequence[ImageTask]) -> list[Tensor | str]:
        suited = [task.plain_jpeg and _sound_header(task.content) for task in tasks]
        jpeg = [i for i in range(len(tasks)) if suited[i]]
        other = [i for i in range(len(tasks)) if not suited[i]]
        results = dict(zip(other, self._by_cpu([tasks[i] for i in other]), strict=True))
        results |= zip(jpeg, self._decode([tasks[i] for i in jpeg]), strict=True)
        return [results[i] for i in range(len(tasks))]

    def _by_cpu(self, tasks: list[ImageTask]) -> list[Tensor | str]:
        """Decode with the CPU decoder, then move the patches to the device in one copy."""
        results = self._cpu(tasks)
        good = [result for result in results if isinstance(result, Tensor)]
        if not good or self._stream is None:
            return results
        moved = iter(torch.cat(good).to(self._target).split([len(patches) for patches in good]))
        return [next(moved) if isinstance(result, Tensor) else result for result in results]

    def _decode(self, tasks: list[ImageTask]) -> list[Tensor | str]:
        if not tasks:
            return []
        try:
            return list(self._batch(tasks))
        except RuntimeError as error:
            if len(tasks) == 1:
                # The CPU codec accepts some images that the GPU codec refuses, and its errors are clearer.
                logger.debug("DALI refuses an image: %s", error)
                return self._by_cpu(tasks)
            half = len(tasks) // 2
            return self._decode(tasks[:half]) + self._decode(tasks[half:])

    def _batch(self, tasks: list[ImageTask]) -> list[Tensor]:
        dali = self._dali
        encoded = dali.batch([np.frombuffer(task.content, np.uint8) for task in tasks])
        # Computed here, because DALI's own crop mode rounds the scaled size differently from the other decoders.
        headers = [simplejpeg.decode_jpeg_header(task.content)[:2] for task in tasks]
        scaled = [_scaled_size(height, width, task) for (height, width), task in zip(headers, tasks, strict=True)]
        sizes = dali.batch([np.array(size, np.float32) for size in scaled])
        # With "gpu" the CPU parses the headers and the GPU decodes.
        pixels = dali.decoders.image(encoded, device=self._device, output_type=self._types.RGB)
        pixels = dali.resize(pixels, size=sizes, mode="stretch", interp_type=self._types.INTERP_LINEAR, antialias=True)
        targets = [(task.height, task.width) for task in tasks]
        if scaled != targets:
            corners = (np.array(scaled) - np.array(targets)) // 2
            start, shape = (dali.batch([np.array(x, np.int32) for x in values]) for values in (corners, targets))
            pixels = dali.slice(pixels, start=start, shape=shape, axes=(0, 1))
        images = pixels.evaluate().tensors
        take = torch.from_dlpack if self._device == "gpu" else lambda image: torch.from_numpy(np.array(image))
        return many_to_patches([take(image) for image in images])

    def close(self) -> None:
        """End the CPU decoder's threads; DALI's threads live as long as the process."""
        self._cpu.close()


Decoder = CpuDecoder | DaliDecoder


def make_decoder(name: str, num_threads: int, device: torch.device) -> Decoder:
    """The decoder called ``name``: "auto" is DALI on a GPU and "cpu" without one; "pillow" is the plain reference.

    Raises:
        ValueError: DALI is needed but not installed.
    """
    if name in ("cpu", "pillow") or (name == "auto" and device.type != "cuda"):
        return CpuDecoder(num_threads, plain=name == "pillow")
    if importlib.util.find_spec("nvidia.dali") is None:
        raise ValueError(
            f"data.decoder = {name!r}: DALI is missing. Run pip install nvidia-dali-cuda130, or use --decoder cpu."
        )
    return DaliDecoder(num_threads, device)
