"""Image transforms of probes, in PIL, NumPy and torch: crops, flips, colour changes. torchvision is not needed.

Every random transform takes a NumPy generator, so a sample's augmentation depends only on the generator's seed.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

IGNORE = 255  # label of pixels that do not count
_BICUBIC, _BILINEAR = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR
_CROP_TO_RESIZE = 0.875  # 224 / 256, the crop of ImageNet evaluations


def random_resized_crop(
    image: Image.Image,
    size: int,
    rng: np.random.Generator,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Image.Image:
    """A random part of an image, resized to ``size`` x ``size``, bicubic (Inception's crop).

    Args:
        image: RGB.
        size: side of the result in pixels.
        rng: source of randomness.
        scale: range of the part's area relative to the image's, uniform.
        ratio: range of width / height, uniform in its logarithm. After ten tries without a part that fits, the centre
            of the image is taken, cut to this range.
    """
    width, height = image.size
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            break
    else:
        w, h = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))
        left, top = (width - w) // 2, (height - h) // 2
    return image.resize((size, size), _BICUBIC, (left, top, left + w, top + h))


def random_flip(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Mirrored left to right with probability 1/2."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image


def color_jitter(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """Brightness, contrast and saturation, in random order, each times a factor in 1 - ``strength`` to 1 + it."""
    kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for kind in rng.permutation(3):
        image = kinds[kind](image).enhance(rng.uniform(1 - strength, 1 + strength))
    return image


def rand_augment(policy: str) -> Callable[[Image.Image], Image.Image]:
    """timm's RandAugment, for example of policy ``rand-m9-mstd0.5-inc1``. It draws from ``random`` and NumPy's globals.

    Raises:
        ValueError: timm does not import.
    """
    try:
        from timm.data.auto_augment import rand_augment_transform
    except Exception as error:  # torchvision beside another build of torch fails with many kinds of errors
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"--preset aimv2: RandAugment needs timm, which does not import ({reason}). Install timm and a torchvision "
            "that fits this torch, or use --preset capi, or --no-rand-augment."
        ) from None
    return rand_augment_transform(policy, {})  # type: ignore[no-any-return]


def resize_and_crop(image: Image.Image, size: int) -> Image.Image:
    """The evaluation's view: short side ``size`` / 0.875, bicubic, then the centre ``size`` x ``size``.

    >>> resize_and_crop(Image.new("RGB", (640, 480)), 224).size
    (224, 224)
    """
    resized = resize_short(image, round(size / _CROP_TO_RESIZE), _BICUBIC)
    left, top = (resized.width - size) // 2, (resized.height - size) // 2
    return resized.crop((left, top, left + size, top + size))


def resize_short(image: Image.Image, short: int, resample: Image.Resampling = _BILINEAR) -> Image.Image:
    """Resized so that the short side is ``short``; the shape is kept.

    >>> resize_short(Image.new("RGB", (640, 480)), 256).size
    (341, 256)
    """
    scale = short / min(image.size)
    width, height = (max(short, round(side * scale)) for side in image.size)
    return image.resize((width, height), resample)


def reduce_zero_label(labels: np.ndarray) -> np.ndarray:
    """uint8 labels of ADE20K, where 0 is "other", to classes from 0: 0 -> 255 (ignored), k -> k - 1, 255 -> 255.

    >>> reduce_zero_label(np.array([0, 1, 150, 255], np.uint8)).tolist()
    [255, 0, 149, 255]
    """
    return np.where((labels == 0) | (labels == IGNORE), IGNORE, labels - (labels > 0)).astype(np.uint8)


def segmentation_crop(
    image: Image.Image, labels: np.ndarray, size: int, rng: np.random.Generator
) -> tuple[Image.Image, np.ndarray]:
    """The training crop of DINOv2's linear segmentation, before photometric changes and padding.

    The short side becomes ``size`` x U[0.5, 2]: bilinear for the image, nearest for the labels. Then a random crop of
    at most ``size`` x ``size``, up to ten times until no class covers more than 75 % of its labelled pixels, then a
    flip with probability 1/2.

    Args:
        image: RGB.
        labels: uint8 [height, width].
        size: side of the crop in pixels.
        rng: source of randomness.
    """
    short = max(1, round(size * rng.uniform(0.5, 2.0)))
    image = resize_short(image, short)
    labels = np.asarray(Image.fromarray(labels).resize(image.size, Image.Resampling.NEAREST))
    for _ in range(10):
        top = int(rng.integers(max(image.height - size, 0) + 1))
        left = int(rng.integers(max(image.width - size, 0) + 1))
        crop = labels[top : top + size, left : left + size]
        counts = np.bincount(crop[crop != IGNORE])
        if np.count_nonzero(counts) > 1 and counts.max() < 0.75 * counts.sum():
            break
    image = image.crop((left, top, left + crop.shape[1], top + crop.shape[0]))
    if rng.random() < 0.5:
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), crop[:, ::-1]
    return image, crop


def photometric_distortion(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """SSD's colour changes, each with probability 1/2: brightness +-32 of 255, contrast and saturation times 0.5 to
    1.5, hue +-18 of 180 degrees. Contrast comes before or after saturation and hue, each with probability 1/2.
    """
    pixels = np.asarray(image, np.float32)

    def contrast(pixels: np.ndarray) -> np.ndarray:
        return pixels * rng.uniform(0.5, 1.5) if rng.random() < 0.5 else pixels

    if rng.random() < 0.5:
        pixels = pixels + rng.uniform(-32, 32)
    contrast_first = rng.random() < 0.5
    if contrast_first:
        pixels = contrast(pixels)
    hsv = np.asarray(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert("HSV"), np.float32).copy()
    if rng.random() < 0.5:
        hsv[..., 1] = (hsv[..., 1] * rng.uniform(0.5, 1.5)).clip(0, 255)
    if rng.random() < 0.5:
        hsv[..., 0] = (hsv[..., 0] + rng.uniform(-18, 18) * 256 / 180) % 256  # Pillow's hue is 0 to 255
    pixels = np.asarray(Image.fromarray(hsv.astype(np.uint8), "HSV").convert("RGB"), np.float32)
    if not contrast_first:
        pixels = contrast(pixels)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def pad_to(pixels: Tensor, labels: np.ndarray, size: int) -> tuple[Tensor, Tensor]:
    """(float32 [3, size, size], int64 [size, size]): padded at the right and bottom, the image with 0, labels with 255.

    Args:
        pixels: float32 [3, height, width], normalised, so 0 is the mean colour.
        labels: uint8 [height, width].
        size: at least the height and the width.
    """
    height, width = labels.shape
    right_bottom = (0, size - width, 0, size - height)
    target = torch.from_numpy(labels.astype(np.int64))
    return torch.nn.functional.pad(pixels, right_bottom), torch.nn.functional.pad(target, right_bottom, value=IGNORE)


def seeded(seed: int, *numbers: int) -> np.random.Generator:
    """A generator that depends only on its arguments: those of a sample, say."""
    return np.random.default_rng([seed, *numbers])


def seed_globals(rng: np.random.Generator) -> None:
    """Seed ``random`` and NumPy's global generator, for libraries that draw from them."""
    seed = int(rng.integers(2**32))
    random.seed(seed)
    np.random.seed(seed)
