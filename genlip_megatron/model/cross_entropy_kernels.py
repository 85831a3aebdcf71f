"""Triton kernels of ``cross_entropy.py``: one program for each row, which reads the row in blocks of columns.

Imported only on a machine with a GPU. ``TRITON_INTERPRET=1`` runs them on a CPU, slowly, for tests.

Legend: R rows, V columns of the logits in memory; the first ``columns`` of them are tokens, the rest padding.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK, _WARPS = 4096, 8


@triton.jit
def _statistics(logits, labels, top, total, target, stride, columns, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    # Rows times columns can exceed 2**31.
    logits += row.to(tl.int64) * stride
    lane = tl.arange(0, BLOCK)
    # Each lane keeps its own maximum and sum until the end. The initial maximum is finite, to avoid inf - inf; a rank
    # without tokens keeps it, with a sum of 0.
    lane_top = tl.full((BLOCK,), -1e30, tl.float32)
    lane_sum = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + lane
        x = tl.load(logits + column, mask=column < columns, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(lane_top, x)
        lane_sum = lane_sum * tl.exp(lane_top - higher) + tl.exp(x - higher)
        lane_top = higher
    row_top = tl.max(lane_top, 0)
    tl.store(top + row, row_top)
    tl.store(total + row, tl.sum(lane_sum * tl.exp(lane_top - row_top), 0))
    label = tl.load(labels + row)
    mine = (label >= 0) & (label < columns)
    tl.store(target + row, tl.load(logits + label, mask=mine, other=0.0).to(tl.float32))


@triton.jit
def _gradient(  # type: ignore[no-untyped-def]
    logits, labels, top, scale, weight, stride, columns, width, BLOCK: tl.constexpr
):
    row = tl.program_id(0)
    logits += row.to(tl.int64) * stride
    lane = tl.arange(0, BLOCK)
    row_top, row_scale, row_weight = tl.load(top + row), tl.load(scale + row), tl.load(weight + row)
    label = tl.load(labels + row)
    label = tl.where(label < columns, label, -1)
    for start in range(0, width, BLOCK):
        column = start + lane
        x = tl.load(logits + column, mask=column < columns, other=float("-inf")).to(tl.float32)
        x = tl.exp(x - row_top) * row_scale - tl.where(column == label, row_weight, 0.0)
        # Padding gets the gradient 0.
        tl.store(logits + column, x.to(logits.dtype.element_ty), mask=column < width)


def row_statistics(logits: Tensor, labels: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """float32 [R] each: the largest logit, the sum of ``exp(logit - largest)``, and the label's logit.

    Args:
        logits: [R, V], columns contiguous; without tokens the largest is -1e30 and the sum 0.
        labels: int64 [R]; a label outside 0 to ``columns`` has the logit 0.
    """
    top, total, target = logits.new_empty((3, logits.shape[0]), dtype=torch.float32).unbind()
    if len(logits):
        _statistics[(len(logits),)](
            logits, labels, top, total, target, logits.stride(0), columns, BLOCK=_BLOCK, num_warps=_WARPS
        )
    return top, total, target


def to_gradient_(logits: Tensor, labels: Tensor, columns: int, top: Tensor, scale: Tensor, row_weights: Tensor) -> None:
    """``logits`` [R, V] become ``exp(logits - top) * scale``, minus ``row_weights`` in the label's column.

    Args:
        labels: int64 [R]; a label outside 0 to ``columns`` has no column.
        top, scale, row_weights: float32 [R].
    """
    if len(logits):
        _gradient[(len(logits),)](
            logits, labels, top, scale, row_weights.contiguous(), logits.stride(0), columns, logits.shape[1],
            BLOCK=_BLOCK, num_warps=_WARPS,
        )  # fmt: skip
