#!/usr/bin/env python3
"""Compare captioning with and without the key-value cache, and features of packed and padded images.

    tools/benchmarks/infer.py                     (about five minutes on two CPU cores)
    tools/benchmarks/infer.py --layers 24 --dtype bf16 --images 64 --captions 16       on a GPU

The model has l16's width; the vocabulary shrinks with the layers, so that the head keeps its fraction of the work.
Images have native sizes as in training: areas log-uniform from 16 to 1024 patches, aspect ratios 1:2 to 2:1. In each
comparison both contestants use the same weights, and their results are compared before timing. They take turns, and
the figure is the median. Each comparison prints its ratio and its goal; a missed goal ends with status 1.
"""

from __future__ import annotations

from genlip_megatron.command import command

# isort: split
import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from train_step import native_grids

from genlip_megatron.config.command_line import StrictParser
from genlip_megatron.convert.source import DTYPES
from genlip_megatron.hf.configuration_genlip import GenLIPConfig
from genlip_megatron.hf.image_processing_genlip import GenLIPImageProcessor
from genlip_megatron.hf.modeling_genlip import GenLIPForCausalLM, GenLIPVisionModel, image_positions
from genlip_megatron.infer.caption import Captioner, Decoding
from genlip_megatron.infer.features import features
from genlip_megatron.infer.load import Loaded, pick_device
from genlip_megatron.infer.prepare import Prepared

WIDTH, HEADS, INNER, SECTIONS = 1024, 16, 2816, [8, 12, 12]
LAYERS, VOCABULARY = 24, 151936  # of l16
PROMPT_TOKENS, NEW_TOKENS = 6, 64
CAPTION_GOAL, FEATURE_GOAL = 5.0, 1.3


class PaddedAttention:
    """Attention over images padded to the largest of their batch, in place of the model's packed attention.

    Args:
        counts: int64 [B], patches of each image.
    """

    cache = None

    def __init__(self, counts: Tensor) -> None:
        self.images, longest = len(counts), int(counts.max())
        self.mask = (torch.arange(longest, device=counts.device) < counts[:, None])[:, None, None]  # [B, 1, 1, L]

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, layer: int) -> Tensor:
        """[B * L, H, C] from query, key and value [B * L, H, C]."""
        query, key, value = (x.unflatten(0, (self.images, -1)).transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=self.mask).transpose(1, 2).flatten(0, 1)


@torch.inference_mode()
def padded_features(model: GenLIPVisionModel, images: list[Prepared], device: torch.device) -> list[Tensor]:
    """Output of ``ln_post`` for each image [patches, D], with every image padded to the largest."""
    counts = torch.tensor([len(image.patches) for image in images], device=device)
    longest = int(counts.max())
    patches = torch.stack([F.pad(image.patches, (0, 0, 0, longest - len(image.patches))) for image in images])
    grids = [torch.tensor([[image.rows, image.columns]], device=device) for image in images]
    positions = [F.pad(image_positions(grid), (0, longest - int(grid.prod()))) for grid in grids]
    x = model.vision_embeddings(patches.flatten(0, 1).to(device))
    attention: Any = PaddedAttention(counts)
    states = model.visual(x, torch.cat(positions, dim=1), attention)[-1]
    found = model.ln_post(states).unflatten(0, (len(images), -1))
    return [rows[: len(image.patches)] for rows, image in zip(found, images, strict=True)]


