"""Prepare images in threads while the model computes, in the order of the inputs."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor

from genlip_megatron.hf.attention_genlip import to_patches
from genlip_megatron.hf.image_processing_genlip import GenLIPImageProcessor
from genlip_megatron.infer.inputs import FileImage, ShardImage

T = TypeVar("T")
_MAX_THREADS = 16
_AHEAD = 4  # prepared images per thread


@dataclass(frozen=True)
class Prepared:
    """An image as model input, or an error.

    Attributes:
        number: its number among the inputs.
        name: its name in result rows.
        patches: float32 [rows * columns, 768], normalised; empty if there is an ``error``.
        rows, columns: its patch grid.
        truth: the answer of its caption, if it has one.
        error: why it cannot be used; "" for a good image.
    """

    number: int
    name: dict[str, str]
    patches: Tensor
    rows: int
    columns: int
    truth: str | None = None
    error: str = ""


def prepare(
    number: int, image: FileImage | ShardImage, processor: GenLIPImageProcessor, prompt: str | None = None
) -> Prepared:
    """Read, decode, resize and normalise one image; errors go into ``error``.

    Args:
        number: its number among the inputs.
        image: the image to read.
        processor: the model's image processor.
        prompt: prompt for captions that come without one; None: do not read captions.
    """
    try:
        pixels = processor(Image.fromarray(image.read()), return_tensors="pt")
        truth = None if prompt is None else image.truth(prompt)
    except ValueError as error:
        return Prepared(number, image.name, torch.empty(0, 768), 0, 0, error=" ".join(str(error).split()))
    values = pixels["pixel_values"]
    rows, columns = (side // 16 for side in values.shape[2:])
    return Prepared(number, image.name, to_patches(values), rows, columns, truth)


def prepared(
    images: Sequence[FileImage | ShardImage], processor: GenLIPImageProcessor, prompt: str | None = None
) -> Iterator[Prepared]:
    """Prepare every image, in order, a few ahead of the caller."""
    threads = min(_MAX_THREADS, len(os.sched_getaffinity(0)))
    waiting: deque[Future[Prepared]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="image") as pool:
        try:
            for number in range(len(images)):
                waiting.append(pool.submit(prepare, number, images[number], processor, prompt))
                if len(waiting) > _AHEAD * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def batches(images: Iterable[Prepared], size: int = 0, max_patches: int = 0) -> Iterator[list[Prepared]]:
    """Batches of at most ``size`` good images and ``max_patches`` patches (0: no limit).

    A larger image forms its own batch. Bad images are included but not counted.
    """
    batch: list[Prepared] = []
    good = patches = 0
    for image in images:
        count = len(image.patches)
        full = (size and good + 1 > size) or (max_patches and patches + count > max_patches)
        if good and count and full:
            yield batch
            batch, good, patches = [], 0, 0
        batch.append(image)
        good, patches = good + bool(count), patches + count
    if batch:
        yield batch


def computed(
    batches: Iterable[Sequence[Prepared]], compute: Callable[[list[Prepared]], Iterable[T]]
) -> Iterator[tuple[Prepared, T | None]]:
    """Every image with its result, None for a bad image; ``compute`` gets the good images of a batch."""
    for batch in batches:
        good = [image for image in batch if not image.error]
        results = iter(compute(good) if good else ())
        for image in batch:
            yield image, None if image.error else next(results)


def packed(images: Sequence[Prepared], device: torch.device) -> tuple[Tensor, Tensor]:
    """(float32 patches [P, 768] of all images end to end, int64 [images, 2] their grids), on a device."""
    grid = torch.tensor([(image.rows, image.columns) for image in images], device=device)
    return torch.cat([image.patches for image in images]).to(device), grid
