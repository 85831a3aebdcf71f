"""The device of this process, and how tensors get there."""

from __future__ import annotations

import torch


def current_device() -> torch.device:
    """The device of this process: its GPU, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def to_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """``tensor`` on ``device``, without a wait. A copy to a GPU is asynchronous only from page-locked memory."""
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        tensor = tensor if tensor.is_pinned() else tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
