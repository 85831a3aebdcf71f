"""Samples of similar length share one dense call of torch's scaled-dot-product attention. Runs on any device.

Legend: S slots of the micro-batch, Q slots with queries, G samples of a group, H local heads, D channels of a head.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from genlip_megatron.batch import PackedBatch
from genlip_megatron.device import to_device
from genlip_megatron.model.attention.backend import Backend, Spans, nothing_to_attend
from genlip_megatron.model.attention.rows import Rows, merge_rows, split_rows
from genlip_megatron.model.rope import rotate_

# Samples share a call while the shortest is at least this fraction of the longest: few calls, little padding.
_GROUP_FILL = 0.95


class _Turn(torch.autograd.Function):
    """``rope.apply_rotary``, with few buffers in both directions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.angles = cos, sin
        return rotate_(x.clone(), cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.angles
        return rotate_(grads[0].clone(), cos, -sin), None, None


def _rows(slots: np.ndarray, total: int, device: torch.device) -> Rows:
    """The rows at ``slots``; ``total`` marks rows past the end of a sample."""
    past_end = slots == total
    numbers = (slots, np.where(past_end, 0, slots), np.flatnonzero(past_end))
    return Rows(*(to_device(torch.from_numpy(x), device) for x in numbers))


def _members(spans: Spans) -> list[np.ndarray]:
    """The samples of each group, by number: similar numbers of queries and similar numbers of keys."""
    queries = spans.ends - spans.begins
    groups: list[list[int]] = []
    for i in np.lexsort((-queries, -spans.keys)).tolist():
        if groups:
            most_keys, most_queries = spans.keys[groups[-1][0]], queries[groups[-1][0]]
            fits = spans.keys[i] >= _GROUP_FILL * most_keys
            if fits and _GROUP_FILL * most_queries <= queries[i] <= most_queries:
                groups[-1].append(i)
                continue
        groups.append([i])
    return [np.array(group) for group in groups]


class Grouped(Backend):
    """One call for each group of samples, with a dense mask for each sample.

    Attributes:
        shapes: (samples, queries, keys) of each group's call.
    """

    rotate = staticmethod(_Turn.apply)

    def __init__(self, spans: Spans, batch: PackedBatch, cos: Tensor, sin: Tensor) -> None:
        super().__init__(spans, batch, cos, sin)
        self._biases: list[Tensor] = []
        self.shapes: list[tuple[int, int, int]] = []
        self._query_rows: list[Rows] = []
        self._key_rows: list[Rows] = []
        own = spans.last - spans.first
        for group in _members(spans):
            starts, images, begins, ends, keys = (
                column[group][:, None] for column in (spans.starts, spans.images, spans.begins, spans.ends, spans.keys)
            )
            query = begins + np.arange((ends - begins).max())
            key = np.arange(keys.max())
            query_slots = np.where(query < ends, starts + query - spans.first, own).ravel()
            key_slots = np.where(key < keys, starts + key, spans.total).ravel()
            self._query_rows.append(_rows(query_slots, own, cos.device))
            self._key_rows.append(_rows(key_slots, spans.total, cos.device))
            # A query sees only real keys, which lie before it or in its image. Queries past the end are dropped.
            sees = (key < images)[:, None, :] | (
                (query >= images)[:, :, None] & (key[None, None, :] <= query[:, :, None])
            )
            bias = torch.zeros(sees.shape, dtype=cos.dtype).masked_fill_(torch.from_numpy(~sees), float("-inf"))
            self._biases.append(to_device(bias[:, None], cos.device))
            self.shapes.append((len(group), query.shape[1], len(key)))

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float, **_: Any) -> Tensor:
        if not self.shapes:
            return nothing_to_attend(q, k, v)
        q, k = self.turned(q, k)
        groups = (split_rows(q, self._query_rows), split_rows(k, self._key_rows), split_rows(v, self._key_rows))
        parts = []
        for i, shape in enumerate(self.shapes):
            query, key, value = (x[i].unflatten(0, (shape[0], -1)).transpose(1, 2) for x in groups)  # [G, H, rows, D]
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=self._biases[i], scale=scale)
            parts.append(out.transpose(1, 2).flatten(0, 1))
        return merge_rows(len(q), self._query_rows, parts)
