"""A small random model as an exported folder."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from genlip_megatron.config import DataConfig, ModelConfig
from genlip_megatron.convert.hf_folder import hf_config, write_side_files
from genlip_megatron.convert.tokenizer import END_OF_TURN, export_tokenizer
from genlip_megatron.hf.configuration_genlip import GenLIPConfig
from genlip_megatron.hf.modeling_genlip import GenLIPForCausalLM

IMAGE_SIZE = 64


def byte_tokenizer(path: Path) -> None:
    """Write a byte tokenizer with an end token for captions."""
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TURN, normalized=False, special=True)])
    tokenizer.save(str(path))


def export(folder: Path, data: DataConfig) -> Path:
    """A folder of random weights, with 3 layers of width 96 and the image settings of ``data``."""
    folder.mkdir()
    byte_tokenizer(folder.parent / f"{folder.name}.json")
    end = export_tokenizer(folder.parent / f"{folder.name}.json", folder)
    model = ModelConfig(
        num_layers=3,
        hidden_size=96,
        num_attention_heads=4,
        ffn_hidden_size=160,
        text_hidden_size=64,
        vocab_size=257,
        rope_sections=(4, 4, 4),
        drop_path_rate=0.5,
    )
    write_side_files(folder, model, data, end, dtype="float32")
    torch.manual_seed(0)
    weights = GenLIPForCausalLM(GenLIPConfig(**hf_config(model, "float32"))).state_dict()
    # Noise makes layers, norms and scales matter more than they do at their initial values.
    noisy = {name: (weight + 0.3 * torch.randn_like(weight)).contiguous() for name, weight in weights.items()}
    save_file(noisy, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported folder for images of 64 x 64."""
    return export(tmp_path_factory.mktemp("plugging") / "encoder", DataConfig(image_size=IMAGE_SIZE))


@pytest.fixture(scope="session")
def exported_native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported folder for images of native sizes."""
    return export(tmp_path_factory.mktemp("plugging") / "native", DataConfig(image_mode="native", max_pixels=16384))
