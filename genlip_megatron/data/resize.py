"""Resolution rules of both stages and rotary positions, as pure functions."""

from __future__ import annotations

import math

import numpy as np

from genlip_megatron.batch import PATCH_SIZE

MAX_ASPECT_RATIO = 200


def native_size(height: int, width: int, min_pixels: int = 4096, max_pixels: int = 262144) -> tuple[int, int]:
    """(height, width) in pixels, multiples of 16, that keep the aspect ratio and stay within the two areas.

        >>> native_size(1080, 1920), native_size(600, 800)
        ((384, 672), (432, 576))

    Raises:
        ValueError: an aspect ratio above 200.
    """
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(f"{height}x{width} pixels: an aspect ratio above {MAX_ASPECT_RATIO}")
    new_height, new_width = (max(1, round(side / PATCH_SIZE)) * PATCH_SIZE for side in (height, width))
    if new_height * new_width > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        new_height, new_width = (
            max(PATCH_SIZE, math.floor(side / scale / PATCH_SIZE) * PATCH_SIZE) for side in (height, width)
        )
    elif new_height * new_width < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        new_height, new_width = (math.ceil(side * scale / PATCH_SIZE) * PATCH_SIZE for side in (height, width))
    return new_height, new_width


def sample_positions(rows: int, columns: int, text_length: int) -> np.ndarray:
    """int64 [3, rows * columns + text_length]: T, H, W positions of a sample, image first.

    Patch (h, w) is at (0, h, w); text token k at max(rows, columns) + k on every axis.

        >>> sample_positions(1, 2, 2).tolist()
        [[0, 0, 2, 3], [0, 0, 2, 3], [0, 1, 2, 3]]
    """
    count = rows * columns
    positions = np.zeros((3, count + text_length), dtype=np.int64)
    positions[1, :count] = np.repeat(np.arange(rows), columns)
    positions[2, :count] = np.tile(np.arange(columns), rows)
    positions[:, count:] = np.arange(text_length) + max(rows, columns)
    return positions
