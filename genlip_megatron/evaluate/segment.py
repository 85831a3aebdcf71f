"""Semantic segmentation by one linear layer on frozen patches, or by nearest neighbours of patches.

The linear protocol is DINOv2's for ADE20K, without mmsegmentation: random crops, BatchNorm and a linear layer per
patch, logits enlarged to the labels, a sliding window over whole images in the test, and mIoU over the whole validation
set.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from genlip_megatron.encoders.cache import FeatureCache
from genlip_megatron.encoders.interface import Encoder
from genlip_megatron.evaluate import ranks, transforms
from genlip_megatron.evaluate.head_training import train_head
from genlip_megatron.evaluate.heads import HeadAdamW, SegmentationHead
from genlip_megatron.evaluate.labelled import Masked, held_out
from genlip_megatron.evaluate.loading import TrainingBatches, each_in_workers, in_workers
from genlip_megatron.evaluate.miou import IoU
from genlip_megatron.evaluate.probe_options import ProbeOptions
from genlip_megatron.evaluate.probe_state import ProbeFolder, fill, progress_bar
from genlip_megatron.evaluate.transforms import IGNORE

NEIGHBOURS = (1, 3, 10, 30)
_STRIDE = 341 / 512  # of the window, relative to its side
_WINDOWS = 16  # encoded at once
_WARMUP, _WARMUP_START = 1500 / 40_000, 1e-6


@dataclass(frozen=True)
class Preset:
    """A published protocol of linear segmentation.

    Attributes:
        weight_decay: of AdamW.
        dropout: share of channels set to 0 before BatchNorm, per image.
        cosine: the learning rate falls as a cosine; else linearly.
        learning_rate, batch_size, steps: as named.
    """

    weight_decay: float
    dropout: float
    cosine: bool
    learning_rate: float = 1e-3
    batch_size: int = 16
    steps: int = 40_000


PRESETS = {
    "dinov2": Preset(weight_decay=1e-4, dropout=0.0, cosine=False),
    "dinov3": Preset(weight_decay=1e-3, dropout=0.1, cosine=True),
}


@dataclass(frozen=True, kw_only=True)
class Options(ProbeOptions):
    """The options of a segmentation; ``cache`` is for ``nearest_patches``.

    Attributes:
        size: side of crops and windows in pixels.
        reduce_zero: label 0 does not count, and label k is class k - 1.
    """

    size: int
    reduce_zero: bool = True

    def deciding(self) -> dict[str, Any]:
        """Those that decide the result."""
        return super().deciding() | {"reduce_zero_label": self.reduce_zero}


def window_starts(side: int, window: int, stride: int) -> list[int]:
    """First pixels of the windows along one side; the last window ends at the image's end.

    >>> window_starts(512, 512, 341), window_starts(683, 512, 341), window_starts(900, 512, 341)
    ([0], [0, 171], [0, 341, 388])
    """
    count = max(0, -(-(side - window) // stride)) + 1
    return [max(0, min(number * stride, side - window)) for number in range(count)]


def sliding_logits(
    predict: Callable[[Sequence[Tensor]], Tensor], pixels: Tensor, window: int, stride: int, classes: int
) -> Tensor:
    """Logits [C, height, width] of an image, averaged over the windows that cover a pixel.

    Args:
        predict: logits [B, C, window, window] of images [3, window, window].
        pixels: [3, height, width], both sides at least ``window``.
        window, stride: in pixels.
        classes: C.
    """
    height, width = pixels.shape[1:]
    places = [(y, x) for y in window_starts(height, window, stride) for x in window_starts(width, window, stride)]
    total: Tensor | None = None
    counts = torch.zeros(height, width)
    for start in range(0, len(places), _WINDOWS):
        part = places[start : start + _WINDOWS]
        logits = predict([pixels[:, y : y + window, x : x + window] for y, x in part])
        if total is None:
            total = logits.new_zeros(classes, height, width)
        for (y, x), one in zip(part, logits, strict=True):
            total[:, y : y + window, x : x + window] += one
            counts[y : y + window, x : x + window] += 1
    assert total is not None
    return total / counts.to(total.device)


def rate_factor(step: int, steps: int, cosine: bool) -> float:
    """Learning rate of a step relative to the peak: to 0 at the end, times a linear rise from 1e-6 in the first 3.75 %.

    >>> tuple(round(rate_factor(step, 40_000, False), 4) for step in (0, 750, 1500, 20_000, 40_000))
    (0.0, 0.4906, 0.9625, 0.5, 0.0)
    """
    done = step / steps
    factor = (1 + float(np.cos(np.pi * done))) / 2 if cosine else 1 - done
    warmup = round(_WARMUP * steps)
    rise = 1 - (1 - step / warmup) * (1 - _WARMUP_START) if step < warmup else 1.0
    return factor * rise


def linear_segmentation(
    encoder: Encoder,
    train: Sequence[Masked],
    val: Sequence[Masked],
    classes: int,
    preset: Preset,
    options: Options,
    folder: ProbeFolder,
) -> dict[str, Any]:
    """Train BatchNorm and a linear layer, and measure mIoU on ``val``. There is nothing to select.

    Args:
        encoder: frozen.
        train, val: images with masks.
        classes: C.
        preset: the protocol.
        options: the command line's.
        folder: a killed probe resumes from it.

    Returns:
        "miou" from 0 to 1, "iou" of each class (None if a class does not occur), and "pixel_accuracy".
    """
    begin, device = time.monotonic(), encoder.device
    batch_size = options.batch_size or preset.batch_size
    steps = min(preset.steps, options.max_steps) if options.max_steps else preset.steps
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        head = SegmentationHead(encoder.dim, classes).to(device)
    optimizer = HeadAdamW(head, preset.weight_decay)
    grid = encoder.grid(options.size, options.size)
    share = batch_size // ranks.world_size()

    def load(job: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        crops = []
        for number, position in job:
            rng = transforms.seeded(options.seed, position)
            image, labels = _pair(train[number], options.reduce_zero)
            image, labels = transforms.segmentation_crop(image, labels, options.size, rng)
            image = transforms.photometric_distortion(image, rng)
            crops.append(transforms.pad_to(encoder.to_tensor(image), labels, options.size))
        pixels, targets = zip(*crops, strict=True)
        return torch.stack(pixels), torch.stack(targets)

    def loss(step: int, batch: tuple[Tensor, Tensor]) -> Tensor:
        pixels, targets = batch
        x, targets = _patches(encoder, list(pixels)), targets.to(device)
        if preset.dropout:
            kept = transforms.seeded(options.seed, step, 1).random((batch_size, encoder.dim)) >= preset.dropout
            mine = torch.from_numpy(kept[ranks.rank() * share :][:share]).to(device)
            x = x * mine[:, None] / (1 - preset.dropout)
        logits = F.interpolate(head(x, grid), size=targets.shape[1:], mode="bilinear", align_corners=False)
        # The mean over all pixels, those that do not count included, as mmsegmentation's.
        return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum") / targets.numel()

    def batches(first: int) -> Iterator[tuple[Tensor, Tensor]]:
        jobs = TrainingBatches(np.arange(len(train)), options.seed, first, steps, batch_size)
        return in_workers(load, jobs, options.workers)

    train_head(
        head,
        optimizer,
        folder,
        steps=steps,
        save_interval=options.save_interval,
        batches=batches,
        loss=loss,
        rate=lambda step: preset.learning_rate * rate_factor(step, steps, preset.cosine),
        device=device,
        what=f"{encoder.name} head",
    )

    @torch.no_grad()
    def predict(images: Sequence[Tensor]) -> Tensor:
        size = images[0].shape[1:]
        return F.interpolate(head(_patches(encoder, images), grid), size=size, mode="bilinear", align_corners=False)

    result = _score(_predictions(encoder, val, classes, options, predict), len(val), classes)
    return {
        **result,
        "steps": steps,
        "train_images": len(train),
        "val_images": len(val),
        "seconds": round(time.monotonic() - begin, 1),
    }


def _pair(sample: Masked, reduce_zero: bool) -> tuple[Image.Image, np.ndarray]:
    """(image, labels uint8 [height, width]).

    Raises:
        ValueError: they differ in size.
    """
    image, labels = sample.read(), sample.mask.read_mask(reduce_zero)
    if labels.shape != (image.height, image.width):
        raise ValueError(
            f"{sample.mask.name}: a mask of {labels.shape[1]}x{labels.shape[0]} pixels, but its image has "
            f"{image.width}x{image.height}. Replace the mask or remove the image."
        )
    return image, labels


def _patches(encoder: Encoder, images: Sequence[Tensor]) -> Tensor:
    """float32 [B, h * w, D] of images of one size."""
    with torch.no_grad():
        return torch.stack([features.patches for features in encoder.encode(images)]).float()


def _predictions(
    encoder: Encoder,
    val: Sequence[Masked],
    classes: int,
    options: Options,
    predict: Callable[[Sequence[Tensor]], Tensor],
) -> Iterator[tuple[Tensor, Tensor]]:
    """(predicted classes, true classes) [height, width] of this rank's images, in the size of their masks."""

    def load(number: int) -> tuple[Tensor, Tensor]:
        image, labels = _pair(val[number], options.reduce_zero)
        resized = transforms.resize_short(image, options.size)
        return encoder.to_tensor(resized), torch.from_numpy(labels.astype(np.int64))

    stride = max(1, round(options.size * _STRIDE))
    numbers = list(range(ranks.rank(), len(val), ranks.world_size()))
    for pixels, labels in in_workers(load, numbers, options.workers):
        logits = sliding_logits(predict, pixels, options.size, stride, classes)
        logits = F.interpolate(logits[None], size=labels.shape, mode="bilinear", align_corners=False)[0]
        yield logits.argmax(dim=0).cpu(), labels