@dataclass
class Words:
    """A fake tokenizer: a prompt of six tokens, and an end token that the model never generates."""

    fingerprint: str
    vocab_size: int
    closing_ids: list[int]

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt."""
        return list(range(1, PROMPT_TOKENS + 1))


def make_images(count: int, seed: int) -> list[Prepared]:
    """Random images of native sizes."""
    rng = np.random.default_rng(seed)
    images = []
    for number, (rows, columns) in enumerate(native_grids(count, rng)):
        pixels = torch.from_numpy(rng.uniform(-1, 1, (rows * columns, 768)).astype(np.float32))
        images.append(Prepared(number, {"path": str(number)}, pixels, rows, columns))
    return images


def make_models(layers: int, device: torch.device, dtype: torch.dtype) -> tuple[Loaded, Loaded]:
    """(the whole model, its vision encoder), with random weights."""
    torch.manual_seed(0)
    vocabulary = max(512, VOCABULARY * layers // LAYERS)
    config = GenLIPConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        intermediate_size=INNER,
        rope_scaling={"mrope_section": SECTIONS},
    )
    whole = GenLIPForCausalLM(config)
    # A row of zeros is never the likeliest token.
    whole.lm_head.weight.data[-1] = 0
    encoder = GenLIPVisionModel(config)
    encoder.load_state_dict(whole.state_dict(), strict=False)
    words: Any = Words("", vocabulary, [vocabulary - 1, 0])
    images = GenLIPImageProcessor(image_mode="native")
    found = []
    for model in (whole, encoder):
        placed: Any = model.requires_grad_(False).eval()
        placed.to(device, dtype)
        found.append(Loaded(placed, images, words, "prompt", Path()))
    return found[0], found[1]


def take_turns(contestants: dict[str, Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, run in contestants.items():
            begin = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def show(title: str, seconds: dict[str, float], amount: float, unit: str, goal: float) -> bool:
    """Print the plain contestant, then ours; returns whether ours reaches the goal."""
    plain, ours = seconds
    ratio = seconds[plain] / seconds[ours]
    print(f"\n{title}")
    for name, value in seconds.items():
        print(f"  {name:<28}{value:>9.2f} s{amount / value:>12.1f} {unit}/s")
    print(f"  ratio {ratio:.2f}   goal {goal:.1f}: {'reached' if ratio >= goal else 'MISSED'}", flush=True)
    return ratio >= goal


def captions(loaded: Loaded, count: int, repeats: int) -> bool:
    """Compare captioning; returns whether the goal is reached."""
    images = make_images(count, seed=1)
    decoding = Decoding(max_new_tokens=NEW_TOKENS)
    cached, again = (Captioner(loaded, "prompt", decoding, use_cache=use) for use in (True, False))
    found, expected = cached.tokens(images), again.tokens(images)
    assert all(len(row) == NEW_TOKENS for row in found)
    if found != expected and loaded.model.dtype == torch.float32:
        raise SystemExit("infer.py: with the cache the tokens are others")
    seconds = take_turns(
        {"prefix computed again": lambda: again.tokens(images), "key-value cache": lambda: cached.tokens(images)},
        repeats,
        loaded.device,
    )
    sizes = sum(len(image.patches) for image in images) / count
    title = f"captions: {count} images of {sizes:.0f} patches on average, {NEW_TOKENS} new tokens each"
    return show(title, seconds, count * NEW_TOKENS, "tokens", CAPTION_GOAL)


def encoder_features(loaded: Loaded, count: int, batch: int, repeats: int) -> bool:
    """Compare feature extraction; returns whether the goal is reached."""
    images = make_images(count, seed=2)
    parts = [images[i : i + batch] for i in range(0, count, batch)]
    for ours, theirs in zip(
        features(loaded, parts[0]), padded_features(loaded.model, parts[0], loaded.device), strict=True
    ):
        # Features have a standard deviation of about 1.
        tolerance = 1e-3 if loaded.model.dtype == torch.float32 else 0.1
        torch.testing.assert_close(ours.float(), theirs.float(), atol=tolerance, rtol=0)
    seconds = take_turns(
        {
            "padded to the largest": lambda: [padded_features(loaded.model, part, loaded.device) for part in parts],
            "packed": lambda: [features(loaded, part) for part in parts],
        },
        repeats,
        loaded.device,
    )
    sizes = [len(image.patches) for image in images]
    title = f"features: {count} images of {min(sizes)} to {max(sizes)} patches, {batch} at a time"
    return show(title, seconds, count, "images", FEATURE_GOAL)


@command
def main() -> int:
    """Run both comparisons; returns the exit status."""
    parser = StrictParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2, help="layers of the model (default: 2; l16 has 24)")
    parser.add_argument("--captions", type=int, default=2, help="images captioned per batch (default: 2)")
    parser.add_argument("--images", type=int, default=16, help="images whose features are computed (default: 16)")
    parser.add_argument("--batch-size", type=int, default=8, help="images per batch of features (default: 8)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each contestant (default: 3)")
    parser.add_argument("--device", default="auto", help="cpu or cuda[:N] (default: auto)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="default: fp32")
    options = parser.parse_args()
    device = pick_device(options.device)
    whole, encoder = make_models(options.layers, device, DTYPES[options.dtype])
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    print(f"{name}; {versions}")
    print(f"{options.layers} layers of width {WIDTH}, vocabulary {whole.model.config.vocab_size}, {options.dtype}")
    reached = captions(whole, options.captions, options.repeats)
    reached &= encoder_features(encoder, options.images, options.batch_size, options.repeats)
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
