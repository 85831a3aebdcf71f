"""Top-1 accuracy of a frozen encoder: attentive probe, linear probe of the mean patch, and nearest neighbours.

Classifiers of all learning rates and weight decays train at once on the same features. 10 % of the training images
(seed 42) select the classifier with the highest accuracy; ties go to the lowest loss. The validation images are read
once, for that classifier.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from genlip_megatron.encoders.cache import FeatureCache
from genlip_megatron.encoders.interface import Encoder
from genlip_megatron.evaluate import ranks, transforms
from genlip_megatron.evaluate.head_training import train_head
from genlip_megatron.evaluate.heads import AttentiveHeads, MeanLinearHeads, StackedOptimizer, cosine
from genlip_megatron.evaluate.labelled import Labelled, held_out
from genlip_megatron.evaluate.loading import TrainingBatches, each_in_workers, in_workers, padded, this_ranks
from genlip_megatron.evaluate.probe_options import ProbeOptions
from genlip_megatron.evaluate.probe_state import ProbeFolder, fill

NEIGHBOURS, TEMPERATURE = (10, 20, 100, 200), 0.07  # of DINOv2's kNN evaluation
_ENCODE_BATCH = 256
Batch = tuple[Tensor, Tensor | None, Tensor]  # features [B, P, D], valid [B, P] or None, labels [B]


@dataclass(frozen=True)
class Preset:
    """A published protocol of a trained probe.

    Attributes:
        learning_rates, weight_decays: every pair trains a head.
        scaled: whether the learning rates are multiplied by the batch size / 256.
        batch_size: of all ranks together.
        steps: number of updates; 0: ``epochs`` over the training images.
        warmup: share of the steps with a rising learning rate.
        minimum: last learning rate.
        betas: of AdamW; None: SGD with momentum 0.9.
        clip: largest norm of a head's gradient; 0: no limit.
        augment: "none": features are computed once; "crop": random crop and flip; "aim": also colours and RandAugment.
        head: options of ``AttentiveHeads``; None: ``MeanLinearHeads``.
        images_per_class: default of ``--per-class``; 0: all.
        by_epoch: the learning rates change only between epochs, unless ``ProbeOptions.max_steps`` ends them sooner.
    """

    learning_rates: tuple[float, ...]
    weight_decays: tuple[float, ...]
    scaled: bool
    batch_size: int
    steps: int
    epochs: int
    warmup: float
    minimum: float
    betas: tuple[float, float] | None
    clip: float
    augment: str
    head: dict[str, bool] | None
    images_per_class: int = 0
    by_epoch: bool = False

    def grid(self, batch_size: int) -> list[tuple[float, float]]:
        """(learning rate, weight decay) of each head."""
        scale = batch_size / 256 if self.scaled else 1.0
        return [(rate * scale, decay) for rate, decay in itertools.product(self.learning_rates, self.weight_decays)]


PRESETS = {
    # facebookresearch/capi, eval_classification.py; batch 128 on each of 8 ranks is assumed.
    "capi": Preset(
        learning_rates=(1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2),
        weight_decays=(5e-4, 1e-3, 5e-2),
        scaled=True,
        batch_size=1024,
        steps=12_500,
        epochs=0,
        warmup=0.1,
        minimum=0.0,
        betas=(0.9, 0.95),
        clip=0.0,
        augment="crop",
        head={},
    ),
    # AIMv2, table A2, with the head of apple/ml-aim.
    "aimv2": Preset(
        learning_rates=(5e-5, 1e-4, 2e-4, 3e-4, 5e-4, 1e-3, 2e-3),
        weight_decays=(0.05, 0.1),
        scaled=False,
        batch_size=1024,
        steps=0,
        epochs=100,
        warmup=0.05,
        minimum=1e-5,
        betas=(0.9, 0.999),
        clip=3.0,
        augment="aim",
        head={"token_norm": True, "bias": False, "truncated": False},
    ),
    # open_clip, scripts/genlip_attentive_probe.py, without its linear layer between pooling and BatchNorm.
    "cached": Preset(
        learning_rates=(1e-3,),
        weight_decays=(1e-4,),
        scaled=False,
        batch_size=512,
        steps=0,
        epochs=20,
        warmup=0.0,
        minimum=0.0,
        betas=(0.9, 0.999),
        clip=0.0,
        augment="none",
        head={"token_norm": True, "final_norm": True, "bias": False, "truncated": False},
        by_epoch=True,
        images_per_class=100,
    ),
    # DINOv2's linear evaluation, of the mean patch only.
    "mean-linear": Preset(
        learning_rates=(1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1),
        weight_decays=(0.0,),
        scaled=True,
        batch_size=1024,
        steps=12_500,
        epochs=0,
        warmup=0.0,
        minimum=0.0,
        betas=None,
        clip=0.0,
        augment="crop",
        head=None,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Options(ProbeOptions):
    """The options of a classification.

    Attributes:
        rand_augment: whether the preset "aimv2" uses RandAugment, which needs timm.
        augment: whether the preset's augmentation is used; without it, features are computed once.
    """

    rand_augment: bool = True
    augment: bool = True

    def deciding(self) -> dict[str, Any]:
        """Those that decide the result."""
        unaugmented = {} if self.augment else {"augment": False}
        return super().deciding() | {"rand_augment": self.rand_augment} | unaugmented


def training_view(
    augment: str, size: int, rand_augment: bool
) -> Callable[[Image.Image, np.random.Generator], Image.Image]:
    """The augmentation "crop" or "aim": image, generator -> image [size, size].

    Raises:
        ValueError: RandAugment needs timm, which does not import.
    """
    if augment == "crop":
        return lambda image, rng: transforms.random_flip(transforms.random_resized_crop(image, size, rng), rng)
    policy = transforms.rand_augment("rand-m9-mstd0.5-inc1") if rand_augment else None

    def view(image: Image.Image, rng: np.random.Generator) -> Image.Image:
        image = transforms.random_flip(transforms.random_resized_crop(image, size, rng), rng)
        image = transforms.color_jitter(image, 0.3, rng)
        if policy is not None:
            transforms.seed_globals(rng)
            image = policy(image)
        return image

    return view


def evaluation_view(encoder: Encoder, size: int | None) -> tuple[Callable[[Image.Image], Tensor], str]:
    """(the transform of evaluations, its name): resized and cropped, or in the native shape if ``size`` is None."""
    if size is None:
        return encoder.preprocess, "native"
    return lambda image: encoder.to_tensor(transforms.resize_and_crop(image, size)), f"resize and crop {size}"


class _Images:
    """Features computed on the fly."""

    def __init__(self, encoder: Encoder, train: Sequence[Labelled], preset: Preset, options: Options) -> None:
        assert options.size is not None
        self._encoder, self._train, self._options = encoder, train, options
        self._augment = training_view(preset.augment, options.size, options.rand_augment)
        self._evaluate, _ = evaluation_view(encoder, options.size)

    def _encoded(self, pixels: Tensor, labels: Tensor) -> Batch:
        found: list[Tensor] = []
        with torch.no_grad():
            for part in pixels.split(_ENCODE_BATCH):
                found += [features.patches for features in self._encoder.encode(list(part))]
        return (*padded(found), labels.to(self._encoder.device))

    def training(self, jobs: Sequence[Any]) -> Iterator[Batch]:
        """The batches of (sample, position) lists."""

        def load(job: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
            views = [
                self._augment(self._train[number].read(), transforms.seeded(self._options.seed, position))
                for number, position in job
            ]
            labels = torch.tensor([self._train[number].label for number, _ in job])
            return torch.stack([self._encoder.to_tensor(view) for view in views]), labels

        return (self._encoded(*batch) for batch in in_workers(load, jobs, self._options.workers))

    def evaluation(self, samples: Sequence[Labelled], jobs: Sequence[list[int]], _: str) -> Iterator[Batch]:
        """The batches of lists of numbers, without augmentation."""

        def load(job: list[int]) -> tuple[Tensor, Tensor]:
            views = [self._evaluate(samples[number].read()) for number in job]
            return torch.stack(views), torch.tensor([samples[number].label for number in job])

        return (self._encoded(*batch) for batch in in_workers(load, jobs, self._options.workers))


def feature_cache(
    encoder: Encoder, samples: Sequence[Labelled], options: Options, part: str, pool: bool = False
) -> FeatureCache:
    """The features of "train" or "val" images in ``options.cache``, to be filled.

    Raises:
        ValueError: the folder holds other features.
    """
    view, name = evaluation_view(encoder, options.size)

    def read(numbers: Sequence[int]) -> Iterator[Tensor]:
        return each_in_workers(lambda number: view(samples[number].read()), numbers, options.workers)

    return FeatureCache(options.cache / part, encoder, samples, view, name, options.cache_dtype, pool, read)


class _Cached:
    """Features computed once."""

    def __init__(self, encoder: Encoder, train: Sequence[Labelled], options: Options) -> None:
        self._encoder, self._train, self._options = encoder, train, options
        self._cache = fill(feature_cache(encoder, train, options, "train"), "train features")

    def _load(self, cache: FeatureCache, samples: Sequence[Labelled], numbers: Sequence[int]) -> Batch:
        x, valid = padded([cache[number][0] for number in numbers])
        device = self._encoder.device
        labels = torch.tensor([samples[number].label for number in numbers], device=device)
        return x.to(device), None if valid is None else valid.to(device), labels

    def training(self, jobs: Sequence[Any]) -> Iterator[Batch]:
        """As ``_Images.training``."""
        return (self._load(self._cache, self._train, [number for number, _ in job]) for job in jobs)

    def evaluation(self, samples: Sequence[Labelled], jobs: Sequence[list[int]], part: str) -> Iterator[Batch]:
        """As ``_Images.evaluation``."""
        cache = self._cache
        if part == "val":
            cache = fill(feature_cache(self._encoder, samples, self._options, "val"), "val features")
        return (self._load(cache, samples, job) for job in jobs)


def trained_probe(
    encoder: Encoder,
    train: Sequence[Labelled],
    val: Sequence[Labelled],
    classes: int,
    preset: Preset,
    options: Options,
    folder: ProbeFolder,
) -> dict[str, Any]:
    """Train the heads of a preset, select one, and measure it on ``val``.

    Args:
        encoder: frozen.
        train, val: the images.
        classes: their number.
        preset: the protocol.
        options: the command line's.
        folder: a killed probe resumes from it.

    Returns:
        "accuracy" on ``val``, "held_out_accuracy", "learning_rate" and "weight_decay" of the selected head, and "heads"
        with these of all heads. Accuracies are from 0 to 1.
    """
    begin, device = time.monotonic(), encoder.device
    chosen, selection = held_out(len(train))
    batch_size = options.batch_size or preset.batch_size
    steps = preset.steps or preset.epochs * -(-len(chosen) // batch_size)
    held = steps // preset.epochs if preset.by_epoch else 1  # steps of one learning rate
    if 0 < options.max_steps < steps:
        steps, held = options.max_steps, 1
    grid = preset.grid(batch_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        heads: nn.Module = (
            MeanLinearHeads(len(grid), encoder.dim, classes)
            if preset.head is None
            else AttentiveHeads(len(grid), encoder.dim, classes, **preset.head)
        )
    heads.to(device)
    optimizer = StackedOptimizer(heads, [decay for _, decay in grid], preset.betas, preset.clip)
    peak = torch.tensor([rate for rate, _ in grid])
    cached = preset.augment == "none" or not options.augment
    data = _Cached(encoder, train, options) if cached else _Images(encoder, train, preset, options)

    def loss(_: int, batch: Batch) -> Tensor:
        x, valid, labels = batch
        return _losses(heads(x, valid), labels).mean(dim=1).sum()

    train_head(
        heads,
        optimizer,
        folder,
        steps=steps,
        save_interval=options.save_interval,
        batches=lambda first: data.training(TrainingBatches(chosen, options.seed, first, steps, batch_size)),
        loss=loss,
        rate=lambda step: cosine(step - step % held, steps, round(preset.warmup * steps), peak, preset.minimum),
        device=device,
        what=f"{encoder.name} heads",
    )
    found, losses = _scores(heads, data.evaluation(train, this_ranks(selection, 128), "train"), len(grid), device)
    best = min(range(len(grid)), key=lambda number: (-float(found[number]), float(losses[number])))
    everything = np.arange(len(val))
    measured, _ = _scores(heads, data.evaluation(val, this_ranks(everything, 128), "val"), len(grid), device)
    rows = [
        {"learning_rate": rate, "weight_decay": decay, "held_out_accuracy": round(float(accuracy), 6)}
        for (rate, decay), accuracy in zip(grid, found, strict=True)
    ]
    return {
        "accuracy": round(float(measured[best]), 6),
        **rows[best],
        "heads": rows,
        "steps": steps,
        "train_images": len(chosen),
        "held_out_images": len(selection),
        "val_images": len(val),
        "seconds": round(time.monotonic() - begin, 1),
    }


@torch.no_grad()
def _scores(heads: nn.Module, batches: Iterator[Batch], count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(accuracy, mean loss) of each head, float64 [N], over the batches of all ranks."""
    right, loss = torch.zeros(count, device=device), torch.zeros(count, device=device)
    images = torch.zeros((), device=device)
    for x, valid, labels in batches:
        logits = heads(x, valid)  # [N, B, C]
        right += (logits.argmax(dim=2) == labels).sum(dim=1)
        loss += _losses(logits, labels).sum(dim=1)
        images += len(labels)
    images = ranks.total(images).double()
    return (ranks.total(right) / images).cpu(), (ranks.total(loss) / images).cpu()


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy [N, B] of logits [N, B, C] and labels [B]."""
    return F.cross_entropy(logits.transpose(1, 2), labels.expand(len(logits), -1), reduction="none")


def neighbour_votes(
    bank: Tensor, labels: Tensor, queries: Tensor, classes: int, neighbours: Sequence[int], temperature: float
) -> Tensor:
    """Predicted classes int64 [K, Q] by the k nearest features, each weighted by ``exp(cosine / temperature)``.

    Args:
        bank: [M, D], L2-normalised.
        labels: int64 [M].
        queries: [Q, D], L2-normalised.
        classes: C.
        neighbours: the K values of k; above M: M.
        temperature: of the weights.
    """
    most = min(max(neighbours), len(bank))
    predicted = []
    for part in queries.split(1024):
        nearest, numbers = (part @ bank.T).topk(most, dim=1)
        weights = (nearest / temperature).exp()
        votes = [
            weights.new_zeros(len(part), classes).scatter_add_(1, labels[numbers[:, :k]], weights[:, :k])
            for k in neighbours
        ]
        predicted.append(torch.stack([vote.argmax(dim=1) for vote in votes]))
    return torch.cat(predicted, dim=1)


def nearest_neighbours(
    encoder: Encoder, train: Sequence[Labelled], val: Sequence[Labelled], classes: int, options: Options
) -> dict[str, Any]:
    """kNN accuracy of the L2-normalised mean patch; k is selected on held-out training images.

    Args and Returns:
        as ``trained_probe``; "neighbours" instead of a learning rate.
    """
    begin, device = time.monotonic(), encoder.device

    def features(samples: Sequence[Labelled], part: str) -> Tensor:
        cache = fill(feature_cache(encoder, samples, options, part, pool=True), f"{part} features")
        return F.normalize(torch.cat([cache[number][0] for number in range(len(samples))]).float(), dim=1).to(device)

    bank, labels = features(train, "train"), torch.tensor([sample.label for sample in train], device=device)

    def accuracy(bank_numbers: np.ndarray, queries: Tensor, truth: Tensor) -> Tensor:
        mine = slice(ranks.rank(), None, ranks.world_size())
        numbers = torch.from_numpy(bank_numbers).to(device)
        votes = neighbour_votes(bank[numbers], labels[numbers], queries[mine], classes, NEIGHBOURS, TEMPERATURE)
        right = ranks.total((votes == truth[mine]).sum(dim=1).float())
        return right.double().cpu() / len(queries)

    chosen, selection = held_out(len(train))
    held = torch.from_numpy(selection).to(device)
    found = accuracy(chosen, bank[held], labels[held])
    best = int(found.argmax())
    truth = torch.tensor([sample.label for sample in val], device=device)
    measured = accuracy(np.arange(len(train)), features(val, "val"), truth)
    rows = [
        {"neighbours": k, "held_out_accuracy": round(float(value), 6)}
        for k, value in zip(NEIGHBOURS, found, strict=True)
    ]
    return {
        "accuracy": round(float(measured[best]), 6),
        **rows[best],
        "heads": rows,
        "train_images": len(train),
        "held_out_images": len(selection),
        "val_images": len(val),
        "seconds": round(time.monotonic() - begin, 1),
    }
