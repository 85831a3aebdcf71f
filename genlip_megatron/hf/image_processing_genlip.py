"""Resize and normalise images to exactly the pixels of training.

EXIF orientation is applied; transparency is composited on white; CMYK, palette and grey images become RGB; 16-bit greys
keep their high byte. Pillow's antialiased bilinear filter resizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature

from .shared_genlip import (
    IMAGE_STEPS,
    PATCH_SIZE,
    PATCH_VALUES,
    check_aspect_ratio,
    image_settings,
    native_size,
    upright_rgb,
)

_EXIF_ORIENTATION = 0x0112


def to_rgb(image: Image.Image) -> Image.Image:
    """``upright_rgb`` by the image's own EXIF orientation."""
    image.load()
    try:
        orientation = int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # broken metadata does not make the image bad
        orientation = 1
    return upright_rgb(image, orientation)


def open_array(image: Any) -> Image.Image:
    """A PIL image from one, from uint8 NumPy [height, width, channels] or from torch uint8 [channels, height, width].

    Grey has 1 channel or no channel dimension, colour 3 channels, colour with transparency 4.

    Raises:
        ValueError: another type, shape or dtype.
    """
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, torch.Tensor):
        if image.dim() not in (2, 3):
            raise ValueError(f"a tensor of shape {list(image.shape)}: expected [channels, height, width]")
        image = (image.permute(1, 2, 0) if image.dim() == 3 else image).cpu().numpy()
    if not isinstance(image, np.ndarray):
        raise ValueError(f"a {type(image).__name__}: expected a PIL image, a NumPy array or a torch tensor")
    if image.dtype != np.uint8:
        raise ValueError(f"values of {image.dtype}: expected uint8 from 0 to 255")
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[:, :, 0]
    if not image.size or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4))):
        raise ValueError(
            f"shape {list(image.shape)} as height, width, channels: expected 1, 3 or 4 channels; NumPy arrays have "
            "them last, torch tensors first"
        )
    return Image.fromarray(np.ascontiguousarray(image))


class GenLIPImageProcessor(BaseImageProcessor):
    """Resizes and normalises images to the model's input.

    Args:
        image_mode: "fixed": every image to ``size``, as one batch; "native": each keeps its aspect ratio.
        size: fixed mode, ``{"height", "width"}`` in pixels, multiples of 16.
        fixed_resize: "squash" ignores the aspect ratio, "resize-center-crop" covers the size and crops the middle.
        min_pixels, max_pixels: native mode, smallest and largest area.

    The steps of stock processors (``resample``, ``image_mean`` and so on) accept only the value of this model.

    Raises:
        ValueError: an unsupported value; names the field, the value and the allowed values.
    """

    model_input_names = ["pixel_values", "image_grid_hw"]  # noqa: RUF012
    image_mode: str
    size: dict[str, int]
    fixed_resize: str
    min_pixels: int
    max_pixels: int

    def __init__(
        self,
        image_mode: str = "fixed",
        size: dict[str, int] | int | None = None,
        fixed_resize: str = "squash",
        min_pixels: int = 4096,
        max_pixels: int = 262144,
        **kwargs: Any,
    ) -> None:
        for name, allowed in IMAGE_STEPS.items():
            value = kwargs.pop(name, allowed)
            if (list(value) if isinstance(value, tuple) else value) != allowed:
                raise ValueError(f"{name} = {value!r}: allowed is {allowed!r}")
        super().__init__(**kwargs)
        vars(self).update(image_settings(image_mode, size, fixed_resize, min_pixels, max_pixels))

    def to_dict(self) -> dict[str, Any]:
        """The fields of ``preprocessor_config.json``.

        If a stock processor gives the same pixels, they name it, for callers that do not allow this file to run.
        """
        fields = {**super().to_dict(), **IMAGE_STEPS}
        if self.image_mode == "fixed" and self.fixed_resize == "squash":
            fields["image_processor_type"] = "ViTImageProcessor"
        return fields

    def preprocess(self, images: Any, return_tensors: str | None = None, **kwargs: Any) -> BatchFeature:
        """Normalised images.

        Args:
            images: one or a list of PIL images, uint8 NumPy arrays [height, width, 3] or uint8 torch tensors
                [3, height, width]; arrays and tensors may hold a batch in a first dimension.
            return_tensors: "pt" (the default) or "np".

        Returns:
            Fixed mode: ``pixel_values`` float32 [N, 3, height, width] in [-1, 1]. Native mode: ``pixel_values``
            float32 [P, 768], the patches of all images end to end, row by row, each as (channel, row, column), and
            ``image_grid_hw`` int64 [N, 2], rows and columns of each image.

        Raises:
            ValueError: an invalid image; names its index, from 0, and the reason.
        """
        if kwargs:
            raise ValueError(f"{', '.join(sorted(kwargs))}: not an option of a call. Give it to the constructor")
        if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
            images = list(images)
        if not isinstance(images, Sequence):
            images = [images]
        if not images:
            raise ValueError("images is empty: expected at least one")
        pixels = []
        for index, image in enumerate(images):
            try:
                pixels.append(self._normalised(image))
            except Exception as error:  # codecs raise their own errors
                raise ValueError(f"image {index} of {len(images)}: {error}") from error
        if self.image_mode == "fixed":
            return BatchFeature({"pixel_values": np.stack(pixels)}, tensor_type=return_tensors or "pt")
        grid = np.array([[x.shape[1] // PATCH_SIZE, x.shape[2] // PATCH_SIZE] for x in pixels], np.int64)
        patches = np.concatenate([self._patches(x) for x in pixels])
        return BatchFeature({"pixel_values": patches, "image_grid_hw": grid}, tensor_type=return_tensors or "pt")

    def _normalised(self, image: Any) -> np.ndarray:
        """float32 [3, height, width]."""
        rgb = to_rgb(open_array(image))
        width, height = rgb.size
        check_aspect_ratio(height, width)
        pixels = np.asarray(self._resized(rgb), np.float32)
        # (x / 255 - 0.5) / 0.5, rounded as in training.
        pixels = pixels * np.float32(1 / 127.5) - np.float32(1)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def _resized(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        if self.image_mode == "native":
            new_height, new_width = native_size(height, width, self.min_pixels, self.max_pixels)
            return image.resize((new_width, new_height), Image.Resampling.BILINEAR)
        target = (self.size["width"], self.size["height"])
        if self.fixed_resize == "squash":
            return image.resize(target, Image.Resampling.BILINEAR)
        scale = max(target[0] / width, target[1] / height)
        scaled = (max(target[0], round(width * scale)), max(target[1], round(height * scale)))
        left, top = (scaled[0] - target[0]) // 2, (scaled[1] - target[1]) // 2
        image = image.resize(scaled, Image.Resampling.BILINEAR)
        return image.crop((left, top, left + target[0], top + target[1]))

    @staticmethod
    def _patches(pixels: np.ndarray) -> np.ndarray:
        _, height, width = pixels.shape
        grid = pixels.reshape(3, height // PATCH_SIZE, PATCH_SIZE, width // PATCH_SIZE, PATCH_SIZE)
        return grid.transpose(1, 3, 0, 2, 4).reshape(-1, PATCH_VALUES)
