"""Encoders that ``transformers`` loads: CLIP, SigLIP, SigLIP 2, AIMv2, MLCD, RICE, DINOv2 and DINOv3.

Features "after_norm" are ``last_hidden_state``. CLIP's and MLCD's final norm covers only the class token, so for them
it is the last block's output. Other layers are read from the blocks themselves: some versions of ``transformers`` put
the normalised output into ``hidden_states[-1]``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from genlip_megatron.encoders.flags import AFTER_NORM
from genlip_megatron.encoders.interface import BlockOutput, Encoder, layer_from_end
from genlip_megatron.encoders.random_weights import randomised
from genlip_megatron.hf.image_processing_genlip import to_rgb
from genlip_megatron.optional import need

_CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Family:
    """What the classes of one family have in common.

    Attributes:
        prefix: number of prefix tokens, from the configuration.
        normalisation: (mean, std) if the folder has no ``preprocessor_config.json``.
        other_sizes: "flag" if ``interpolate_pos_encoding`` is needed, "yes", or "no".
        default_size: side of images if the configuration has no ``image_size``.
    """

    prefix: Callable[[Any], int]
    normalisation: tuple[tuple[float, ...], tuple[float, ...]]
    other_sizes: str
    default_size: int = 224


def _registers(config: Any) -> int:
    return 1 + getattr(config, "num_register_tokens", 0)


FAMILIES = {
    "clip": Family(lambda config: 1, _CLIP, "flag"),
    "siglip": Family(lambda config: 0, _HALF, "flag"),
    "siglip2": Family(lambda config: 0, _HALF, "yes", 256),
    "aimv2": Family(lambda config: 0, _CLIP, "no"),
    "mlcd": Family(lambda config: 1, _CLIP, "yes", 336),
    "dinov2": Family(lambda config: 1, _IMAGENET, "yes"),
    "dinov2_with_registers": Family(_registers, _IMAGENET, "yes"),
    "dinov3_vit": Family(_registers, _IMAGENET, "yes"),
}


class HuggingFaceEncoder(Encoder):
    """A vision model of one of ``FAMILIES``."""

    def __init__(self, name: str, module: Any, folder: dict[str, Any], layer: str = AFTER_NORM) -> None:
        """``folder``: the fields of its ``preprocessor_config.json``, {} without one."""
        config = module.config
        self.family = family_of(config.model_type)
        family = FAMILIES[self.family]
        size = None if self.family == "siglip2" else getattr(config, "image_size", family.default_size)
        super().__init__(
            name,
            module,
            dim=config.hidden_size,
            patch=config.patch_size,
            size=size,
            mean=folder.get("image_mean", family.normalisation[0]),
            std=folder.get("image_std", family.normalisation[1]),
            layer=layer,
        )
        self._prefix = family.prefix(config)
        self._max_patches = int(folder.get("max_num_patches", getattr(config, "num_patches", 256)))
        self._blocks = max(
            (child for child in module.modules() if isinstance(child, nn.ModuleList)), key=lambda blocks: len(blocks)
        )
        self._state = layer_from_end(layer, len(self._blocks), name)

    def preprocessing_facts(self) -> tuple[Any, ...]:
        """The largest number of patches of an image."""
        return (self._max_patches,)

    def resize(self, image: Image.Image) -> Image.Image:
        """Squashed to the size of its training; SigLIP 2 NaFlex: the native shape, at most ``max_num_patches``."""
        if self.size is not None:
            return super().resize(image)
        rgb = to_rgb(image)
        return rgb.resize(naflex_size(rgb.width, rgb.height, self.patch, self._max_patches), Image.Resampling.BILINEAR)

    def check_size(self, height: int, width: int) -> None:
        """As ``Encoder.check_size``; AIMv2 with learned positions reads only its own size."""
        super().check_size(height, width)
        fixed = FAMILIES[self.family].other_sizes == "no" and not getattr(self.module.config, "is_native", False)
        if fixed and (height, width) != (self.size, self.size):
            raise ValueError(
                f"--encoder {self.name}: {height} x {width} pixels, but this AIMv2 has learned positions only for "
                f"{self.size} x {self.size}. Use that size, or a `native` AIMv2."
            )

    def _encode_batch(self, pixels: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        arguments: dict[str, Any] = {"pixel_values": pixels}
        if self.family == "siglip2":
            arguments = _naflex(pixels, grid, self.patch)
        elif FAMILIES[self.family].other_sizes == "flag":
            arguments["interpolate_pos_encoding"] = pixels.shape[2:] != (self.size, self.size)
        if self._state is None:
            tokens = self.module(**arguments).last_hidden_state
        else:
            with BlockOutput(self._blocks[self._state - 1]) as block:
                self.module(**arguments)
            tokens = block.value
        return tokens[:, : self._prefix], tokens[:, self._prefix :]


def _naflex(pixels: Tensor, grid: tuple[int, int], patch: int) -> dict[str, Tensor]:
    """SigLIP 2 NaFlex's inputs: patches [B, h * w, p * p * 3], each as (row, column, channel); none is padding."""
    rows, columns = grid
    patches = pixels.unflatten(3, (columns, patch)).unflatten(2, (rows, patch))  # [B, 3, h, p, w, p]
    patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    shape = torch.tensor(grid, device=pixels.device).expand(len(pixels), 2)
    mask = torch.ones(patches.shape[:2], dtype=torch.int32, device=pixels.device)
    return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shape}


