"""Our own encoder, from a Megatron checkpoint of any layout, an exported folder or a released one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from genlip_megatron.encoders.flags import AFTER_NORM
from genlip_megatron.encoders.interface import Encoder, layer_from_end
from genlip_megatron.hf.image_processing_genlip import GenLIPImageProcessor


class GenLIPEncoder(Encoder):
    """GenLIP without its text parts."""

    def __init__(self, name: str, module: Any, processor: GenLIPImageProcessor, layer: str = AFTER_NORM) -> None:
        native = processor.image_mode == "native"
        super().__init__(
            name,
            module,
            dim=module.config.hidden_size,
            patch=16,
            size=None if native else processor.size["height"],
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            layer=layer,
        )
        self.processor = processor
        self._state = layer_from_end(layer, module.config.num_hidden_layers, name)

    def preprocessing_facts(self) -> tuple[Any, ...]:
        """The settings of its image processor."""
        fields = ("image_mode", "size", "fixed_resize", "min_pixels", "max_pixels")
        return tuple(getattr(self.processor, field) for field in fields)

    def resize(self, image: Image.Image) -> Image.Image:
        """As in its training."""
        pixels = self.preprocess(image)
        return Image.fromarray(((pixels.permute(1, 2, 0).numpy() * 0.5 + 0.5) * 255).round().astype(np.uint8))

    def preprocess(self, image: Image.Image) -> Tensor:
        """float32 [3, height, width], as in its training."""
        output = self.processor.preprocess([image], return_tensors="pt")
        pixels = output["pixel_values"]
        if "image_grid_hw" not in output:
            return pixels[0]
        rows, columns = output["image_grid_hw"][0].tolist()
        return pixels.reshape(rows, columns, 3, 16, 16).permute(2, 0, 3, 1, 4).reshape(3, rows * 16, columns * 16)

    def _encode_batch(self, pixels: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        output = self.module(pixels, output_hidden_states=self._state is not None)
        if self._state is None:
            patches = output.last_hidden_state
        else:
            patches = output.hidden_states[self._state].as_subclass(Tensor)
        return patches[:, :0], patches


def open_genlip(
    where: str,
    name: str,
    *,
    layer: str,
    device: torch.device,
    dtype: str,
    random_weights: bool,
    log: Callable[[str], None],
) -> GenLIPEncoder:
    """Load it; ``random_weights`` keeps only its shape, as a control of what the training gave."""
    from genlip_megatron.encoders.random_weights import randomised
    from genlip_megatron.infer.load import load

    loaded = load(where, log, encoder_only=True, device=device, dtype=dtype)
    module = randomised(loaded.model) if random_weights else loaded.model
    return GenLIPEncoder(name, module, loaded.image_processor, layer)
