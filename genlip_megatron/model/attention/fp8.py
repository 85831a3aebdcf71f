"""Image queries of fixed length in FP8, everything else by the two calls of ``varlen.py`` in bfloat16.

Transformer Engine's FP8 attention wants samples of one length in ``bshd``, and heads of certain sizes. So images of the
micro-batch's commonest length are laid side by side, with zeros behind each head's channels and a few images of zeros
behind the last, so that few shapes occur: cuDNN plans each anew. Zeros change nothing: scores get zeros added, padded
channels and images come out as zeros and are cut off.

Legend: B images, P patches of an image, H heads at hand, D channels of a head.
"""

from __future__ import annotations

import importlib
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from genlip_megatron.batch import PackedBatch
from genlip_megatron.device import to_device
from genlip_megatron.model.attention.backend import Spans
from genlip_megatron.model.attention.varlen import Rows, TransformerEngine
from genlip_megatron.model.te_support import fp8_head_dim

_IMAGE_MULTIPLE = 8


class ImageKernel(Protocol):
    """Full attention of images of one length: [B, P, H, D] from query, key and value of that shape.

    Attributes:
        head_dim: D that it takes for heads of so many channels.
    """

    def head_dim(self, channels: int) -> int: ...

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor: ...


def commonest_length(lengths: np.ndarray) -> int:
    """The length that most samples have, the largest of several; 16 where there are none.

    >>> commonest_length(np.array([196, 49, 196, 0])), commonest_length(np.array([0]))
    (196, 16)
    """
    values, counts = np.unique(lengths[lengths > 0], return_counts=True)
    return int(values[::-1][counts[::-1].argmax()]) if len(values) else 16


class Fp8Images(TransformerEngine):
    """As ``TransformerEngine``, with image queries by a kernel that each layer brings, since it has scales of its own.

    Images cut by context parallelism and those of another length take the bfloat16 call. The FP8 call is made even for
    a micro-batch without images: data-parallel ranks share the largest values of their FP8 tensors in one reduction.
    """

    def __init__(self, spans: Spans, batch: PackedBatch, cos: Tensor, sin: Tensor) -> None:
        whole = (spans.begins == 0) & (spans.ends >= spans.images)
        self.length = commonest_length(np.where(whole, spans.images, 0))
        mine = whole & (spans.images == self.length)
        super().__init__(spans, batch, cos, sin, elsewhere=mine)
        self.images = int(mine.sum())
        slots = (spans.starts[mine, None] + np.arange(self.length)).ravel()
        self._slots = to_device(torch.from_numpy(slots), cos.device)
        self._rows = Rows.of(slots - spans.first, cos.device)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float, **own: Any) -> Tensor:
        """As every backend's; ``image_kernel`` in ``own`` is the layer's ``ImageKernel``."""
        image_kernel: ImageKernel = own["image_kernel"]
        q, k = self.turned(q, k)
        channels = q.shape[-1]
        images = max(-(-self.images // _IMAGE_MULTIPLE), 1) * _IMAGE_MULTIPLE
        behind = (0, image_kernel.head_dim(channels) - channels, 0, 0, 0, 0, 0, images - self.images)

        def laid_out(rows: Tensor) -> Tensor:
            return F.pad(rows.unflatten(0, (self.images, self.length)), behind)

        def attend(query: Tensor) -> Tensor:
            key, value = (x.index_select(0, self._slots) for x in (k, v))
            attended = image_kernel(laid_out(query), laid_out(key), laid_out(value), scale)  # [images, P, H, D']
            return attended[: self.images, ..., :channels].flatten(0, 1)

        return self.attend(q, k, v, scale, elsewhere=(self._rows, attend))


class TransformerEngineImages(torch.nn.Module):
    """The kernel of one layer by Transformer Engine, which keeps the scales of delayed scaling.

    FP8 where Megatron-Core's context around the layer is (the recipe says ``fp8_dpa``), bfloat16 in layers without.

    Args:
        heads: H that a rank has at hand.
        channels: of a head, without zeros.
        scale: of the scores.
    """

    def __init__(self, heads: int, channels: int, scale: float) -> None:
        super().__init__()
        transformer_engine = importlib.import_module("transformer_engine.pytorch")
        self.attention = transformer_engine.DotProductAttention(
            num_attention_heads=heads,
            kv_channels=self.head_dim(channels),
            attention_dropout=0.0,
            qkv_format="bshd",
            attn_mask_type="no_mask",
            softmax_scale=scale,
        )

    def head_dim(self, channels: int) -> int:
        """As ``te_support.fp8_head_dim`` on this device."""
        return fp8_head_dim(channels, torch.cuda.get_device_capability())

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """[B, P, H, D] from query, key and value [B, P, H, D] in bfloat16."""
        attended: Tensor = self.attention(q.contiguous(), k.contiguous(), v.contiguous())
        return attended.view(q.shape)
