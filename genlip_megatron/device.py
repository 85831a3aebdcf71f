"""The device of this process, and how tensors and memory get there."""

from __future__ import annotations

import ctypes

import torch


def current_device() -> torch.device:
    """The device of this process: its GPU, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def to_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """``tensor`` on ``device``, without a wait: to a GPU only page-locked memory is copied behind the host's back."""
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        tensor = tensor if tensor.is_pinned() else tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def keep_freed_memory() -> None:
    """Let glibc reuse freed memory instead of handing it back to the system after every micro-batch.

    A training step frees and asks for the same hundreds of megabytes again and again; by default each return costs a
    page fault per 4 KiB. Other C libraries have no such switch and are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3
        mallopt(mmap_threshold, 32 * 2**20)  # glibc's maximum
        mallopt(trim_threshold, 2**31 - 1)
