"""Gradients of a step: their norm and finiteness, on the device, and clipping.

Megatron-Core's ``get_grad_norm`` brings the norm to the host, and without Transformer Engine and Apex one value per
parameter. Here the host waits only for the step's all-reduce of statistics.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.utils import get_data_parallel_group_if_dtensor, to_local_if_dtensor
from torch import Tensor

from genlip_megatron.device import current_device
from genlip_megatron.train.state import Run


def zero_gradients(run: Run) -> None:
    """Clear all gradients. Buckets also forget what they have reduced, so a second pass reduces again."""
    for chunk in run.model:
        chunk.zero_grad_buffer()
    run.optimizer.zero_grad()


def loss_and_gradients_finite(loss: Tensor, optimizer: Any) -> Tensor:
    """bool []: whether this rank's loss and gradients are all finite, on the device."""
    finite, gradients = loss.isfinite().all(), local_gradients(optimizer)
    if gradients:
        finite &= all_finite(gradients)
    return finite


def clip_gradients(optimizer: Any, grad_norm: float) -> None:
    """Clip as ``ChainedOptimizer.step`` does."""
    for part in _parts(optimizer):
        parameters = part.get_parameters()
        if parameters and part.config.clip_grad > 0:
            clip_grad_by_total_norm_fp32(parameters, max_norm=part.config.clip_grad, total_norm=grad_norm)


def local_gradients(optimizer: Any) -> list[Tensor]:
    """This rank's part of the summed gradients, including copies of parameters that other ranks hold as well."""
    parameters = [parameter for part in _parts(optimizer) for parameter in part.get_parameters()]
    return [to_local_if_dtensor(p.grad) for p in parameters if p.grad is not None and p.grad.numel()]


def _parts(optimizer: Any) -> list[Any]:
    """The optimizers within a chained one that hold parameters on this rank."""
    return [part for part in getattr(optimizer, "chained_optimizers", [optimizer]) if not part.is_stub_optimizer]


def all_finite(tensors: list[Tensor]) -> Tensor:
    """bool []: whether no value is NaN or Inf, on the device of ``tensors``. A few kernels for tensors of one dtype."""
    # The largest absolute value is NaN if any value is; squares of finite values may overflow.
    return torch.stack(torch._foreach_norm(tensors, math.inf)).isfinite().all()


def global_norm(optimizer: Any) -> Tensor:
    """float64 []: norm of the whole model's gradient, on the device; equals Megatron-Core's ``get_grad_norm``.

    Args:
        optimizer: with its gradients ready. The sum is over the ranks of its group, and of the group of sharded
            gradients (FSDP).
    """
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    gradients = [gradient for part in parts for gradient in part.get_main_grads_for_grad_norm()]
    sharded = None
    for gradient in gradients:
        sharded = get_data_parallel_group_if_dtensor(gradient, sharded)
    held = [local for local in map(to_local_if_dtensor, gradients) if local.numel()]
    square = torch.zeros((), dtype=torch.float64, device=current_device())
    if held:
        square += torch.stack(torch._foreach_norm(held)).double().square().sum()
    if sharded is not None:
        torch.distributed.all_reduce(square, group=sharded)
    torch.distributed.all_reduce(square, group=optimizer.get_grad_stats_parallel_group())
    return square.sqrt()
