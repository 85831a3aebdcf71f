"""What the benchmarks share: random samples, and contestants that take turns."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch
from tqdm import tqdm

from genlip_megatron.batch import PATCH_SIZE, PATCH_VALUES, Sample
from genlip_megatron.config import ModelConfig
from genlip_megatron.data.resize import native_size

# A model for CPUs.
SMALL = ModelConfig(
    num_layers=6,
    hidden_size=256,
    num_attention_heads=4,
    ffn_hidden_size=704,
    text_hidden_size=256,
    vocab_size=8192,
    rope_sections=(10, 11, 11),
    drop_path_rate=0.0,
)
PROMPT_TOKENS = 6
Result = TypeVar("Result")


def make_samples(
    grids: Sequence[tuple[int, int]], rng: np.random.Generator, text: tuple[int, int] = (40, 110)
) -> list[Sample]:
    """Random images of the given patch grids with random tokens of ``SMALL``, of which the prompt carries no loss.

    Args:
        text: fewest and most text tokens of a sample.
    """
    samples = []
    for rows, columns in grids:
        length = int(rng.integers(*text, endpoint=True))
        pixels = rng.integers(0, 256, (rows * columns, PATCH_VALUES), dtype=np.uint8)
        tokens = rng.integers(0, SMALL.vocab_size, length).tolist()
        loss = [False] * PROMPT_TOKENS + [True] * (length - PROMPT_TOKENS)
        samples.append(Sample(torch.from_numpy(pixels), rows, columns, tokens, loss))
    return samples


def native_grids(count: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Patch grids of native-aspect images: areas log-uniform over 16 to 1024 patches, aspect ratios 1:2 to 2:1."""
    grids = []
    areas, aspects = np.exp(rng.uniform(np.log(16), np.log(1024), count)), rng.uniform(-1, 1, count)
    for area, aspect in zip(areas, aspects, strict=True):
        height = np.sqrt(area * 2**aspect) * PATCH_SIZE
        rows, columns = native_size(round(height), round(area * PATCH_SIZE**2 / height))
        grids.append((rows // PATCH_SIZE, columns // PATCH_SIZE))
    return grids


def tokens_of(sample: Sample) -> int:
    """Image and text tokens of a sample."""
    return sample.rows * sample.columns + len(sample.token_ids)


def take_turns(name: str, contestants: Mapping[str, Callable[[], Result]], rounds: int) -> dict[str, list[Result]]:
    """The results of each contestant by round. They take turns, so that all see the same load of the machine."""
    results: dict[str, list[Result]] = {label: [] for label in contestants}
    other_rank = os.environ.get("RANK", "0") != "0"
    for _ in tqdm(range(rounds), desc=name, unit="round", file=sys.stderr, disable=other_rank):
        for label, contestant in contestants.items():
            results[label].append(contestant())
    return results


def device_name() -> str:
    """The GPU's name, or the number of CPU threads."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
