"""Weights of small models in the released format, and helpers to compare them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from genlip_megatron.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from genlip_megatron.convert.source import Source
from genlip_megatron.model.state_dict import canonical_shapes, model_parameters

# The structures of named sizes and ablations, scaled down.
VARIANTS = {
    "l16": ModelConfig(
        num_layers=2, hidden_size=32, num_attention_heads=2, ffn_hidden_size=88, text_hidden_size=32, vocab_size=53
    ),
    "so16-release": ModelConfig(
        num_layers=3, hidden_size=36, num_attention_heads=2, ffn_hidden_size=96, text_hidden_size=32, vocab_size=54
    ),
    "g16": ModelConfig(
        num_layers=2, hidden_size=48, num_attention_heads=6, ffn_hidden_size=64, text_hidden_size=48, vocab_size=53
    ),
    "g16-release": ModelConfig(
        num_layers=2, hidden_size=48, num_attention_heads=4, ffn_hidden_size=64, text_hidden_size=32, vocab_size=53
    ),
    "no gate": ModelConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        ffn_hidden_size=40,
        text_hidden_size=24,
        vocab_size=53,
        attention_output_gate=False,
    ),
    "no LayerScale, no DropPath": ModelConfig(
        num_layers=1,
        hidden_size=32,
        num_attention_heads=4,
        ffn_hidden_size=40,
        text_hidden_size=32,
        vocab_size=53,
        layer_scale_init=0.0,
        drop_path_rate=0.0,
    ),
}


def random_weights(model: ModelConfig, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Canonical tensors of a model, each value different."""
    generator = torch.Generator().manual_seed(5)
    return {
        name: torch.empty(shape).normal_(0.0, 0.2, generator=generator).to(dtype)
        for name, shape in canonical_shapes(model).items()
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
    from genlip_megatron.config import override

    config = RunConfig(model=model, data=DataConfig(seq_length=64), train=TrainConfig(global_batch_size=4))
    return override(config, {f"parallel.{name}": value for name, value in parallel.items()})
