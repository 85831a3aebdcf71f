"""Small models, golden batches and exported folders for tests of the Hugging Face files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from genlip_megatron.config import DataConfig, ModelConfig
from genlip_megatron.convert.hf_folder import hf_config, write_side_files
from genlip_megatron.convert.tokenizer import export_tokenizer
from genlip_megatron.model.state_dict import canonical_shapes

SIZES: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "ffn_hidden_size": 64,
    "text_hidden_size": 32,
    "vocab_size": 512,
    "rope_sections": (2, 2, 2),
    "drop_path_rate": 0.0,
}


def tiny(**changes: Any) -> ModelConfig:
    """A model of two layers."""
    return ModelConfig(**{**SIZES, **changes})


def random_weights(model: ModelConfig, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Weights large enough that tokens and images change the output, by their released names."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in canonical_shapes(model).items():
        draw = torch.randn(shape, generator=generator)
        if "norm" in name or "ln_post" in name:
            weights[name] = draw * 0.2 + (1 if name.endswith("weight") else 0)
        elif name.startswith("embeddings"):
            weights[name] = draw * 3
        else:
            weights[name] = draw * 0.3 if len(shape) == 1 else draw * 1.5 / (draw[0].numel() ** 0.5)
    return {name: weight.to(dtype) for name, weight in weights.items()}


def hf_model(kind: str, model: ModelConfig, weights: dict[str, Tensor]) -> Any:
    """``GenLIPForCausalLM`` or ``GenLIPVisionModel`` with the given weights, in evaluation mode."""
    from genlip_megatron.hf import modeling_genlip
    from genlip_megatron.hf.configuration_genlip import GenLIPConfig

    made = getattr(modeling_genlip, kind)(GenLIPConfig(**hf_config(model, "float32")))
    made.load_state_dict({name: weights[name] for name in made.state_dict()})
    return made.eval()


def golden_model(path: Path, kind: str = "GenLIPForCausalLM") -> tuple[Any, dict[str, Tensor]]:
    """(the authors' model, from their own configuration; golden tensors)."""
    from genlip_megatron.hf import modeling_genlip
    from genlip_megatron.hf.configuration_genlip import GenLIPConfig

    golden = load_file(path)
    made = getattr(modeling_genlip, kind)(GenLIPConfig(**json.loads(path.with_suffix(".json").read_text())["config"]))
    made.load_state_dict({name: golden[f"weights/{name}"] for name in made.state_dict()})
    return made.eval(), golden


def golden_inputs(golden: dict[str, Tensor], side: str = "left") -> tuple[dict[str, Tensor], Tensor]:
    """(arguments of the model, one row for each sample, padded at ``side``; bool [rows, length], True at text of the
    golden rows). The golden rows hold the samples in the same order."""
    ids, labels, masks = [], [], []
    is_text = golden["inputs/valid"] & ~golden["inputs/image_mask"]
    for row in range(len(golden["inputs/input_ids"])):
        for sample in golden["inputs/sample_ids"][row][golden["inputs/valid"][row]].unique():
            mine = is_text[row] & (golden["inputs/sample_ids"][row] == sample)
            ids.append(golden["inputs/input_ids"][row][mine])
            labels.append(golden["inputs/labels"][row][mine])
            masks.append(torch.ones(int(mine.sum()), dtype=torch.int64))

    def pad(rows: list[Tensor], value: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)

    return {
        "input_ids": pad(ids, 0),
        "labels": pad(labels, -100),
        "attention_mask": pad(masks, 0),
        "pixel_values": golden["inputs/pixel_values"].flatten(1),
        "image_grid_hw": golden["inputs/image_grid_thw"][:, 1:],
    }, is_text


def images(*sizes: tuple[int, int], seed: int = 0) -> list[Tensor]:
    """Normalised images [3, 16 * rows, 16 * columns]."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(3, 16 * rows, 16 * columns, generator=generator) * 2 - 1 for rows, columns in sizes]


def export(
    folder: Path, tokenizer: Path, model: ModelConfig | None = None, llava_next: bool = False, **data: Any
) -> Path:
    """A whole exported folder with random weights in float32."""
    model = model or tiny()
    end = export_tokenizer(tokenizer, folder)
    write_side_files(folder, model, DataConfig(**data), end, dtype="float32", llava_next=llava_next)
    save_file(random_weights(model), folder / "model.safetensors", metadata={"format": "pt"})
    return folder
