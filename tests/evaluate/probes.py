"""Small labelled images, and probes that several ranks run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from genlip_megatron.encoders.others import PixelEncoder
from genlip_megatron.evaluate import classify, labelled, ranks, segment
from genlip_megatron.evaluate.probe_options import settings
from genlip_megatron.evaluate.probe_state import ProbeFolder

COLOURS = {"blue": (40, 40, 220), "green": (40, 220, 40), "red": (220, 40, 40)}
TINY = classify.Preset(
    learning_rates=(1e-3, 1e-2),
    weight_decays=(0.0, 0.1),
    scaled=False,
    batch_size=8,
    steps=6,
    epochs=0,
    warmup=0.2,
    minimum=1e-5,
    betas=(0.9, 0.999),
    clip=1.0,
    augment="crop",
    head={"token_norm": True, "final_norm": True},
)


def class_folders(root: Path, train: int = 8, val: int = 3) -> Path:
    """``train`` and ``val``, each with a folder of noisy images for each colour."""
    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("val", val)):
        for name, colour in COLOURS.items():
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                noisy = np.clip(np.array(colour) + rng.normal(0, 40, (36, 44, 3)), 0, 255)
                Image.fromarray(noisy.astype(np.uint8)).save(folder / f"{number}.png")
    return root


def ade_folders(root: Path, train: int = 10, val: int = 3) -> Path:
    """The layout of ADE20K: two classes side by side, a third below, and a rim of label 0."""
    rng = np.random.default_rng(0)
    colours = np.array([(128, 128, 128), *COLOURS.values()])
    for part, count in (("training", train), ("validation", val)):
        for kind in ("images", "annotations"):
            (root / kind / part).mkdir(parents=True)
        for number in range(count):
            mask = np.ones((40, 52), np.uint8)
            mask[:, 26:], mask[int(rng.integers(20, 32)) :], mask[:2] = 2, 3, 0
            image = np.clip(colours[mask] + rng.normal(0, 20, (40, 52, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(image).save(root / "images" / part / f"{number}.png")
            Image.fromarray(mask).save(root / "annotations" / part / f"{number}.png")
    return root


def run_classify(data: Path, output: Path, preset: classify.Preset = TINY, **options: Any) -> dict[str, Any]:
    """Train a tiny probe of patch colours; returns its result with the state of its heads under "tensors"."""
    encoder = PixelEncoder("colour", patch=8, size=32, colour=True)
    train, names = labelled.read_classes([str(data / "train")], "--train")
    val, _ = labelled.read_classes([str(data / "val")], "--val", known=names)
    size = {"size": 32, **options}
    chosen = classify.Options(cache=output / "features", **size)
    folder = ProbeFolder(output, settings(encoder, "tiny", train, val, len(names), chosen))
    result = classify.trained_probe(encoder, train, val, len(names), preset, chosen, folder)
    ranks.wait()
    return {**result, "tensors": folder.load(torch.device("cpu"))[1]}


def run_segment(data: Path, output: Path, preset: str = "dinov3", steps: int = 6, **options: Any) -> dict[str, Any]:
    """As ``run_classify``, for segmentation."""
    encoder = PixelEncoder("colour", patch=8, size=32, colour=True)
    train = labelled.read_masks([str(data / "images" / "training")], "--train")
    val = labelled.read_masks([str(data / "images" / "validation")], "--val")
    chosen = segment.Options(size=32, cache=output / "features", batch_size=4, max_steps=steps, **options)
    folder = ProbeFolder(output, settings(encoder, preset, train, val, 3, chosen))
    if preset == "knn-capi":
        return segment.nearest_patches(encoder, train, val, 3, chosen)
    high = dataclasses.replace(segment.PRESETS[preset], learning_rate=0.1)
    result = segment.linear_segmentation(encoder, train, val, 3, high, chosen, folder)
    ranks.wait()
    return {**result, "tensors": folder.load(torch.device("cpu"))[1]}


def several(classes: Path, masks: Path, output: Path) -> list[dict[str, Any]]:
    """What each rank finds."""
    cached = dataclasses.replace(TINY, augment="none")
    return [
        run_classify(classes, output / "crops"),
        run_classify(classes, output / "cached", cached),
        run_segment(masks, output / "linear"),
        run_segment(masks, output / "nearest", "knn-capi"),
    ]
