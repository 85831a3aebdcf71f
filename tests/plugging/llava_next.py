"""LLaVA-NeXT's calls of an encoder named ``hf:FOLDER``: the steps of its HFVisionTower and of its flat image path, in
the original's order and with its defaults (llava/model/multimodal_encoder/hf_vision.py, llava/mm_utils.py)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModel, CLIPImageProcessor


class HFVisionTower(nn.Module):
    """Loads an encoder, freezes it, and selects features from its hidden states."""

    def __init__(self, vision_tower: str, args: SimpleNamespace, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        name = vision_tower.replace("hf:", "", 1)
        self.select_layer = args.mm_vision_select_layer
        self.select_feature = getattr(args, "mm_vision_select_feature", "patch")
        try:
            self.image_processor = AutoImageProcessor.from_pretrained(name)
        except Exception:
            # The original downloads that of openai/clip-vit-large-patch14, which has these defaults.
            self.image_processor = CLIPImageProcessor()
        # The original moves the model to "cuda".
        self.vision_tower = AutoModel.from_pretrained(name, torch_dtype=dtype, trust_remote_code=True)
        self.device, self.dtype, self.config = (
            self.vision_tower.device,
            self.vision_tower.dtype,
            self.vision_tower.config,
        )
        if hasattr(self.vision_tower, "vision_model"):
            self.vision_tower = self.vision_tower.vision_model
        self.vision_tower.requires_grad_(False)

    def feature_select(self, outputs: Any) -> Tensor:
        """The features of ``mm_vision_select_layer`` and ``mm_vision_select_feature``."""
        states, kind = outputs.hidden_states, self.select_feature
        if kind in ("slicefour_patch", "slicefour_cls_patch"):
            step = len(states) // 4
            features = torch.cat([states[i] for i in range(step + self.select_layer, len(states), step)], dim=-1)
            kind = kind.replace("slicefour_", "")
        else:
            features = states[self.select_layer]
        if kind == "patch":
            return features[:, 1:]
        if kind == "cls_patch":
            return features
        raise ValueError(f"Unexpected select feature: {kind}")

    def forward(self, images: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """[B, tokens, D] of a batch, or of each image of a list."""
        if isinstance(images, list):
            outputs = [
                self.vision_tower(image.to(self.device, self.dtype).unsqueeze(0), output_hidden_states=True)
                for image in images
            ]
            return [self.feature_select(output).to(image.dtype) for output, image in zip(outputs, images, strict=True)]
        outputs = self.vision_tower(images.to(self.device, self.dtype), output_hidden_states=True)
        return self.feature_select(outputs).to(images.dtype)

    @property
    def hidden_size(self) -> int:
        """Width of the features; the projector takes this width."""
        return self.config.hidden_size * (4 if "slicefour" in self.select_feature else 1)


def process_images(images: list[Image.Image], processor: Any, image_aspect_ratio: str | None) -> Tensor:
    """[B, 3, height, width], padded to squares for ``image_aspect_ratio`` "pad", else by the processor."""
    if image_aspect_ratio != "pad":
        return processor(images, return_tensors="pt")["pixel_values"]
    background = tuple(int(x * 255) for x in processor.image_mean)
    padded = []
    for image in images:
        side = max(image.size)
        square = Image.new(image.mode, (side, side), background)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        padded.append(processor.preprocess(square, return_tensors="pt")["pixel_values"][0])
    return torch.stack(padded)
