"""The reference: every query against every key under the dense mask. Memory grows with the square of the pack."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genlip_megatron.batch import PackedBatch
from genlip_megatron.device import to_device
from genlip_megatron.model.attention.backend import Backend, Spans
from genlip_megatron.model.mask import prefix_lm_mask


class Dense(Backend):
    """Softmax over all keys of the pack, in float32."""

    def __init__(self, spans: Spans, batch: PackedBatch, cos: Tensor, sin: Tensor) -> None:
        super().__init__(spans, batch, cos, sin)
        self._mask = to_device(prefix_lm_mask(batch.sample_ids, batch.is_image)[self._queries], cos.device)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float, **_: Any) -> Tensor:
        q, k = self.turned(q, k)
        scores = torch.einsum("qhd,khd->hqk", q, k).float() * scale
        weights = scores.masked_fill(~self._mask, float("-inf")).softmax(dim=-1)
        weights = weights.masked_fill(~self._mask, 0.0)  # padding sees no key, and its softmax is NaN
        return torch.einsum("hqk,khd->qhd", weights.to(v.dtype), v)
