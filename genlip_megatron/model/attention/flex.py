"""FlexAttention: the rule compiled into a kernel that skips masked blocks. For GPUs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from genlip_megatron.batch import PackedBatch
from genlip_megatron.device import to_device
from genlip_megatron.model.attention.backend import Backend, Place, Spans, padding_slots


@functools.cache
def _kernel(compiled: bool) -> Callable:
    return torch.compile(flex_attention, dynamic=False) if compiled else flex_attention  # type: ignore[return-value]


class Flex(Backend):
    """One call over the whole pack under a block mask."""

    def __init__(self, spans: Spans, batch: PackedBatch, cos: Tensor, sin: Tensor) -> None:
        super().__init__(spans, batch, cos, sin)
        sample_ids, is_image = (to_device(x, cos.device) for x in (batch.sample_ids, batch.is_image))
        first = spans.first

        def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            query = query + first
            # Padding attends to padding here, since a softmax over no keys is NaN; its output is dropped.
            same = sample_ids[query] == sample_ids[key]
            return same & (is_image[key] | (~is_image[query] & (key <= query)))

        shape = (None, None, spans.last - first, spans.total)
        # Compiled, it never materialises the whole mask.
        self._mask = create_block_mask(sees, *shape, device=cos.device, _compile=cos.is_cuda)
        self._padding = padding_slots(batch, first, spans.last, cos.device)

    @staticmethod
    def why_not(place: Place) -> str | None:
        if place.device.type != "cuda":
            return f"needs a CUDA device (it has no backward pass on a CPU); this is {place.device.type}"
        return None if place.head_dim >= 16 else f"needs a head size of at least 16, not {place.head_dim}"

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float, **_: Any) -> Tensor:
        query, key, value = (x.transpose(0, 1)[None] for x in (*self.turned(q, k), v))  # [1, H, ., D]
        out = _kernel(q.is_cuda)(query, key, value, block_mask=self._mask, scale=scale)
        return out[0].transpose(0, 1).index_fill(0, self._padding, 0.0)