def _score(predictions: Iterator[tuple[Tensor, Tensor]], images: int, classes: int) -> dict[str, Any]:
    """The scores over the images of all ranks."""
    iou = IoU(classes)
    with progress_bar(images, 0, "validation", "image") as bar:
        for predicted, truth in predictions:
            iou.add(predicted, truth)
            bar.update(ranks.world_size())
    _add_ranks(iou)
    return _figures(iou)


def _add_ranks(iou: IoU) -> None:
    """Add the counts of all ranks."""
    iou.counts = torch.stack(ranks.gather(iou.counts)).sum(0)


def _figures(iou: IoU) -> dict[str, Any]:
    right, _, counted = iou.counts.sum(dim=1).tolist()
    return {
        "miou": round(iou.mean(), 6),
        "pixel_accuracy": round(right / counted, 6),
        "iou": [None if value != value else round(value, 6) for value in iou.per_class().tolist()],
    }


def patch_labels(labels: Tensor, patch: int, classes: int) -> Tensor:
    """The most frequent class of each patch, int64 [h * w]; 255 where no pixel counts, or most do not.

    Args:
        labels: int64 [h * patch, w * patch] with 255 for pixels that do not count.
        patch: side in pixels.
        classes: C.

    >>> patch_labels(torch.tensor([[0, 0, 1, 255], [0, 1, 255, 255]]), 2, 2)
    tensor([  0, 255])
    """
    rows, columns = (side // patch for side in labels.shape)
    tiles = labels.reshape(rows, patch, columns, patch).transpose(1, 2).flatten(2).flatten(0, 1)  # [h * w, p * p]
    tiles = torch.where(tiles == IGNORE, classes, tiles)
    counts = torch.zeros(len(tiles), classes + 1).scatter_add_(1, tiles, torch.ones(1).expand(tiles.shape))
    found = counts.argmax(dim=1)
    return torch.where(found == classes, IGNORE, found)


def nearest_patches(
    encoder: Encoder, train: Sequence[Masked], val: Sequence[Masked], classes: int, options: Options
) -> dict[str, Any]:
    """A cheap look: the class of a patch is the majority of its nearest training patches (CAPI's kNN segmentation).

    Images are squashed to ``options.size``. Features are standardised by the training patches' mean and deviation,
    compared by cosine. k is selected on held-out training images. mIoU is that of the squashed label maps.

    Args and Returns:
        as ``linear_segmentation``; "neighbours" is the selected k.
    """
    begin, device, size = time.monotonic(), encoder.device, options.size

    def squash(image: Image.Image) -> Tensor:
        return encoder.to_tensor(image.resize((size, size), Image.Resampling.BICUBIC))

    def label_map(sample: Masked) -> Tensor:
        labels = Image.fromarray(sample.mask.read_mask(options.reduce_zero))
        return torch.from_numpy(np.array(labels.resize((size, size), Image.Resampling.NEAREST), np.int64))

    def cached(samples: Sequence[Masked], part: str) -> FeatureCache:
        def read(numbers: Sequence[int]) -> Iterator[Tensor]:
            return each_in_workers(lambda number: squash(samples[number].read()), numbers, options.workers)

        name = f"squash {size}"
        cache = FeatureCache(options.cache / part, encoder, samples, squash, name, options.cache_dtype, False, read)
        return fill(cache, f"{part} features")

    train_cache = cached(train, "train")
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    features = torch.stack([train_cache[number][0].to(dtype) for number in range(len(train))]).to(device)  # [M, P, D]
    truths = torch.stack([patch_labels(label_map(sample), encoder.patch, classes) for sample in train]).to(device)
    mean = features.mean(dim=(0, 1), dtype=torch.float32)
    deviation = sum((one.float() - mean).square().mean(0) for one in features).div(len(features)).sqrt() + 1e-6

    def unit(x: Tensor) -> Tensor:
        return F.normalize((x.float() - mean) / deviation, dim=-1).to(dtype)

    features = torch.stack([unit(one) for one in features])

    def scores(
        bank: np.ndarray, queries: Callable[[int], Tensor], samples: Sequence[Masked], numbers: np.ndarray
    ) -> list[IoU]:
        chosen = torch.from_numpy(bank).to(device)
        keys, labels = features[chosen].flatten(0, 1), truths[chosen].flatten()
        counted = labels != IGNORE
        keys, labels = keys[counted], labels[counted]
        found = [IoU(classes) for _ in NEIGHBOURS]
        with progress_bar(len(numbers), 0, "nearest patches", "image") as bar:
            for number in numbers[ranks.rank() :: ranks.world_size()].tolist():
                votes = _majority(keys, labels, queries(number), classes)
                for iou, predicted in zip(found, votes, strict=True):
                    tiles = predicted.cpu().view(encoder.grid(size, size))
                    whole = tiles.repeat_interleave(encoder.patch, 0).repeat_interleave(encoder.patch, 1)
                    iou.add(whole, label_map(samples[number]))
                bar.update(ranks.world_size())
        for iou in found:
            _add_ranks(iou)
        return found

    chosen, selection = held_out(len(train))
    selected = [iou.mean() for iou in scores(chosen, lambda number: features[number], train, selection)]
    best = int(np.argmax(selected))
    val_cache = cached(val, "val")
    everything = np.arange(len(train))
    measured = scores(everything, lambda number: unit(val_cache[number][0].to(device)), val, np.arange(len(val)))[best]
    rows = [{"neighbours": k, "held_out_miou": round(value, 6)} for k, value in zip(NEIGHBOURS, selected, strict=True)]
    return {
        **_figures(measured),
        **rows[best],
        "heads": rows,
        "train_images": len(train),
        "held_out_images": len(selection),
        "val_images": len(val),
        "seconds": round(time.monotonic() - begin, 1),
    }


def _majority(keys: Tensor, labels: Tensor, queries: Tensor, classes: int, chunk: int = 1 << 18) -> list[Tensor]:
    """The most frequent class among the k nearest of ``keys`` [M, D], for each k of ``NEIGHBOURS``: int64 [Q]."""
    most = min(max(NEIGHBOURS), len(keys))
    nearest = torch.empty(len(queries), 0, device=keys.device, dtype=keys.dtype)
    found = torch.empty(len(queries), 0, device=keys.device, dtype=torch.int64)
    for start in range(0, len(keys), chunk):
        close, numbers = (queries @ keys[start : start + chunk].T).topk(min(most, len(keys) - start, chunk), dim=1)
        nearest, order = torch.cat([nearest, close], dim=1).topk(min(most, nearest.shape[1] + close.shape[1]), dim=1)
        found = torch.cat([found, labels[start : start + chunk][numbers]], dim=1).gather(1, order)
    return [F.one_hot(found[:, :k], classes).sum(dim=1).argmax(dim=1) for k in NEIGHBOURS]
