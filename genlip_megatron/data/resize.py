"""Resolution rules of native-aspect images, as a pure function."""

from __future__ import annotations

import math

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
