"""A small random model as an exported folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from genlip_megatron.convert.tokenizer import END_OF_TURN
from tests.hf.models import export, tiny
from tests.infer.conftest import tool as tool

IMAGE_SIZE = 64


def byte_tokenizer(path: Path) -> None:
    """Write a byte tokenizer with an end token for captions."""
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TURN, normalized=False, special=True)])
    tokenizer.save(str(path))


def random_folder(folder: Path, llava_next: bool = False, **data: Any) -> Path:
    """A folder of random weights, with 3 layers of width 96 and the image settings of ``data``."""
    folder.mkdir()
    tokenizer = folder.parent / f"{folder.name}.json"
    byte_tokenizer(tokenizer)
    model = tiny(
        num_layers=3,
        hidden_size=96,
        ffn_hidden_size=160,
        text_hidden_size=64,
        vocab_size=257,
        rope_sections=(4, 4, 4),
        drop_path_rate=0.5,
    )
    return export(folder, tokenizer, model, llava_next, **data)


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported folder for images of 64 x 64."""
    return random_folder(tmp_path_factory.mktemp("plugging") / "encoder", image_size=IMAGE_SIZE)


@pytest.fixture(scope="session")
def exported_native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported folder for images of native sizes."""
    return random_folder(tmp_path_factory.mktemp("plugging") / "native", image_mode="native", max_pixels=16384)
