"""Take rows of a tensor for a kernel call, and put rows of its output back; gathers in both directions, no scatter-add.

Legend: S rows of the whole tensor, n rows that a call takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genlip_megatron.device import to_device


@dataclass(frozen=True)
class Rows:
    """Which rows of a tensor [S, ...] a call takes, each at most once.

    Attributes:
        slots: int64 [n], where output rows go; S marks padding.
        sources: int64 [n], where input rows come from: ``slots``, and row 0 for padding.
        zeroed: int64, which of the n rows are padding that the call takes as zeros; None: the call ignores padding.
    """

    slots: Tensor
    sources: Tensor
    zeroed: Tensor | None = None

    @classmethod
    def of(cls, slots: np.ndarray, device: torch.device, padded_to: int | None = None) -> Rows:
        """The rows at ``slots``; with ``padded_to`` = S, padded to S rows."""
        if padded_to is None:
            taken = to_device(torch.from_numpy(slots), device)
            return cls(taken, taken)
        behind = (0, padded_to - len(slots))
        written, read = np.pad(slots, behind, constant_values=padded_to), np.pad(slots, behind)
        return cls(*(to_device(torch.from_numpy(x), device) for x in (written, read)))


def split_rows(x: Tensor, rows: Sequence[Rows], covers_all: bool = False) -> tuple[Tensor, ...]:
    """``x`` [S, ...] at each of ``rows``, which do not overlap; ``covers_all``: together they take every row."""
    parts: tuple[Tensor, ...] = _Split.apply(x, covers_all, *rows)
    return parts


def merge_rows(
    length: int, rows: Sequence[Rows], parts: Sequence[Tensor], zeroed: Tensor | None = None, covers_all: bool = False
) -> Tensor:
    """[length, ...] with ``parts`` at ``rows`` and zeros elsewhere.

    Args:
        zeroed: rows that become zero and get no gradient, as int64 [n] or bool [length].
        covers_all: ``rows`` hold every row.
    """
    merged: Tensor = _Merge.apply(length, covers_all, zeroed, rows, *parts)
    return merged


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, covers_all: bool, *rows: Rows) -> tuple[Tensor, ...]:
        ctx.length, ctx.covers_all, ctx.rows = len(x), covers_all, rows
        return _take(x, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _put(ctx.length, ctx.covers_all, ctx.rows, grads), *[None] * (1 + len(grads))


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, length: int, covers_all: bool, zeroed: Tensor | None, rows: Sequence[Rows], *parts: Tensor
    ) -> Tensor:
        ctx.zeroed, ctx.rows = zeroed, rows
        return _zero(_put(length, covers_all, rows, parts), zeroed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0] if ctx.zeroed is None else _zero(grads[0].clone(), ctx.zeroed)
        return None, None, None, None, *_take(grad, ctx.rows)


def _zero(x: Tensor, rows: Tensor | None) -> Tensor:
    if rows is None or not len(rows):
        return x
    if rows.dtype == torch.bool:
        return x.masked_fill_(rows.view(-1, *[1] * (x.ndim - 1)), 0.0)
    return x.index_fill_(0, rows, 0.0)


def _take(x: Tensor, rows: Sequence[Rows]) -> tuple[Tensor, ...]:
    return tuple(_zero(x.index_select(0, each.sources), each.zeroed) for each in rows)


def _put(length: int, covers_all: bool, rows: Sequence[Rows], parts: Sequence[Tensor]) -> Tensor:
    shape = (length + 1, *parts[0].shape[1:])  # the last row takes padding
    whole = parts[0].new_empty(shape) if covers_all else parts[0].new_zeros(shape)
    for each, part in zip(rows, parts, strict=True):
        whole.index_copy_(0, each.slots, part)
    return whole[:length]
