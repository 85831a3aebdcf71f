"""Samples of similar length share one dense call of torch's scaled-dot-product attention. Runs on any device.

Legend: S slots of the micro-batch, Q slots with queries, G samples of a group, H local heads, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from genlip_megatron.batch import PackedBatch
from genlip_megatron.device import to_device
from genlip_megatron.model.attention.backend import Backend, Place, Spans, nothing_to_attend
from genlip_megatron.model.rope import rotate_

# Samples share a call while the shortest is at least this fraction of the longest: few calls, little padding.
_GROUP_FILL = 0.95


class _Rows:
    """The rows of queries, or of keys, in each group's call, with their rotary angles.

    Args:
        slots: for each group, int64 [G * length]: the slot of each row; ``total`` marks rows past the end of a sample.
        cos, sin: [total, D] of the slots.
    """

    def __init__(self, slots: Sequence[np.ndarray], cos: Tensor, sin: Tensor) -> None:
        self.cos, self.sin, self.total = cos, sin, cos.shape[0]
        covered = np.zeros(self.total + 1, bool)
        for rows in slots:
            covered[rows] = True

        def on_device(numbers: np.ndarray) -> Tensor:
            return to_device(torch.from_numpy(numbers), cos.device)

        self.slots = [on_device(rows) for rows in slots]
        self.past_end = [on_device(np.flatnonzero(rows == self.total)) for rows in slots]
        self.inside = [on_device(np.minimum(rows, self.total - 1)) for rows in slots]
        self.unused = on_device(np.flatnonzero(~covered[: self.total]))
        self.angles = [(cos.index_select(0, rows), sin.index_select(0, rows)) for rows in self.inside]

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """Each group's rows of ``x`` [total, ...]; zeros past the end of a sample."""
        parts = []
        for rows, past_end in zip(self.inside, self.past_end, strict=True):
            part = x.index_select(0, rows)
            parts.append(part.index_fill_(0, past_end, 0.0) if len(past_end) else part)
        return tuple(parts)

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of ``split``; zeros at slots outside every group."""
        # The last row collects rows past the end of a sample.
        out = parts[0].new_empty(self.total + 1, *parts[0].shape[1:])
        for slots, part in zip(self.slots, parts, strict=True):
            out.index_copy_(0, slots, part)
        return out[: self.total].index_fill_(0, self.unused, 0.0)


class _ToGroups(torch.autograd.Function):
    """The rows of each group from query, key or value; ``rotary`` turns them by their rotary angles.

    Gathers in both directions, no scatter-add: deterministic, and no buffers besides the results.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: _Rows, rotary: bool) -> tuple[Tensor, ...]:
        ctx.rows, ctx.rotary = rows, rotary
        parts = rows.split(x)
        if rotary:
            for part, (cos, sin) in zip(parts, rows.angles, strict=True):
                rotate_(part, cos, sin)
        return parts

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad = ctx.rows.merge(grads)
        return rotate_(grad, ctx.rows.cos, -ctx.rows.sin) if ctx.rotary else grad, None, None


class _FromGroups(torch.autograd.Function):
    """The rows of each group back in their slots."""

    @staticmethod
    def forward(ctx: Any, rows: _Rows, *parts: Tensor) -> Tensor:
        ctx.rows = rows
        return rows.merge(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.rows.split(grads[0])


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

    def __init__(self, spans: Spans, batch: PackedBatch, cos: Tensor, sin: Tensor) -> None:
        self._biases: list[Tensor] = []
        self.shapes: list[tuple[int, int, int]] = []
        query_slots, key_slots = [], []
        for group in _members(spans):
            starts, images, begins, ends, keys = (
                column[group][:, None] for column in (spans.starts, spans.images, spans.begins, spans.ends, spans.keys)
            )
            query = begins + np.arange((ends - begins).max())
            key = np.arange(keys.max())
            query_slots.append(np.where(query < ends, starts + query - spans.first, spans.last - spans.first).ravel())
            key_slots.append(np.where(key < keys, starts + key, spans.total).ravel())
            # A query sees only real keys, which lie before it or in its image. Queries past the end are dropped.
            sees = (key < images)[:, None, :] | (
                (query >= images)[:, :, None] & (key[None, None, :] <= query[:, :, None])
            )
            bias = torch.zeros(sees.shape, dtype=cos.dtype).masked_fill_(torch.from_numpy(~sees), float("-inf"))
            self._biases.append(to_device(bias[:, None], cos.device))
            self.shapes.append((len(group), query.shape[1], len(key)))
        own = slice(spans.first, spans.last)
        self._keys = _Rows(key_slots, cos, sin)
        whole = spans.last - spans.first == spans.total
        self._queries = self._keys if whole else _Rows(query_slots, cos[own], sin[own])

    @staticmethod
    def why_not(place: Place) -> str | None:
        return None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float, **_: Any) -> Tensor:
        if not self.shapes:
            return nothing_to_attend(q, k, v)
        queries = _ToGroups.apply(q, self._queries, True)
        keys, values = _ToGroups.apply(k, self._keys, True), _ToGroups.apply(v, self._keys, False)
        parts = []
        for i, (size, *lengths) in enumerate(self.shapes):
            query = queries[i].unflatten(0, (size, lengths[0])).transpose(1, 2)  # [G, H, queries, D]
            key, value = (x[i].unflatten(0, (size, lengths[1])).transpose(1, 2) for x in (keys, values))
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=self._biases[i], scale=scale)
            parts.append(out.transpose(1, 2).flatten(0, 1))
        return _FromGroups.apply(self._queries, *parts)
