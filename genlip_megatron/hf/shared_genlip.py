"""Settings and image rules that the other files of this folder share. Needs neither torch nor transformers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL import Image  # only images need Pillow, not a model or its configuration

PATCH_SIZE = 16
PATCH_VALUES = 3 * PATCH_SIZE * PATCH_SIZE
MAX_ASPECT_RATIO = 200
# Fields of the configuration with one supported value: another value would mean another computation.
FIXED: dict[str, Any] = {
    "patch_size": PATCH_SIZE,
    "num_channels": 3,
    "hidden_act": "silu",
    "use_swiglu_ffn": True,
    "attention_dropout": 0.0,
    "spatial_merge_size": 1,
    "mrope_interleaved": True,
    "use_llm_head": False,
    "llm_decoder": None,
    "tie_word_embeddings": False,
}
# The steps of a stock image processor, by its names, so that a stock processor can replace this project's.
IMAGE_STEPS: dict[str, Any] = {
    "do_resize": True,
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "do_convert_rgb": True,
}
# EXIF orientation -> the member of PIL.Image.Transpose that turns the image upright.
UPRIGHT = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
_ROPE: dict[str, tuple[Any, ...]] = {
    "type": ("default", "mrope"),
    "rope_type": ("default", "mrope"),
    "mrope_interleaved": (True,),
}


def is_count(value: Any, low: int = 1) -> bool:
    """Whether it is a whole number of at least ``low``."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def rope_settings(fields: Mapping[str, Any]) -> dict[str, Any]:
    """``mrope_section`` and ``rope_theta``, where given, of ``rope_scaling`` and ``rope_parameters``.

    Newer versions of transformers write the second name.

    Raises:
        ValueError: an unsupported setting, or the two contradict each other.
    """
    names = ("rope_scaling", "rope_parameters")
    older, newer = (fields.get(name) or {} for name in names)
    for name, rope in zip(names, (older, newer), strict=True):
        if not isinstance(rope, dict):
            raise ValueError(f"{name} = {rope!r}: expected an object")
        for key, value in rope.items():
            if key in _ROPE and value not in _ROPE[key]:
                raise ValueError(f"{name}.{key} = {value!r}: only {_ROPE[key][0]!r} is supported")
            if key not in (*_ROPE, "mrope_section", "rope_theta"):
                raise ValueError(f"{name}.{key} = {value!r}: this setting is not supported")
        section = rope.get("mrope_section")
        is_section = isinstance(section, (list, tuple)) and len(section) == 3 and all(is_count(x, 0) for x in section)
        if section is not None and not is_section:
            raise ValueError(f"{name}.mrope_section = {section!r}: must be three whole numbers, for T, H and W")
    for key in ("mrope_section", "rope_theta"):
        if key in older and key in newer and older[key] != newer[key]:
            raise ValueError(
                f"rope_scaling.{key} = {older[key]!r}: rope_parameters.{key} = {newer[key]!r} is another name of this "
                "setting. Remove the wrong one"
            )
    return {key: value for key, value in (older | newer).items() if key not in _ROPE and value is not None}


def image_settings(
    image_mode: str = "fixed",
    size: dict[str, int] | int | None = None,
    fixed_resize: str = "squash",
    min_pixels: int = 4096,
    max_pixels: int = 262144,
) -> dict[str, Any]:
    """The arguments as fields of ``preprocessor_config.json``; ``size`` as {"height", "width"}, by default 224.

    Raises:
        ValueError: a value is not allowed; names the field.
    """
    if image_mode not in ("fixed", "native"):
        raise ValueError(f"image_mode = {image_mode!r}: allowed are 'fixed' and 'native'")
    if fixed_resize not in ("squash", "resize-center-crop"):
        raise ValueError(f"fixed_resize = {fixed_resize!r}: allowed are 'squash' and 'resize-center-crop'")
    sides: Any = {"height": 224, "width": 224} if size is None else size
    if isinstance(sides, Mapping) and set(sides) == {"shortest_edge"}:  # of a folder for LLaVA-NeXT
        sides = sides["shortest_edge"]
    sides = {"height": sides, "width": sides} if isinstance(sides, int) else sides
    if hasattr(sides, "height") and hasattr(sides, "width"):  # the SizeDict of newer versions of transformers
        sides = {"height": sides.height, "width": sides.width}
    known = isinstance(sides, Mapping) and set(sides) == {"height", "width"}
    if not known or any(not is_count(side) or side % PATCH_SIZE for side in sides.values()):
        raise ValueError(f"size = {sides!r}: expected height and width, multiples of {PATCH_SIZE}")
    if not (is_count(min_pixels, PATCH_SIZE**2) and is_count(max_pixels, min_pixels)):
        raise ValueError(
            f"min_pixels = {min_pixels!r}, max_pixels = {max_pixels!r}: expected whole numbers, {PATCH_SIZE**2} <= min "
            "<= max"
        )
    return {
        "image_mode": image_mode,
        "size": dict(sides),
        "fixed_resize": fixed_resize,
        "min_pixels": min_pixels,
        "max_pixels": max_pixels,
    }


def check_aspect_ratio(height: int, width: int) -> None:
    """Raise ValueError for an aspect ratio above 200."""
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(f"{height}x{width} pixels: an aspect ratio above {MAX_ASPECT_RATIO}")


def native_size(height: int, width: int, min_pixels: int = 4096, max_pixels: int = 262144) -> tuple[int, int]:
    """(height, width) in pixels, multiples of 16, that keep the aspect ratio and the area within the two limits.

    ``data.resize.native_sizes`` is the same rule for arrays.

        >>> native_size(1080, 1920), native_size(600, 800)
        ((384, 672), (432, 576))

    Raises:
        ValueError: an aspect ratio above 200.
    """
    check_aspect_ratio(height, width)
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


def is_batch(images: Any) -> bool:
    """Whether it is a list of images, or an array with a batch dimension, rather than one image."""
    return getattr(images, "ndim", 0) == 4 or (isinstance(images, Sequence) and not isinstance(images, (str, bytes)))


def upright_rgb(image: Image.Image, orientation: int) -> Image.Image:
    """The image turned upright by its EXIF orientation, in RGB, transparency over white, 16-bit greys by high byte.

    Raises:
        ValueError: values that are not 8-bit or 16-bit levels.
    """
    from PIL import Image

    image.load()
    upright = UPRIGHT.get(orientation)
    pixels: Image.Image = image if upright is None else image.transpose(Image.Transpose[upright])
    if pixels.mode == "F":
        raise ValueError("an image of mode F has no known range. Convert it to 8-bit grey, mode L")
    if pixels.mode.startswith("I"):
        # Pillow's own conversion would clip 16-bit greys to white instead of scaling them.
        levels = np.asarray(pixels)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError(
                f"an image of mode {pixels.mode} with values from {levels.min()} to {levels.max()}: expected 16-bit "
                "greys, from 0 to 65535"
            )
        pixels = Image.fromarray((levels.astype(np.uint32) >> 8).astype(np.uint8))
    elif pixels.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        pixels = pixels.convert("RGBA")
        pixels = Image.alpha_composite(Image.new("RGBA", pixels.size, "white"), pixels)
    return pixels.convert("RGB")
