"""Useful FLOPs of training, and the counts they derive from."""

from __future__ import annotations

import torch
from torch import Tensor

from genlip_megatron.batch import PATCH_VALUES, PackedBatch
from genlip_megatron.config import ModelConfig

# Dense bfloat16 rate of one Hopper SXM GPU, which MFU is quoted against.
HOPPER_TFLOPS = 989.5

COUNTS = ("tokens", "samples", "image_tokens", "image_pairs", "text_pairs", "loss_rows", "slots")


def count_batch(batch: PackedBatch) -> Tensor:
    """float64 [len(COUNTS)] on the CPU: what a micro-batch holds, for rates and FLOPs."""
    images, texts = batch.image_lengths.double(), batch.text_lengths.double()
    text_pairs = images * texts + texts * (texts + 1) / 2
    counts = [
        (images + texts).sum(),
        (images + texts > 0).sum().double(),
        images.sum(),
        (images**2).sum(),
        text_pairs.sum(),
        (batch.loss_weights > 0).sum().double(),
        torch.tensor(float(batch.num_tokens), dtype=torch.float64),
    ]
    return torch.stack([count.cpu() for count in counts])


def training_flops(counts: Tensor, model: ModelConfig) -> float:
    """Useful floating-point operations of training on ``counts``: forward and twice that backward.

    Blocks 2 N L (5 D^2 + 3 D F), attention 4 D L x exact prefix-LM pairs, head 2 E V x answer rows, patch embedding
    2 x 768 D x patches (its input needs no gradient). Recomputation and padding never count.
    """
    by_name = dict(zip(COUNTS, counts.tolist(), strict=True))
    width, layers = model.hidden_size, model.num_layers
    projections = 5 if model.attention_output_gate else 4
    blocks = 2 * by_name["tokens"] * layers * (projections * width**2 + 3 * width * model.ffn_hidden_size)
    attention = 4 * width * layers * (by_name["image_pairs"] + by_name["text_pairs"])
    head = 2 * model.text_hidden_size * model.vocab_size * by_name["loss_rows"]
    patches = 2 * PATCH_VALUES * width * by_name["image_tokens"]
    return 3 * (blocks + attention + head) + 2 * patches
