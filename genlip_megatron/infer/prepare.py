"""Images made ready in threads while the model computes, in the order in which they were named."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from genlip_megatron.hf.image_processing_genlip import GenLIPImageProcessor
from genlip_megatron.hf.modeling_genlip import to_patches
from genlip_megatron.infer.inputs import FileImage, ShardImage

_MAX_THREADS = 16
_AHEAD = 4  # images made ready for each thread


@dataclass(frozen=True)
class Prepared:
    """An image as the model takes it, or why it cannot be taken.

    Attributes:
        number: its place among the inputs.
        name: what it is called in rows of results.
        patches: float32 [rows * columns, 768], normalised; empty when there is an ``error``.
        rows, columns: of its patches.
        truth: the answer of its caption, where it has one.
        error: why it cannot be used; empty for a good one.
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
    """Read, decode, resize and normalise one image; one that cannot be used tells why in its ``error``.

    Args:
        number: its place among the inputs.
        image: where to read it.
        processor: of the model.
        prompt: of captions that come without one; None: captions are not wanted.
    """
    try:
        pixels = processor(Image.fromarray(image.read()), return_tensors="pt")
        truth = None if prompt is None else image.truth(prompt)
    except ValueError as error:
        return Prepared(number, image.name, torch.empty(0, 768), 0, 0, error=" ".join(str(error).split()))
    values = pixels["pixel_values"]
    if "image_grid_hw" in pixels:
        rows, columns = pixels["image_grid_hw"][0].tolist()
    else:
        rows, columns = (side // 16 for side in values.shape[2:])
        values = to_patches(values)
    return Prepared(number, image.name, values, rows, columns, truth)


def prepared(
    images: Sequence[FileImage | ShardImage], processor: GenLIPImageProcessor, prompt: str | None = None
) -> Iterator[Prepared]:
    """Every image made ready, in order, a few ahead of who asks."""
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
    """The images in batches, each closed before it would have more than ``size`` good images or ``max_patches``
    patches (0: no such limit); an image larger than that goes alone. Bad ones come along and count as nothing."""
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


def packed(images: Sequence[Prepared], device: torch.device) -> tuple[Tensor, Tensor]:
    """(float32 patches [P, 768] of all images end to end, int64 [images, 2] their rows and columns) on a device."""
    grid = torch.tensor([(image.rows, image.columns) for image in images], device=device)
    return torch.cat([image.patches for image in images]).to(device), grid
