"""The GPU baseline: GenLIP trained the way the released code does it, in plain torch.

Packs as ours, but: gradient checkpointing of every layer, FlexAttention at a head dim padded to 128, the LM head over
all positions with its logits in float32, element-wise work as separate kernels, one pack a micro-batch (more logits do
not fit). Weights are bfloat16 on a GPU, with float32 masters for AdamW. It builds on ``plain.py`` and shares no code
with ``genlip_megatron.model``. Without CUDA, attention is SDPA under the same mask, since FlexAttention has no backward
pass there.

Legend: S slots of a pack, P patches, D width, H heads, C head channels, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from plain import IGNORE, PATCH_SIZE, Attention, PlainGenLIP, rotary, rotate_half
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from genlip_megatron.batch import PackedBatch
from genlip_megatron.config import ModelConfig

PADDED_HEAD_DIM = 128


@functools.cache
def _flex(compiled: bool) -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=False) if compiled else flex_attention  # type: ignore[return-value]


def pack_mask(sample_ids: Tensor, is_image: Tensor, flex: bool) -> Any:
    """Who sees whom in a pack: a BlockMask, or bool [S, S]. Padding is a sample of its own.

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


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    """[1, H, S, C] of each: FlexAttention at the padded head dim under a BlockMask, else SDPA."""
    if not isinstance(mask, BlockMask):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    channels = q.shape[-1]
    padded = (F.pad(x, (0, PADDED_HEAD_DIM - channels)) for x in (q, k, v))
    return _flex(q.is_cuda)(*padded, block_mask=mask, scale=channels**-0.5)[..., :channels]


class PackedAttention(Attention):
    """``plain.Attention`` over a pack."""

    def forward(self, x: Tensor, mask: Any, cos: Tensor, sin: Tensor) -> Tensor:
        """[1, S, D] -> [1, S, D]."""
        q, gate = self.q_proj(x).chunk(2, dim=-1) if self.gated else (self.q_proj(x), None)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, self.k_proj(x), self.v_proj(x)))
        q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
        y = attend(q, k, v, mask).transpose(1, 2).flatten(2)
        return self.out_proj(y if gate is None else torch.sigmoid(gate) * y)


class PackedGenLIP(PlainGenLIP):
    """GenLIP over one pack."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        for layer in self.visual["layers"].children():
            layer.self_attn = PackedAttention(config)

    def pack_features(self, batch: PackedBatch, flex: bool) -> Tensor:
        """[1, S, D]: the output of ``ln_post``."""
        assert batch.patches is not None
        dtype = self.ln_post.weight.dtype
        x = self.embeddings(batch.token_ids[None])
        if hasattr(self, "in_proj"):
            x = self.in_proj(x)
        pixels = (batch.patches.float() / 127.5 - 1).to(dtype).view(-1, 3, PATCH_SIZE, PATCH_SIZE)
        patches = self.vision_embeddings["patch_embedding"](pixels).flatten(1)
        x = x.index_copy(1, batch.is_image.nonzero().squeeze(1), patches[None])
        mask = pack_mask(batch.sample_ids, batch.is_image, flex)
        cos, sin = rotary(batch.position_ids[:, None], self.config, dtype)
        for layer in self.visual["layers"].children():
            x = checkpoint(layer, x, mask, cos, sin, use_reentrant=False)
        return self.ln_post(x)

    def pack_loss(self, batch: PackedBatch, flex: bool) -> Tensor:
        """float32 scalar: the sum of the answer tokens' losses, from logits [S, V] of all positions."""
        answers = batch.loss_weights > 0
        labels = torch.full_like(batch.token_ids, IGNORE)
        labels[batch.loss_rows[answers]] = batch.labels[answers]
        logits = self.logits(self.pack_features(batch, flex))[0].float()
        return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")


def trainer(
    config: ModelConfig, batches: Sequence[PackedBatch], device: torch.device, dtype: torch.dtype
) -> Callable[[], float]:
    """One training step (forward, backward, clip, AdamW) over ``batches`` of one pack each; returns its mean loss."""
    flex = device.type == "cuda"
    with device:
        model = PackedGenLIP(config).to(dtype)
    weights: list[Tensor] = list(model.parameters())
    masters = [weight.detach().float().requires_grad_() for weight in weights]
    optimizer = torch.optim.AdamW(masters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    answers = sum(int((batch.loss_weights > 0).sum()) for batch in batches)

    def step() -> float:
        total = torch.zeros((), device=device)
        for weight in weights:
            weight.grad = None
        for batch in batches:
            loss = model.pack_loss(batch.to(device), flex)
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
