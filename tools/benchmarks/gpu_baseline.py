"""The GPU baseline: the model of ``plain.py`` on packs, trained the way the released code does it.

It uses our packs, but checkpoints every layer, runs FlexAttention at a head dim padded to 128, computes the LM head at
all positions with logits in float32, runs element-wise work as separate kernels, and has one pack per micro-batch (the
logits of more do not fit). Weights are bfloat16 on a GPU, with float32 master weights for AdamW. Without CUDA,
attention is SDPA under the same mask, because FlexAttention has no backward pass there.

Legend: S slots of a pack, P patches, D width, H heads, C head channels, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from plain import IGNORE, PATCH_SIZE, PlainGenLIP
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from genlip_megatron.batch import PackedBatch
from genlip_megatron.config import ModelConfig

PADDED_HEAD_DIM = 128


@functools.cache
def _flex(compiled: bool) -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=False) if compiled else flex_attention  # type: ignore[return-value]


def pack_mask(sample_ids: Tensor, is_image: Tensor, flex: bool) -> Any:
    """Which slots see which in a pack: a BlockMask, or bool [S, S]. Padding counts as a sample of its own.

    >>> pack_mask(torch.tensor([0, 0, 1, 1]), torch.tensor([1, 0, 1, 1]).bool(), False).int().tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    """

    def sees(_batch: Any, _head: Any, query: Tensor, key: Tensor) -> Tensor:
        same = sample_ids[query] == sample_ids[key]
        return same & (is_image[key] | (~is_image[query] & (key <= query)))

    slots = len(sample_ids)
    if flex:
        device = sample_ids.device
        return create_block_mask(sees, None, None, slots, slots, device=device, _compile=device.type == "cuda")
    places = torch.arange(slots, device=sample_ids.device)
    return sees(None, None, places[:, None], places[None])


def flex_padded(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """[1, H, S, C] of each: FlexAttention at the padded head dim."""
    channels = q.shape[-1]
    padded = (F.pad(x, (0, PADDED_HEAD_DIM - channels)) for x in (q, k, v))
    return _flex(q.is_cuda)(*padded, block_mask=mask, scale=channels**-0.5)[..., :channels]


def pack_features(model: PlainGenLIP, batch: PackedBatch, flex: bool) -> Tensor:
    """[1, S, D]: the output of ``ln_post`` for one pack."""
    assert batch.patches is not None
    patches = model.embed_patches((batch.patches.float() / 127.5 - 1).view(-1, 3, PATCH_SIZE, PATCH_SIZE))
    x = model.embed(batch.token_ids[None]).index_copy(1, batch.is_image.nonzero().squeeze(1), patches[None])
    mask = pack_mask(batch.sample_ids, batch.is_image, flex)
    attention = functools.partial(flex_padded, mask=mask) if flex else mask
    return model.encode(x, attention, batch.position_ids[:, None], checkpointed=True)


def pack_loss(model: PlainGenLIP, batch: PackedBatch, flex: bool) -> Tensor:
    """float32 scalar: the sum of the answer tokens' losses, from logits [S, V] of all positions."""
    answers = batch.loss_weights > 0
    labels = torch.full_like(batch.token_ids, IGNORE)
    labels[batch.loss_rows[answers]] = batch.labels[answers]
    logits = model.logits(pack_features(model, batch, flex))[0].float()
    return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")


def trainer(
    config: ModelConfig, batches: Sequence[PackedBatch], device: torch.device, dtype: torch.dtype
) -> Callable[[], float]:
    """One training step (forward, backward, clip, AdamW) over ``batches`` of one pack each; returns its mean loss."""
    flex = device.type == "cuda"
    with device:
        model = PlainGenLIP(config).to(dtype)
    weights: list[Tensor] = list(model.parameters())
    masters = [weight.detach().float().requires_grad_() for weight in weights]
    optimizer = torch.optim.AdamW(masters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    answers = sum(int((batch.loss_weights > 0).sum()) for batch in batches)

    def step() -> float:
        total = torch.zeros((), device=device)
        for weight in weights:
            weight.grad = None
        for batch in batches:
            loss = pack_loss(model, batch.to(device), flex)
            (loss / answers).backward()
            total += loss.detach()
        for master, weight in zip(masters, weights, strict=True):
            master.grad = None if weight.grad is None else weight.grad.float()
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(weights, masters)
        return total.item() / answers

    return step
