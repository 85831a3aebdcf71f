"""Resolution rules for images of native aspect ratio, as pure functions."""

from __future__ import annotations

import math

import numpy as np

from genlip_megatron.config import PATCH_SIZE
from genlip_megatron.hf.shared_genlip import MAX_ASPECT_RATIO as MAX_ASPECT_RATIO
from genlip_megatron.hf.shared_genlip import native_size as native_size


def most_patches(min_pixels: int, max_pixels: int) -> int:
    """An upper bound on the patches that ``native_size`` gives to any image.

    A thin image may exceed ``max_pixels``, because no side is smaller than a patch, and rounding up may exceed
    ``min_pixels``. Both excesses are largest at the largest aspect ratio.

        >>> most_patches(4096, 262144), most_patches(4096, 16384)
        (1024, 113)
    """
    thin = math.floor(math.sqrt(max_pixels * MAX_ASPECT_RATIO) / PATCH_SIZE)
    short, long = math.sqrt(min_pixels / MAX_ASPECT_RATIO), math.sqrt(min_pixels * MAX_ASPECT_RATIO)
    enlarged = math.floor((short / PATCH_SIZE + 1) * (long / PATCH_SIZE + 1))
    return max(max_pixels // PATCH_SIZE**2, thin, enlarged)


def native_sizes(
    heights: np.ndarray, widths: np.ndarray, min_pixels: int = 4096, max_pixels: int = 262144
) -> tuple[np.ndarray, np.ndarray]:
    """``native_size`` of many images: int64 [N] heights and widths from integer [N] heights and widths."""
    sides = np.stack((heights, widths)).astype(np.float64)
    area = sides[0] * sides[1]
    whole = np.maximum(1.0, np.rint(sides / PATCH_SIZE)) * PATCH_SIZE
    pixels = whole[0] * whole[1]
    # The same operations in the same order as in native_size, so that rounding cannot differ.
    smaller = np.maximum(PATCH_SIZE, np.floor(sides / np.sqrt(area / max_pixels) / PATCH_SIZE) * PATCH_SIZE)
    larger = np.ceil(sides * np.sqrt(min_pixels / area) / PATCH_SIZE) * PATCH_SIZE
    chosen = np.where(pixels > max_pixels, smaller, np.where(pixels < min_pixels, larger, whole))
    return chosen[0].astype(np.int64), chosen[1].astype(np.int64)
