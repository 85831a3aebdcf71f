"""The image settings in a ``preprocessor_config.json`` of this project, of the authors, or of a stock processor.

A field that this project cannot compute, or does not know, is refused, because other pixels give other features.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from genlip_megatron.hf.shared_genlip import IMAGE_STEPS, PATCH_SIZE, image_settings

# Stock processors of transformers -> whether they resize the shortest edge and crop the middle by default.
_STOCK = {"ViTImageProcessor": False, "SiglipImageProcessor": False, "CLIPImageProcessor": True}
# Defaults of stock processors differ in these, so a file of another project must give them.
_CHOSEN = ("resample", "image_mean", "image_std")
# The authors' processor for native sizes, and its value for this model.
_NATIVE = {"patch_size": PATCH_SIZE, "merge_size": 1, "temporal_patch_size": 1}
# Fields that change no pixel.
_OTHER = {"image_processor_type", "feature_extractor_type", "processor_class", "auto_map", "_valid_processor_keys"} | {
    "data_format",
    "input_data_format",
    "return_tensors",
    "device",
}


def read_image_settings(fields: Mapping[str, Any]) -> dict[str, Any]:
    """``image_settings`` of the fields.

    A processor that resizes the shortest edge and crops as much from the middle becomes "resize-center-crop"; stock
    processors cut off the fraction of the longer edge, which this project rounds.

    Raises:
        ValueError: a missing, unknown or unsupported field; names it.
    """
    own = "image_mode" in fields
    for name, allowed in IMAGE_STEPS.items():
        if name not in fields and name in _CHOSEN and not own:
            raise ValueError(f"{name} is missing: its default depends on the image processor. Add {name}")
        value = fields.get(name, allowed)
        if name in ("image_mean", "image_std"):
            value = list(value) if isinstance(value, (list, tuple)) else [value] * 3
        if value != allowed and name != "do_convert_rgb":  # images are always converted
            raise _unsupported(name, fields[name], f"this project has only {allowed!r}")
    if own:
        known = inspect.signature(image_settings).parameters
        return image_settings(**{name: fields[name] for name in known if name in fields})
    native = {"min_pixels", "max_pixels", *_NATIVE}
    if native.intersection(fields):
        _check_known(fields, {"size", *native})
        return _native(fields)
    _check_known(fields, {"size", "crop_size", "do_center_crop"})
    return _fixed(fields)


def _check_known(fields: Mapping[str, Any], known: set[str]) -> None:
    for name, value in fields.items():
        # A step that is off is no step.
        if name not in {*IMAGE_STEPS, *_OTHER, *known} and value not in (None, False):
            raise _unsupported(name, value, "this project has no such step")


def _native(fields: Mapping[str, Any]) -> dict[str, Any]:
    for name, only in _NATIVE.items():
        if fields.get(name) != only:
            raise _unsupported(name, fields.get(name), f"this project has only {only}")
    size = fields.get("size")
    areas = size if isinstance(size, Mapping) else {}
    names = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
    # As in those processors, the named limits take precedence over the same limits in the size.
    limits: dict[str, Any] = {
        name: areas.get(other) if fields.get(name) is None else fields[name] for name, other in names.items()
    }
    return image_settings("native", **limits)


def _fixed(fields: Mapping[str, Any]) -> dict[str, Any]:
    given = fields.get("image_processor_type") or fields.get("feature_extractor_type")
    kind = str(given).removesuffix("Fast").replace("FeatureExtractor", "ImageProcessor")
    if kind not in _STOCK:
        known = f"this project knows {', '.join(_STOCK)}, and native sizes with min_pixels and max_pixels"
        raise _unsupported("image_processor_type", given, known)
    crops = _STOCK[kind]
    size: Any = fields.get("size")
    if size is None:
        raise ValueError("size is missing: expected height and width. Add size")
    edge: Any = size if crops and isinstance(size, int) else None
    if isinstance(size, Mapping) and set(size) == {"shortest_edge"}:
        edge = size["shortest_edge"]
    if not fields.get("do_center_crop", crops):
        if edge is not None:
            raise _unsupported("size", size, "without a crop, sizes vary with the image")
        return image_settings(size=size)
    if not crops:
        raise _unsupported("do_center_crop", True, f"{kind} has no such step")
    crop = fields.get("crop_size", 224)
    sides: Any = crop if isinstance(crop, Mapping) else {"height": crop, "width": crop}
    if size == sides:
        return image_settings(size=size)
    if edge is None or (edge, edge) != (sides.get("height"), sides.get("width")):
        raise _unsupported("crop_size", crop, f"only a square crop of the whole shorter side, here size = {size!r}")
    return image_settings(size=dict(sides), fixed_resize="resize-center-crop")


def _unsupported(name: str, value: Any, why: str) -> ValueError:
    return ValueError(f"{name} = {value!r}: {why}. Correct or remove the file; without it, defaults apply")
