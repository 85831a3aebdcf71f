"""A step's statistics: one all-reduce gives every rank the same numbers, so every rank decides the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from torch import Tensor


@dataclass(frozen=True)
class Statistics:
    """A step's statistics after the all-reduce, the same on every rank.

    Attributes:
        loss_sum, loss_count: sum of the losses of the global batch's answer tokens, and their number.
        grad_norm: of the whole model, before clipping.
        bad_ranks: number of ranks whose own loss or gradients are not all finite.
        stop: for each of ``faults.stop.REASONS``, whether any rank votes to stop.
        unwritten: number of ranks whose asynchronous checkpoint is not written yet.
    """

    loss_sum: float
    loss_count: float
    grad_norm: float
    bad_ranks: int
    stop: tuple[bool, ...]
    unwritten: int

    @property
    def loss(self) -> float:
        """Mean loss of an answer token."""
        return self.loss_sum / max(self.loss_count, 1.0)

    @property
    def finite(self) -> bool:
        """Whether every number of every rank is finite."""
        return not self.bad_ranks and math.isfinite(self.loss_sum) and math.isfinite(self.grad_norm)


def all_reduce_statistics(
    loss: Tensor, grad_norm: Tensor, finite: Tensor, stop_votes: Sequence[float], unwritten: bool = False
) -> Statistics:
    """One all-reduce of 8 float64 numbers over all ranks. The host waits for the device once.

    Args:
        loss: float64 [2], this rank's (sum of losses, answer tokens); equal on tensor-parallel ranks.
        grad_norm: float64 [], of the whole model; rank 0's counts.
        finite: bool [], whether all of this rank's numbers are finite. The norm does not show this: it counts a
            parameter that tensor-parallel ranks replicate on one rank only.
        stop_votes: this rank's votes, one for each of ``faults.stop.REASONS``.
        unwritten: this rank's checkpoint is not written yet.
    """
    host = [0.0, 0.0, 0.0, 0.0, float(unwritten), *stop_votes]
    # Only pinned memory is copied to the device without a wait.
    vector = torch.tensor(host, dtype=torch.float64, pin_memory=loss.is_cuda).to(loss.device, non_blocking=True)
    if parallel_state.get_tensor_model_parallel_rank() == 0:
        vector[:2] = loss
    vector[2] = ~finite
    if torch.distributed.get_rank() == 0:
        vector[3] = grad_norm
    torch.distributed.all_reduce(vector)
    loss_sum, loss_count, bad_ranks, norm, pending, *votes = vector.tolist()
    return Statistics(loss_sum, loss_count, norm, int(bad_ranks), tuple(vote > 0 for vote in votes), int(pending))
