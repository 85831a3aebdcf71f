"""Collectives for saving and loading; errors reach every rank. A single process needs no process group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from genlip_megatron.checkpoint.paths import NotSaved
from genlip_megatron.device import current_device


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def from_rank_0(value: Any) -> Any:
    """Rank 0's ``value`` on every rank."""
    box = [value]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def lowest(value: int) -> int:
    """The minimum of all ranks' values."""
    box = torch.tensor([value], device=current_device())
    torch.distributed.all_reduce(box, op=torch.distributed.ReduceOp.MIN)
    return int(box.item())


def gather(value: Any, group: torch.distributed.ProcessGroup | None = None) -> list[Any]:
    """The values of all ranks of ``group`` (default: all ranks), on each of them."""
    if not torch.distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(values, value, group=group)
    return values


def gather_on_rank_0(value: Any) -> list[Any]:
    """The values of all ranks, on rank 0; an empty list elsewhere."""
    values: list[Any] = [None] * torch.distributed.get_world_size() if torch.distributed.get_rank() == 0 else []
    torch.distributed.gather_object(value, values or None, dst=0)
    return values


def on_rank_0(function: Callable[[], Any], only_there: bool = False) -> Any:
    """Call ``function`` on rank 0; returns its result on every rank, or None on the others with ``only_there``.

    Raises:
        NotSaved: it failed on rank 0. Raised on every rank.
    """
    value, error = _tried(function) if rank() == 0 else (None, None)
    sent, error = from_rank_0((None if only_there else value, error))
    if error is not None:
        raise NotSaved(error)
    return value if rank() == 0 else sent


def everywhere(function: Callable[[], Any]) -> Any:
    """Call ``function`` on each rank; returns this rank's result. A collective.

    Args:
        function: must not wait for other ranks if it may fail on some.

    Raises:
        NotSaved: it failed on any rank. Raised on every rank.
    """
    value, error = _tried(function)
    if not lowest(error is None):
        raise NotSaved(first_of(gather(error)))
    return value


def first_of(messages: Sequence[str | None]) -> str:
    """The first four of the ranks' messages in one line, each with its rank; empty if there are none."""
    named = [f"rank {i}: {message}" for i, message in enumerate(messages) if message]
    return "; ".join(named[:4]) + (f"; and on {len(named) - 4} more" if len(named) > 4 else "")


def _tried(function: Callable[[], Any]) -> tuple[Any, str | None]:
    """(result, None) of ``function``, or (None, error message)."""
    try:
        return function(), None
    except Exception as error:  # any error, because the other ranks wait for the answer
        return None, str(error) if isinstance(error, NotSaved) else f"{type(error).__name__}: {error}"
