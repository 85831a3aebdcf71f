"""Rerun of a bad step: compute it a second time to tell a faulty device from bad data.

Different numbers mean that a device computed wrong; the second result is used. The same numbers mean bad data or a
bad model; the update is skipped.

Megatron-Core's ``RerunStateMachine`` is not used: if a result repeats, it saves and ends the run by itself, with status
16 and then 17, which here means preemption. Its ``RerunDataIterator`` records only while that machine is on, and keeps
a step's micro-batches until the next step.
"""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from genlip_megatron.batch import PackedBatch
from genlip_megatron.faults.stop import NO_STOP_VOTES
from genlip_megatron.log import warn
from genlip_megatron.train.gradients import local_gradients
from genlip_megatron.train.state import Run
from genlip_megatron.train.statistics import Statistics, all_reduce_statistics

# Kernels that add in no fixed order change the last bits each time; a fault changes more than that.
_SAME_RESULT = 1e-3


class Replay(Iterator[PackedBatch]):
    """Micro-batches that can be read twice. It holds those of one step, on the host: patches that DALI decoded on the
    device are copied to pinned memory after the step's own work is queued."""

    def __init__(self, batches: Iterator[PackedBatch]) -> None:
        self._batches, self._held, self._replaying = batches, list[PackedBatch](), False

    def __next__(self) -> PackedBatch:
        if self._replaying:
            if not self._held:
                raise StopIteration
            return self._held.pop(0)
        batch = next(self._batches)
        self._held.append(_on_host(batch))
        return batch

    def rewind(self) -> None:
        """Iterate over the held micro-batches again, from the first; each is released once returned."""
        self._replaying = True


def _on_host(batch: PackedBatch) -> PackedBatch:
    """The micro-batch with its patches on the host; they are complete once the device has done its queued work."""
    if batch.patches is None or not batch.patches.is_cuda:
        return batch
    patches = torch.empty(batch.patches.shape, dtype=batch.patches.dtype, pin_memory=True)
    return replace(batch, patches=patches.copy_(batch.patches, non_blocking=True))


def rerun(
    run: Run,
    step: int,
    source: Replay,
    compute: Callable[[bool], tuple[Tensor, Tensor, Tensor]],
    loss: Tensor,
    first: Statistics,
) -> Statistics:
    """The statistics of a second pass over the same micro-batches with the same weights. A collective over all ranks.

    Logs which ranks computed different numbers. Gradients are summed over ranks: a wrong gradient shows on every rank
    that holds a part of the sum, but a wrong loss only on the ranks of one data-parallel replica. So the log names the
    ranks whose loss differs; if there are none, the ranks whose gradients differ.

    Args:
        compute: computes (loss, gradient norm, whether all is finite) of the step; True marks the second pass.
        loss, first: this rank's loss and the statistics of the first pass.
    """
    before = _own_numbers(run, loss)
    source.rewind()
    run.fp8_snapshot.restore()
    loss, grad_norm, finite = compute(True)
    after = _own_numbers(run, loss)
    second = all_reduce_statistics(loss, grad_norm, finite, NO_STOP_VOTES)
    differs = [not _same(a, b) for a, b in zip(before, after, strict=True)]
    where = f"rank {torch.distributed.get_rank()} on {socket.gethostname()} (process {os.getpid()})"
    reports: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(reports, (where, differs, before, after))
    for kind, name in enumerate(("loss", "gradient norm")):
        named = [(rank, old[kind], new[kind]) for rank, differs, old, new in reports if differs[kind]]
        if named:
            warn(
                f"step {step}: TRANSIENT FAULT: a second pass over the same micro-batches with the same weights gave "
                f"another {name}. A device computes wrong results; test or replace it: "
                + "; ".join(f"{rank}: {old:.6g}, then {new:.6g}" for rank, old, new in named)
            )
            break
    else:
        warn(f"step {step}: the second pass gave the same numbers: the data or the model is at fault, not a device")
    if second.finite:
        warn(f"step {step}: the second pass is finite and is used")
    return replace(second, stop=first.stop, unwritten=first.unwritten)


def _own_numbers(run: Run, loss: Tensor) -> tuple[float, float]:
    """(sum of losses, norm of the gradients) of this rank only."""
    squares = [gradient.double().square().sum() for gradient in local_gradients(run.optimizer)]
    return loss.tolist()[0], math.sqrt(float(torch.stack(squares).sum())) if squares else 0.0


def _same(first: float, second: float) -> bool:
    """Whether two results of one computation are equal up to rounding; NaN and Inf are equal."""
    if not (math.isfinite(first) and math.isfinite(second)):
        return math.isfinite(first) == math.isfinite(second)
    return math.isclose(first, second, rel_tol=_SAME_RESULT)
