"""Replica check: ranks that should hold the same weights compare hashes of their bytes (xxh3, 128 bits).

Different bytes mean that a device or a link is faulty, and the weights cannot be trusted. The majority is assumed to
be right. The check compares

* all parameters over the data- and context-parallel ranks,
* parameters marked ``sequence_parallel`` over the tensor-parallel ranks. Their gradients are summed over these ranks,
  so the copies stay equal bit for bit. For other copies each rank computes its own gradient; kernels that add in no
  fixed order may change the last bit without a fault.

Limit: in each step the distributed optimizer sends all weights from the ranks that own them. The check finds errors
since then, and errors of every step. A wrong weight of the owner reaches all replicas and is not found.

Cost: one copy of the weights to the CPU and their hash, about 10 GB/s.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
import xxhash
from megatron.core import parallel_state
from torch import Tensor

from genlip_megatron.faults.exits import EXIT_REPLICAS_DIFFER, LeaveRun

Hashes = dict[str, bytes]


def hash_tensor(tensor: Tensor) -> bytes:
    """16 bytes: a hash of a tensor's bits, including NaN and signed zeros."""
    values: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return xxhash.xxh3_128_digest(values)


def odd_ranks(hashes: dict[int, Hashes]) -> dict[int, str]:
    """{rank that differs from the majority: its first parameter that differs}; in a tie, all ranks.

    >>> good, bad = {"a": b"1", "b": b"2"}, {"a": b"1", "b": b"3"}
    >>> odd_ranks({0: good, 1: bad, 2: good})
    {1: 'b'}
    >>> odd_ranks({0: good, 1: bad})
    {0: 'b', 1: 'b'}
    """
    odd: dict[int, str] = {}
    for name in next(iter(hashes.values())):
        found = Counter(of_rank[name] for of_rank in hashes.values())
        most, times = found.most_common(1)[0]
        clear = times > len(hashes) / 2
        if len(found) > 1:
            for rank, of_rank in hashes.items():
                if not clear or of_rank[name] != most:
                    odd.setdefault(rank, name)
    return odd


def check_replicas(named_parameters: Iterable[tuple[str, Tensor]], step: int) -> None:
    """Compare this rank's parameters with those of its replicas. A collective over all ranks.

    Raises:
        LeaveRun: they differ; the message names the ranks, their hosts and parameters. Raised on every rank.
    """
    groups = (
        parallel_state.get_data_parallel_group(with_context_parallel=True),
        parallel_state.get_tensor_model_parallel_group(),
    )
    if all(group.size() == 1 for group in groups):
        return  # true on every rank
    parameters = list(named_parameters)
    hashes = {name: hash_tensor(parameter) for name, parameter in parameters}
    shared = {name: hashes[name] for name, parameter in parameters if getattr(parameter, "sequence_parallel", False)}
    odd: dict[int, str] = {}
    for mine, group in zip((hashes, shared), groups, strict=True):
        digest = xxhash.xxh3_128_digest(b"".join(mine.values()))
        if len(set(_gather(digest, group))) > 1:
            odd = odd_ranks(dict(_gather((torch.distributed.get_rank(), mine), group))) | odd
    everyone = _gather((odd, socket.gethostname()))
    named = {rank: name for found, _ in everyone for rank, name in found.items()}
    if not named:
        return
    which = "; ".join(f"rank {rank} on {everyone[rank][1]}, first in {name}" for rank, name in sorted(named.items()))
    raise LeaveRun(
        EXIT_REPLICAS_DIFFER,
        f"step {step}: weights that should be equal differ: {which}. Of two ranks that differ, either may be wrong. "
        "Nothing was saved. Remove the machine and restart from the last checkpoint",
    )


def _gather(value: Any, group: torch.distributed.ProcessGroup | None = None) -> list[Any]:
    values: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(values, value, group=group)
    return values
