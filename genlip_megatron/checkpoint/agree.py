"""Ranks that act as one: what rank 0 finds or does is known to all of them. One process needs no process group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


class NotSaved(RuntimeError):
    """A checkpoint could not be written; what was there before is untouched. Raised on every rank alike."""


def from_rank_0(value: Any) -> Any:
    """Rank 0's ``value`` on every rank."""
    box = [value]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: Any, group: torch.distributed.ProcessGroup | None = None) -> list[Any]:
    """``value`` of every rank of a group, or of all, on each of them."""
    if not torch.distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(values, value, group=group)
    return values


def gather_on_rank_0(value: Any) -> list[Any]:
    """``value`` of every rank on rank 0; an empty list elsewhere."""
    values: list[Any] = [None] * torch.distributed.get_world_size() if torch.distributed.get_rank() == 0 else []
    torch.distributed.gather_object(value, values or None, dst=0)
    return values


def on_rank_0(function: Callable[[], Any]) -> Any:
    """What ``function`` returns on rank 0, on every rank.

    Raises:
        NotSaved: on every rank, when it failed on rank 0.
    """
    value, error = None, None
    if rank() == 0:
        try:
            value = function()
        except Exception as caught:  # whatever it is, the other ranks wait for the answer
            error = str(caught) if isinstance(caught, NotSaved) else f"{type(caught).__name__}: {caught}"
    value, error = from_rank_0((value, error))
    if error is not None:
        raise NotSaved(error)
    return value
