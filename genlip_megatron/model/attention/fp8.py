"""Image queries of one fixed length in FP8, everything else by the two calls in bfloat16.

Transformer Engine's FP8 attention needs samples of one length in ``bshd`` and certain head sizes. So images of the
micro-batch's most common length are stacked. Zeros pad each head's channels, and images of zeros pad the stack: cuDNN
plans each new shape, so few shapes should occur. Zeros change nothing: they add zero to the scores, and padded channels
and images are cut off the output.

Legend: B images, P patches of an image, H local heads, D channels of a head.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from genlip_megatron.batch import PackedBatch
from genlip_megatron.device import to_device
from genlip_megatron.model.attention.backend import Spans
from genlip_megatron.model.attention.rows import Rows
from genlip_megatron.model.attention.te import Te
from genlip_megatron.model.te_support import fp8_head_dim

_IMAGE_MULTIPLE = 8


def commonest_length(lengths: np.ndarray) -> int:
    """The most frequent length above 0; the larger one in a tie; 16 if there is none.

    >>> commonest_length(np.array([196, 49, 196, 0])), commonest_length(np.array([0]))
    (196, 16)
    """
    values, counts = np.unique(lengths[lengths > 0], return_counts=True)
    return int(values[::-1][counts[::-1].argmax()]) if len(values) else 16


class Fp8Images(Te):
    """As ``Te``, with image queries by a kernel that each layer passes: it holds the layer's scales.

    Images of another length, and images cut by context parallelism, take the bfloat16 call. The FP8 call runs even for
    a micro-batch without images: data-parallel ranks reduce the amax values of their FP8 tensors together.
    """

    has_fixed_shapes = False

    def __init__(self, spans: Spans, batch: PackedBatch, cos: Tensor, sin: Tensor) -> None:
        whole = (spans.begins == 0) & (spans.ends >= spans.images)
        self.length = commonest_length(np.where(whole, spans.images, 0))
        stacked = whole & (spans.images == self.length)
        super().__init__(spans, batch, cos, sin, elsewhere=stacked)
        self.images = int(stacked.sum())
        slots = (spans.starts[stacked, None] + np.arange(self.length)).ravel()
        self._slots = to_device(torch.from_numpy(slots), cos.device)
        self._rows = Rows.of(slots - spans.first, cos.device)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float, **own: Any) -> Tensor:
        """As for every backend; ``own["image_kernel"]`` is the layer's ``TransformerEngineImages``."""
        image_kernel: TransformerEngineImages = own["image_kernel"]
        q, k = self.turned(q, k)
        channels = q.shape[-1]
        images = max(-(-self.images // _IMAGE_MULTIPLE), 1) * _IMAGE_MULTIPLE
        padding = (0, image_kernel.head_dim(channels) - channels, 0, 0, 0, 0, 0, images - self.images)

        def stack(rows: Tensor) -> Tensor:
            return F.pad(rows.unflatten(0, (self.images, self.length)), padding)

        def attend(query: Tensor) -> Tensor:
            key, value = (x.index_select(0, self._slots) for x in (k, v))
            attended = image_kernel(stack(query), stack(key), stack(value), scale)  # [images, P, H, D']
            return attended[: self.images, ..., :channels].flatten(0, 1)

        return self.attend(q, k, v, scale, elsewhere=(self._rows, attend))


class TransformerEngineImages(torch.nn.Module):
    """One layer's attention within images of one length, by Transformer Engine; it keeps the scales of delayed scaling.

    It computes in FP8 inside Megatron-Core's FP8 context (recipe ``fp8_dpa``), else in bfloat16.
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
        """``te_support.fp8_head_dim`` on this device."""
        return fp8_head_dim(channels, torch.cuda.get_device_capability())

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """[B, P, H, D] from query, key and value [B, P, H, D] in bfloat16."""
        attended: Tensor = self.attention(q.contiguous(), k.contiguous(), v.contiguous())
        return attended.view(q.shape)
