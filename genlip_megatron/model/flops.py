"""Useful arithmetic of training, counted from what a micro-batch holds and the table of parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from genlip_megatron.batch import PackedBatch
from genlip_megatron.config import ModelConfig
from genlip_megatron.model.state_dict import layer_matrix_size, rank_sizes

# Dense bfloat16 rate of one Hopper SXM GPU; MFU is quoted against it.
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
    """Useful floating-point operations of training on ``counts``: the forward pass, and twice that for the backward.

    The forward pass costs 2 operations per token and element of the layers' matrices, 4 D per query-key pair and layer,
    2 per answer row and element of the head, and 2 per patch and element of the patch embedding, whose input needs no
    gradient. Recomputation and padding do not count.
    """
    by_name = dict(zip(COUNTS, counts.tolist(), strict=True))
    sizes = rank_sizes(model)
    blocks = 2 * by_name["tokens"] * model.num_layers * layer_matrix_size(model)
    attention = 4 * model.hidden_size * model.num_layers * (by_name["image_pairs"] + by_name["text_pairs"])
    head = 2 * sizes["head.weight"] * by_name["loss_rows"]
    patches = 2 * sizes["embed.patch_weight"] * by_name["image_tokens"]
    return 3 * (blocks + attention + head) + 2 * patches