def naflex_size(width: int, height: int, patch: int, most: int) -> tuple[int, int]:
    """(width, height) in whole patches, at most ``most``, of an image at the largest scale, each side rounded up.

    >>> naflex_size(640, 480, 16, 256)
    (288, 224)
    """
    # The largest scale makes one of the sides a whole number of patches; the other is rounded up.
    by_width = ((Fraction(columns, width), columns, -(-columns * height // width)) for columns in range(1, most + 1))
    by_height = ((Fraction(rows, height), -(-rows * width // height), rows) for rows in range(1, most + 1))
    fitting = [(scale, c, r) for scale, c, r in (*by_width, *by_height) if c * r <= most]
    _, columns, rows = max(fitting, default=(0, 1, 1))
    return columns * patch, rows * patch


def family_of(model_type: str) -> str:
    """The family of a ``model_type``; "" if it is none of ``FAMILIES``.

    >>> family_of("clip_vision_model"), family_of("dinov3_vit"), family_of("bert")
    ('clip', 'dinov3_vit', '')
    """
    family = model_type.removesuffix("_vision_model")
    return family if family in FAMILIES else ""


def open_hugging_face(
    where: str, name: str, *, layer: str, device: torch.device, dtype: torch.dtype | str, random_weights: bool
) -> HuggingFaceEncoder:
    """Load a folder or a name on the hub; of a model with two towers, the vision tower.

    Raises:
        ValueError: not to be found, or another family.
    """
    need("transformers")
    from transformers import AutoConfig, AutoModel

    is_folder = Path(where).is_dir()
    try:
        config = AutoConfig.from_pretrained(where)
    except (OSError, ValueError) as error:
        hint = (
            " Check its config.json."
            if is_folder
            else " Without a network, name a folder that holds config.json and the weights."
        )
        raise ValueError(f"--encoder {name}: cannot be opened ({_first_line(error)}).{hint}") from None
    if not family_of(config.model_type):
        raise ValueError(
            f"--encoder {name}: its config.json says model_type {config.model_type!r}. Known are "
            f"{', '.join(FAMILIES)}, their two-tower models, and GenLIP. Name one of these."
        )
    try:
        model, report = AutoModel.from_pretrained(where, dtype=dtype, output_loading_info=True)
    except Exception as error:  # damaged files raise what their format's library raises
        raise ValueError(
            f"--encoder {name}: its weights cannot be loaded ({_first_line(error)}). Download it again."
        ) from None
    if missing := sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]])):
        raise ValueError(
            f"--encoder {name}: its weights lack {missing[0]} ({len(missing)} in all), or its shape differs. Download "
            "it again."
        )
    if hasattr(model, "text_model"):
        model = model.vision_model
    if random_weights:
        model = randomised(model)
    model.requires_grad_(False).eval().to(device)
    fields = _preprocessor(where) if is_folder else _hub_preprocessor(where)
    return HuggingFaceEncoder(name, model, fields, layer)


def _preprocessor(folder: str) -> dict[str, Any]:
    """The fields of a folder's ``preprocessor_config.json`` (or of ``processor_config.json``); {} without one."""
    for file in ("preprocessor_config.json", "processor_config.json"):
        path = Path(folder, file)
        if path.is_file():
            fields = json.loads(path.read_text(encoding="utf-8"))
            return dict(fields.get("image_processor", fields))
    return {}


def _hub_preprocessor(name: str) -> dict[str, Any]:
    from huggingface_hub import snapshot_download

    return _preprocessor(snapshot_download(name, allow_patterns=["*processor_config.json"]))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
