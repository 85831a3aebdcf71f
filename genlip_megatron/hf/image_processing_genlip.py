"""Resize and normalise images to exactly the pixels of training.

EXIF orientation is applied; transparency is composited on white; CMYK, palette and grey images become RGB; 16-bit greys
keep their high byte. Pillow's antialiased bilinear filter resizes.
"""

from __future__ import annotations

import copy
import os
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
    is_batch,
    native_size,
    upright_rgb,
)

_EXIF_ORIENTATION = 0x0112
_SETTINGS = ("image_mode", "size", "fixed_resize", "min_pixels", "max_pixels")
_STEPS = (*IMAGE_STEPS, "do_center_crop", "crop_size")
_NATIVE_SIZE = "size = {!r}: images keep their aspect ratio in native mode. Give min_pixels and max_pixels instead"


def to_rgb(image: Image.Image) -> Image.Image:
    """``upright_rgb`` by the image's own EXIF orientation, without metadata: others would turn the image again."""
    image.load()
    try:
        orientation = int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # broken metadata does not make the image bad
        orientation = 1
    upright = upright_rgb(image, orientation)
    upright.info = {}
    return upright


def open_image(image: Any) -> Image.Image:
    """A PIL image from one, from a file's path, or from an array of pixels.

    Arrays are uint8: NumPy [height, width, channels] or torch [channels, height, width]. Grey has 1 channel or no
    channel dimension, colour 3 channels, colour with transparency 4.

    Raises:
        ValueError: another type, shape or dtype, or no such file.
    """
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, (str, os.PathLike)):
        if not os.path.isfile(image):
            raise ValueError(f"{os.fspath(image)!r}: no such file. Give the path of a file; download URLs first")
        return Image.open(image)
    if isinstance(image, torch.Tensor):
        if image.dim() not in (2, 3):
            raise ValueError(f"a tensor of shape {list(image.shape)}: expected [channels, height, width]")
        image = (image.permute(1, 2, 0) if image.dim() == 3 else image).cpu().numpy()
    if not isinstance(image, np.ndarray):
        raise ValueError(f"a {type(image).__name__}: expected a PIL image, a path, a NumPy array or a torch tensor")
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


def _settings(image_mode: str, size: Any, fixed_resize: str, min_pixels: int, max_pixels: int) -> dict[str, Any]:
    """``image_settings``, without a ``size`` in native mode."""
    settings = image_settings(image_mode, size, fixed_resize, min_pixels, max_pixels)
    return settings | {"size": None} if image_mode == "native" else settings


