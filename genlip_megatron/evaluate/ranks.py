"""What the ranks of an evaluation exchange; everything is also right for one process without a group."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as differentiable
from torch import Tensor


def start(device: str) -> torch.device:
    """Join the group that ``torchrun`` describes, if any; returns this rank's device.

    Args:
        device: the value of ``--device``; with several ranks "auto" is the GPU of the local rank.

    Raises:
        ValueError: several ranks and one device by name, or no such device.
    """
    from genlip_megatron.infer.load import pick_device

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return pick_device(device)
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device {device}: torchrun gives each rank its own GPU. Use auto, cuda or cpu.")
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    chosen = pick_device(f"cuda:{os.environ['LOCAL_RANK']}" if on_gpu else "cpu")
    if on_gpu:
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    return chosen


def stop() -> None:
    """Leave the group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Number of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def wait() -> None:
    """Return when every rank has called it."""
    if world_size() > 1:
        dist.barrier()


def total(tensor: Tensor) -> Tensor:
    """The sum over ranks; gradients flow to every rank's part."""
    return differentiable.all_reduce(tensor) if world_size() > 1 else tensor


def average_gradients(parameters: Sequence[Tensor]) -> None:
    """Replace every gradient by its mean over ranks."""
    if world_size() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= world_size()
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def gather(thing: Any) -> list[Any]:
    """What each rank holds, by rank. Small things only: they are pickled."""
    if world_size() == 1:
        return [thing]
    things: list[Any] = [None] * world_size()
    dist.all_gather_object(things, thing)
    return things
