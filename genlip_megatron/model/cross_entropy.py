"""Cross entropy of a chunk of logits, sharded over tensor-parallel ranks by columns; the gradient replaces the logits.

On a GPU two Triton kernels read and write the logits in bfloat16, with statistics in float32. Elsewhere torch does the
same, with a float32 copy of a bfloat16 chunk. Ranks exchange three numbers for each row, in two all-reduces.

Legend: R rows of the chunk, V vocabulary columns of this rank.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

# Bytes of a chunk's logits on a GPU: thousands of rows of the real vocabulary, enough to fill its matrix units.
_LOGITS_BUDGET = 640 * 2**20
_MOST_ROWS, _ROW_MULTIPLE = 8192, 128
# On a CPU, few enough that the logits stay in its caches.
_CPU_ROWS = 512
# Vocabulary rows of the weight's gradient in one product, where a bfloat16 product cannot be added in float32.
PIECE = 4096


@functools.cache
def has_triton() -> bool:
    """Whether the kernels can be compiled; torch's CUDA builds include Triton."""
    return importlib.util.find_spec("triton") is not None


def logit_bytes(device_type: str, element_size: int) -> int:
    """Bytes that a logit of ``element_size`` bytes takes while its gradient is computed.

    A torch build without CUDA assumes Triton: the estimate is then for another machine.
    """
    in_place = element_size == 4 or (device_type != "cpu" and (has_triton() or torch.version.cuda is None))
    return element_size if in_place else element_size + 4


def chunk_rows(rows: int, columns: int, device_type: str, element_size: int) -> int:
    """Rows of a chunk, so that ``rows`` split into few chunks of about equal length within the budget.

    At the real vocabulary in bfloat16 on one tensor-parallel rank:

        >>> chunk_rows(4224, 151936, "cuda", 2)
        2176
    """
    if device_type == "cpu":
        return _CPU_ROWS
    fit = _LOGITS_BUDGET // (columns * logit_bytes(device_type, element_size)) // _ROW_MULTIPLE * _ROW_MULTIPLE
    most = min(max(fit, _ROW_MULTIPLE), _MOST_ROWS)
    chunks = max(-(-rows // most), 1)
    return max(-(-rows // chunks // _ROW_MULTIPLE), 1) * _ROW_MULTIPLE


def cross_entropy_(
    logits: Tensor, labels: Tensor, row_weights: Tensor, columns: int, group: Any, with_gradient: bool
) -> Tensor:
    """float32 [R], the cross entropy of each row; ``logits`` becomes the gradient of their weighted sum.

    Args:
        logits: [R, V], float32 or bfloat16; columns past ``columns`` are padding and are not read. Without
            ``with_gradient`` their values are undefined afterwards.
        labels: int64 [R], as columns of this rank; labels outside 0 to ``columns`` belong to another rank.
        row_weights: float32 [R].
        columns: real columns of this rank, at most V; may be 0.
        group: tensor-parallel ranks.
    """
    function = _in_place if logits.is_cuda and has_triton() else _plain
    return function(logits, labels, row_weights, columns, group, with_gradient)


def add_product_(total: Tensor, grad: Tensor, x: Tensor) -> None:
    """``total`` [V, E] += ``grad`` [R, V] transposed times ``x`` [R, E], summed in the dtype of ``total``."""
    if total.dtype == grad.dtype:
        total.addmm_(grad.T, x)
    elif total.is_cuda:
        torch.ops.aten.addmm.dtype_out(total, grad.T, x, total.dtype, out=total)
    else:
        for start in range(0, len(total), PIECE):
            total[start : start + PIECE] += grad[:, start : start + PIECE].T @ x


def _plain(
    logits: Tensor, labels: Tensor, row_weights: Tensor, columns: int, group: Any, with_gradient: bool
) -> Tensor:
    if columns < logits.shape[1]:
        logits[:, columns:] = float("-inf")
    scores = logits.float()  # no copy if they are float32
    own = (labels >= 0) & (labels < columns)
    at = labels.clamp(0, max(columns - 1, 0))[:, None]
    target = scores.gather(1, at).squeeze(1).masked_fill(~own, 0.0)
    top = _reduce(scores.amax(dim=-1), torch.distributed.ReduceOp.MAX, group)
    scores.sub_(top[:, None]).exp_()
    normaliser, target = _reduce(torch.stack((scores.sum(dim=-1), target)), torch.distributed.ReduceOp.SUM, group)
    if with_gradient:
        scores.mul_((row_weights / normaliser)[:, None])
        scores.scatter_add_(1, at, -(own * row_weights)[:, None])
        if scores is not logits:
            logits.copy_(scores)
    return top + normaliser.log() - target


def _in_place(
    logits: Tensor, labels: Tensor, row_weights: Tensor, columns: int, group: Any, with_gradient: bool
) -> Tensor:
    kernels = importlib.import_module("genlip_megatron.model.cross_entropy_kernels")
    own_top, own_sum, target = kernels.row_statistics(logits, labels, columns)
    top = _reduce(own_top.clone(), torch.distributed.ReduceOp.MAX, group)
    own_sum *= (own_top - top).exp()
    normaliser, target = _reduce(torch.stack((own_sum, target)), torch.distributed.ReduceOp.SUM, group)
    if with_gradient:
        kernels.to_gradient_(logits, labels, columns, top, row_weights / normaliser, row_weights)
    return top + normaliser.log() - target


def _reduce(x: Tensor, operation: Any, group: Any) -> Tensor:
    if group.size() > 1:
        torch.distributed.all_reduce(x, op=operation, group=group)
    return x
