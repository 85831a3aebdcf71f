"""The exchange between context-parallel ranks around attention, which stays exact wherever a sequence is split.

Each rank holds S / C neighbouring slots of all its heads. ``a2a`` gives every rank all slots of H / C heads during
attention; ``all_gather`` gives every rank the keys and values of all slots, for its own queries. a2a moves 2 / C of the
bytes that all_gather moves; all_gather works with any number of heads.

Legend: S slots of the micro-batch, C context-parallel ranks, H heads of this tensor-parallel rank, D channels.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import tensor_parallel
from torch import Tensor


def sequence_for_heads(q: Tensor, k: Tensor, v: Tensor, group: Any) -> tuple[Tensor, ...]:
    """Queries, keys and values [S, H / C, D] from [S / C, H, D]."""
    ranks, head_dim = group.size(), q.shape[-1]
    together = torch.cat((q, k, v), dim=-1).unflatten(1, (ranks, -1)).transpose(0, 1)  # [C, S/C, H/C, 3D]
    received = tensor_parallel.all_to_all(group, together.contiguous())
    q, k, v = received.flatten(0, 1).split(head_dim, dim=-1)
    # Rotary positions copy queries and keys. A view v would keep all three in memory until the backward pass.
    return q, k, v.contiguous()


def heads_for_sequence(x: Tensor, group: Any) -> Tensor:
    """[S / C, H, D] from [S, H / C, D]."""
    received = tensor_parallel.all_to_all(group, x.unflatten(0, (group.size(), -1)).contiguous())  # [C, S/C, H/C, D]
    return received.transpose(0, 1).flatten(1, 2)


def gather_sequence(x: Tensor, group: Any) -> Tensor:
    """[S, ...] from [S / C, ...]; its gradient is summed over the ranks, since each rank used the whole."""
    return tensor_parallel.gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=group)
