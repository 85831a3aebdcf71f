"""Weights of small models in the released format, and helpers to compare them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from genlip_megatron.config import DataConfig, ModelConfig, RunConfig, TrainConfig, override
from genlip_megatron.convert.source import Source
from genlip_megatron.model.state_dict import model_parameters
from tests.hf.models import random_weights as random_weights


def small(layers: int, width: int, heads: int, inner: int, text: int, vocabulary: int = 53, **more: Any) -> ModelConfig:
    """A model of the given sizes."""
    half = width // heads // 2
    more.setdefault("rope_sections", (half - 2 * (half // 3), half // 3, half // 3))
    return ModelConfig(
        num_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        ffn_hidden_size=inner,
        text_hidden_size=text,
        vocab_size=vocabulary,
        **more,
    )


# The structures of named sizes and ablations, scaled down.
VARIANTS = {
    "l16": small(2, 32, 2, 88, 32),
    "so16-release": small(3, 36, 2, 96, 32, 54),
    "g16": small(2, 48, 6, 64, 48),
    "g16-release": small(2, 48, 4, 64, 32),
    "no gate": small(2, 32, 4, 40, 24, attention_output_gate="none"),
    "headwise gate": small(2, 32, 4, 40, 24, attention_output_gate="headwise"),
    "no LayerScale, no DropPath": small(1, 32, 4, 40, 32, layer_scale_init=0.0, drop_path_rate=0.0),
}


def write_released(folder: Path, weights: dict[str, Tensor]) -> Path:
    """A folder with the weights in one file, written by the safetensors library."""
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def read_released(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, read by the safetensors library."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def read_source(source: Source) -> dict[str, Tensor]:
    """All tensors of a source."""
    return {
        name: tensor.clone()
        for parameter in model_parameters(source.model)
        for name, tensor in zip(parameter.shapes, source.read(parameter), strict=True)
    }


def differing(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Names of tensors that differ in any bit, in dtype or shape, or that only one side has."""

    def same(one: Any, other: Any) -> bool:
        return one is not None and other is not None and one.dtype == other.dtype and torch.equal(one, other)

    return sorted(name for name in {*found, *expected} if not same(found.get(name), expected.get(name)))


def run_of(model: ModelConfig, **parallel: Any) -> RunConfig:
    """A run of a model, without data."""
    config = RunConfig(model=model, data=DataConfig(seq_length=64), train=TrainConfig(global_batch_size=4))
    return override(config, {f"parallel.{name}": value for name, value in parallel.items()})
