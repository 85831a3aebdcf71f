"""The image settings in a ``preprocessor_config.json`` of this project, of the authors, or of a stock processor.

A field that this project cannot compute is refused, because other pixels give other features.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from genlip_megatron.hf.shared_genlip import IMAGE_STEPS, PATCH_SIZE, image_settings

_MAPPED = (*IMAGE_STEPS, "do_center_crop")
# Defaults of stock processors differ in these, so a file of another project must give them.
_CHOSEN = ("resample", "image_mean", "image_std")
# The authors' processor for native sizes, and its value for this model.
_NATIVE = {"patch_size": PATCH_SIZE, "merge_size": 1, "temporal_patch_size": 1}


def read_image_settings(fields: Mapping[str, Any]) -> dict[str, Any]:
    """``image_settings`` of the fields.

    A processor that resizes the shortest edge and crops as much from the middle becomes "resize-center-crop"; stock
    processors cut off the fraction of the longer edge, which this project rounds.

    Raises:
        ValueError: a missing or unsupported field; names it.
    """
    own = "image_mode" in fields
    for name, allowed in IMAGE_STEPS.items():
        if name not in fields and name in _CHOSEN and not own:
            raise ValueError(f"{name} is missing: its default depends on the image processor. Add {name}")
        value = fields.get(name, allowed)
        if name in ("image_mean", "image_std"):
            value = list(value) if isinstance(value, (list, tuple)) else [value] * 3
        if value != allowed and name != "do_convert_rgb":  # images are always converted
            raise _unsupported(name, fields[name], f"only {allowed!r}")
    if own:
        known = inspect.signature(image_settings).parameters
        return image_settings(**{name: fields[name] for name in known if name in fields})
    for name, value in fields.items():
        if name.startswith("do_") and value and name not in _MAPPED:
            raise _unsupported(name, value, "no such step")
    size = fields.get("size")
    if "max_num_patches" in fields:
        raise _unsupported("max_num_patches", fields["max_num_patches"], "native sizes by min_pixels and max_pixels")
    if "min_pixels" in fields or "merge_size" in fields:
        for name, only in _NATIVE.items():
            if fields.get(name) != only:
                raise _unsupported(name, fields.get(name), f"only {only}")
        areas = size if isinstance(size, Mapping) else {}
        names = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
        # As in those processors, the named limits take precedence over the same limits in the size.
        limits: dict[str, Any] = {
            name: areas.get(other) if fields.get(name) is None else fields[name] for name, other in names.items()
        }
        return image_settings("native", **limits)
    if size is None:
        raise ValueError("size is missing: expected height and width. Add size")
    edge = size.get("shortest_edge") if isinstance(size, Mapping) and len(size) == 1 else None
    if not fields.get("do_center_crop"):
        if edge is not None:
            raise _unsupported("size", size, "no sizes that vary with the image, except by min_pixels and max_pixels")
        return image_settings(size=size)
    crop = fields.get("crop_size")
    sides: Any = crop if isinstance(crop, Mapping) else {"height": crop, "width": crop}
    if size == sides:
        return image_settings(size=size)
    if (size if edge is None else edge) != sides.get("height") or sides.get("height") != sides.get("width"):
        raise _unsupported("crop_size", crop, f"only a square crop of the whole shorter side; size = {size!r}")
    return image_settings(size=dict(sides), fixed_resize="resize-center-crop")


def _unsupported(name: str, value: Any, supported: str) -> ValueError:
    return ValueError(
        f"{name} = {value!r}: this project has {supported}. Correct the file, or remove it to use fixed images of "
        "224 x 224 pixels"
    )
