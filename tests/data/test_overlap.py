"""Validation images that are also training images are found at the start of a run, whatever their shard."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from genlip_megatron.config import DEFAULT_PROMPT, DataConfig
from genlip_megatron.data import overlap
from genlip_megatron.data.dataset import Dataset, open_dataset
from genlip_megatron.data.prepare import index_shards
from genlip_megatron.tokenizer import load_tokenizer
from tests.data.shards import image, write_shard


@pytest.fixture
def index(demo_data: Path, tmp_path: Path) -> Callable[..., Dataset]:
    """A function that packs and indexes pictures of the given seeds, and opens them."""
    tokenizer = str(demo_data / "tokenizer.model")
    fingerprint = load_tokenizer(tokenizer).fingerprint

    def make(name: str, seeds: range, caption: str) -> Dataset:
        shard = tmp_path / f"{name}.tar"
        members = {}
        for seed in seeds:
            members[f"{seed:03d}.png"] = image("PNG", (32 + seed, 32))
            members[f"{seed:03d}.txt"] = f"{caption} {seed}".encode()
        write_shard(shard, members)
        index_shards([str(shard)], tokenizer, DEFAULT_PROMPT, 1)
        return open_dataset([str(shard)], DataConfig(), fingerprint, "test")

    return make


def test_shared_images_are_counted_whatever_their_captions(index: Any, tmp_path: Path) -> None:
    train = index("train", range(8), "One")
    said = overlap.shared_images([train], [index("valid", range(5, 11), "Another")])
    assert said.startswith(f"3 of 6 validation images are also training images (the first in {tmp_path}/valid.tar)")
    assert overlap.shared_images([train], [index("apart", range(8, 11), "One")]) == ""


def test_a_shard_of_both_splits_is_found_without_reading_its_index(index: Any, tmp_path: Path) -> None:
    train = index("train", range(8), "One")
    (tmp_path / "train.tar.index.safetensors").unlink()
    assert overlap.shared_images([train], [train]).startswith("8 of 8 validation images")


def test_a_large_split_is_compared_in_spaced_shards(index: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    train = [index(f"train{i}", range(10 * i, 10 * i + 10), "One") for i in range(4)]
    valid = index("valid", range(0, 40, 10), "Another")
    monkeypatch.setattr(overlap, "_COMPARED", 20)  # every second shard
    assert overlap.shared_images(train, [valid]).startswith("2 of 4 ")