class GenLIPImageProcessor(BaseImageProcessor):
    """Resizes and normalises images to the model's input.

    Args:
        image_mode: "fixed": every image to ``size``, as one batch; "native": each keeps its aspect ratio.
        size: fixed mode, ``{"height", "width"}`` in pixels, multiples of 16. Not used in native mode.
        fixed_resize: "squash" ignores the aspect ratio, "resize-center-crop" covers the size and crops the middle.
        min_pixels, max_pixels: native mode, smallest and largest area.

    Settings are attributes too, with those of stock processors: ``resample``, ``image_mean``, ``image_std`` and the
    other ``IMAGE_STEPS``, which accept only the value of this model. In native mode ``size`` is None.

    Raises:
        ValueError: an unsupported value, also if it is assigned later; names the field, the value and the allowed ones.
    """

    model_input_names = ["pixel_values", "image_grid_hw"]  # noqa: RUF012
    image_mode: str
    size: Any  # {"height", "width"} in fixed mode, None in native mode
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
        vars(self).update(_settings(image_mode, size, fixed_resize, min_pixels, max_pixels))
        vars(self).update(copy.deepcopy(IMAGE_STEPS))
        super().__init__(**{name: value for name, value in kwargs.items() if not self._is_own_step(name, value)})

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As the base class, but ``kwargs`` that replace fields are checked like these."""
        own = {name: kwargs.pop(name) for name in list(kwargs) if name in _SETTINGS or name in _STEPS}
        stored = image_processor_dict
        size = stored.get("size")
        if isinstance(size, dict) and set(size) == {
            "shortest_edge"
        }:  # of a folder for LLaVA-NeXT, whose crop is CLIP's
            stored = {name: value for name, value in stored.items() if name not in ("do_center_crop", "crop_size")}
        fields = {**stored, **own}
        if fields.get("image_mode") == "native" and own.get("size") is not None:
            raise ValueError(_NATIVE_SIZE.format(own["size"]))
        return super().from_dict(fields, **kwargs)

    @property
    def do_center_crop(self) -> bool:
        """Whether the resized image's middle is cut out."""
        return self.image_mode == "fixed" and self.fixed_resize == "resize-center-crop"

    @property
    def crop_size(self) -> dict[str, int] | None:
        """``size``, which every image has in fixed mode; None in native mode."""
        return self.size

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; a setting is checked as in the constructor."""
        if name in _SETTINGS:
            settings = {field: getattr(self, field) for field in _SETTINGS} | {name: value}
            if name == "size" and value is not None and self.image_mode == "native":
                raise ValueError(_NATIVE_SIZE.format(value))
            vars(self).update(_settings(**settings))
        elif not self._is_own_step(name, value):
            super().__setattr__(name, value)

    def _is_own_step(self, name: str, value: Any) -> bool:
        """Whether it is a step of this processor, with its only value.

        Raises:
            ValueError: a step with another value.
        """
        if name not in _STEPS:
            return False
        own = getattr(self, name)
        if value is not None and not np.array_equal(value, own):
            raise ValueError(f"{name} = {value!r}: allowed is {own!r}")
        return True

    def to_dict(self) -> dict[str, Any]:
        """The fields of ``preprocessor_config.json``.

        If a stock processor resizes and normalises in the same way, they name it, for callers that do not allow this
        file to run.
        """
        fields = super().to_dict()
        if self.image_mode == "fixed" and self.fixed_resize == "squash":
            fields["image_processor_type"] = "ViTImageProcessor"
        return fields

    to_rgb = staticmethod(to_rgb)

    def preprocess(self, images: Any, return_tensors: str | None = None, **kwargs: Any) -> BatchFeature:
        """Normalised images.

        Args:
            images: one or a list of PIL images, paths, uint8 NumPy arrays [height, width, 3] or uint8 torch tensors
                [3, height, width]; arrays and tensors may hold a batch in a first dimension.
            return_tensors: "pt" (the default) or "np".
            kwargs: settings of this processor, which a call cannot change.

        Returns:
            One image, or images in fixed mode: ``pixel_values`` float32 [N, 3, height, width] in [-1, 1]. A list in
            native mode: ``pixel_values`` float32 [P, 768], the patches of all images end to end, row by row, each as
            (channel, row, column). In native mode also ``image_grid_hw`` int64 [N, 2], rows and columns of each image.

        Raises:
            ValueError: an invalid image; names its index, from 0, and the reason. Or a changed setting.
        """
        for name, value in kwargs.items():
            if value is None or self._is_own_step(name, value):
                continue
            if name not in _SETTINGS:
                raise ValueError(f"{name} = {value!r}: not an option of GenLIPImageProcessor. Remove it")
            if value != getattr(self, name):
                raise ValueError(f"{name} = {value!r}: a call cannot change it. Give it to from_pretrained")
        one = not is_batch(images)
        images = [images] if one else list(images)
        if not images:
            raise ValueError("images is empty: expected at least one")
        pixels = []
        for index, image in enumerate(images):
            try:
                pixels.append(self._normalised(image))
            except Exception as error:  # codecs raise their own errors
                raise ValueError(f"image {index} of {len(images)}: {error}") from error
        native = self.image_mode == "native"
        packed = native and not one
        data = {"pixel_values": np.concatenate([self._patches(x) for x in pixels]) if packed else np.stack(pixels)}
        if native:
            sides = [[x.shape[1] // PATCH_SIZE, x.shape[2] // PATCH_SIZE] for x in pixels]
            data["image_grid_hw"] = np.array(sides, np.int64)
        return BatchFeature(data, tensor_type=return_tensors or "pt")

    def _normalised(self, image: Any) -> np.ndarray:
        """float32 [3, height, width]."""
        rgb = to_rgb(open_image(image))
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
