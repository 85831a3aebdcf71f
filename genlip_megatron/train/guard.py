"""The guarded training step: what a step computed is looked at by all ranks together before the weights change.

1. Forward and backward over the micro-batches; gradients are ready. Their global norm is an all-reduce and stays on the
   device, where Megatron-Core's ``get_grad_norm`` would bring it to the host, without Transformer Engine and Apex a
   value per parameter.
2. One more all-reduce of a few numbers over all ranks, and the step's one wait for the device: loss, norm, whether any
   rank has numbers that are not finite, whether any was told to stop. From here on every rank knows the same and
   decides the same. The norm alone would not do: it counts copies on tensor-parallel ranks once, by rank 0's.
3. Numbers that are not finite: the step is computed once more (``faults.rerun_bad_steps``). Other numbers mean a device
   that computed wrong, and the second result is used; the same numbers mean data or model, and the update is left out.
4. A loss or norm far above the last ones is a spike: the update is made, left out, or the run goes back, as
   ``faults.on_spike`` says.
5. Otherwise gradients are clipped and the update is made, by the same calls as ``MegatronOptimizer.step``.

An update that is left out leaves weights, moments, schedule and the scales of delayed FP8 scaling as they were, bit for
bit; the second pass of a step begins with the scales of the first.

Megatron-Core's ``RerunStateMachine`` serves the third point, but decides by itself that a run ends: where a result
repeats it asks for a checkpoint and exits with 16, to compute it on another device, then with 17, which here means
preemption; its authors call it alpha. Its ``RerunDataIterator`` fits in purpose, yet it records only while that
machine's global instance is on, cannot be iterated over, and keeps a step's micro-batches until the next begins.
``Replay`` does the same in a few lines.
"""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.utils import get_data_parallel_group_if_dtensor, to_local_if_dtensor
from torch import Tensor

from genlip_megatron.batch import PackedBatch
from genlip_megatron.config import RunConfig
from genlip_megatron.device import current_device
from genlip_megatron.faults.inject import Injector
from genlip_megatron.faults.spikes import SpikeJudge
from genlip_megatron.faults.stop import REASONS
from genlip_megatron.log import warn
from genlip_megatron.model.fp8_state import FP8Snapshot
from genlip_megatron.model.genlip import unwrap
from genlip_megatron.train.step import Stepper

# Kernels that add in no fixed order give other last bits each time; a fault changes more than that.
_SAME_RESULT = 1e-3
_COUNTS = ("skipped", "spikes", "without_update", "rollbacks", "back_at")


def no_stop_votes() -> list[float]:
    """The votes of a rank that was told nothing."""
    return [0.0] * len(REASONS)


class Replay(Iterator[PackedBatch]):
    """Micro-batches that can be had once more. It holds those of one step, on the host: patches that DALI decoded on
    the device are copied there behind the step's own work."""

    def __init__(self, batches: Iterator[PackedBatch]) -> None:
        self._batches, self._held, self._again = batches, list[PackedBatch](), False

    def __next__(self) -> PackedBatch:
        if self._again:
            if not self._held:
                raise StopIteration
            return self._held.pop(0)
        batch = next(self._batches)
        self._held.append(_on_host(batch))
        return batch

    def rewind(self) -> None:
        """Give the held micro-batches again, from the first; each is let go as it is given."""
        self._again = True


def _on_host(batch: PackedBatch) -> PackedBatch:
    """The same micro-batch with its patches on the host. They are there once the device has done what it was given."""
    if batch.patches is None or not batch.patches.is_cuda:
        return batch
    patches = torch.empty(batch.patches.shape, dtype=batch.patches.dtype, pin_memory=True)
    return replace(batch, patches=patches.copy_(batch.patches, non_blocking=True))


@dataclass(frozen=True)
class Numbers:
    """What all ranks know of a step once they have agreed; the same on each.

    Attributes:
        loss_sum, loss_count: sum of the losses of the global batch's answer tokens, and their number.
        grad_norm: of the whole model, before clipping.
        bad_ranks: ranks whose own loss or gradients are not all finite.
        stop: which of ``faults.stop.REASONS`` any rank has to stop.
        unwritten: ranks whose asynchronous checkpoint is not written yet.
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
        """Whether an update may be made from it."""
        return not self.bad_ranks and math.isfinite(self.loss_sum) and math.isfinite(self.grad_norm)


@dataclass(frozen=True)
class Outcome(Numbers):
    """A step and what became of it.

    Attributes:
        verdict: "good", "bad" (not finite) or "spike".
        updated: whether the weights changed.
        roll_back: why the run should go back to its last checkpoint; empty when it need not.
    """

    verdict: str
    updated: bool
    roll_back: str


def all_finite(tensors: list[Tensor]) -> Tensor:
    """bool []: whether no value is NaN or Inf, on the device of ``tensors``. A few kernels for tensors of one dtype."""
    # Largest values, which NaN is taken for; squares of finite values may overflow.
    return torch.stack(torch._foreach_norm(tensors, math.inf)).isfinite().all()


def global_norm(optimizer: Any) -> Tensor:
    """float64 []: norm of the whole model's gradient, on the device; as Megatron-Core's ``get_grad_norm``.

    Args:
        optimizer: with its gradients ready. The group it names sums over ranks, and that of sharded gradients (FSDP).
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


def agree(total: Tensor, grad_norm: Tensor, finite: Tensor, stop: list[float], unwritten: bool) -> Numbers:
    """One all-reduce over all ranks, of 8 numbers in float64. The host waits for the device once.

    Args:
        total: float64 [2], this rank's (sum of losses, answer tokens); equal on tensor-parallel ranks.
        grad_norm: float64 [], of the whole model; every rank has it, and rank 0's counts.
        finite: bool [], whether all of this rank's numbers are.
        stop: this rank's votes, one of each of ``REASONS``.
        unwritten: this rank's checkpoint is not written yet.
    """
    counts = parallel_state.get_tensor_model_parallel_rank() == 0
    known = [0.0, 0.0, 0.0, 0.0, float(unwritten), *stop]
    # Of pinned memory, which alone is copied without a wait.
    vector = torch.tensor(known, dtype=torch.float64, pin_memory=total.is_cuda).to(total.device, non_blocking=True)
    if counts:
        vector[:2] = total
    vector[2] = ~finite
    if torch.distributed.get_rank() == 0:
        vector[3] = grad_norm
    torch.distributed.all_reduce(vector)
    loss_sum, loss_count, bad, norm, pending, *wishes = vector.tolist()
    return Numbers(loss_sum, loss_count, norm, int(bad), tuple(wish > 0 for wish in wishes), int(pending))


class Guard:
    """Makes the steps of a run, and remembers how they went.

    Args:
        config: the run's configuration.
        model: chunks of this rank, wrapped.
        optimizer: any of Megatron-Core's, or ``FullyShardedOptimizer``.
        scheduler: stepped with each update.
        stepper: computes losses and gradients.
        injector: faults that are to happen.

    Attributes:
        skipped: steps without an update since the run began.
        spikes: spikes since the run began, whether the update was made or not.
        without_update: steps in a row without an update, up to now.
        rollbacks: in a row to one checkpoint, or to an older one than before: without a newer one saved since.
        back_at: step of the checkpoint that the last of them went to; -1 before any.
    """

    def __init__(
        self, config: RunConfig, model: list[Any], optimizer: Any, scheduler: Any, stepper: Stepper, injector: Injector
    ) -> None:
        self.options, self.model, self.optimizer, self.scheduler = config.faults, model, optimizer, scheduler
        self.stepper, self.injector = stepper, injector
        self.fp8_state = FP8Snapshot(map(unwrap, model))
        self.judge = SpikeJudge(config.faults.spike_window, config.faults.spike_threshold)
        self.skipped = self.spikes = self.without_update = self.rollbacks = 0
        self.back_at = -1

    def step(
        self,
        batches: Iterator[PackedBatch],
        number: int,
        stop: Callable[[], list[float]] = no_stop_votes,
        unwritten: Callable[[], bool] = bool,
    ) -> Outcome:
        """Step ``number`` of the run, the first is 1. A collective over all ranks; the result is the same on each.

        Args:
            batches: micro-batches of this rank.
            stop, unwritten: what ``agree`` takes along; asked as late as can be, so that a signal that comes while
                the step is computed counts for this step.
        """
        source = Replay(batches) if self.options.rerun_bad_steps else batches
        self.fp8_state.take()
        total, norm, finite = self._compute(source, number, first=True)
        numbers = agree(total, norm, finite, stop(), unwritten())
        if not numbers.finite and isinstance(source, Replay):
            numbers = self._compute_again(source, number, numbers, total)
        verdict, why = "good", ""
        if not numbers.finite:
            verdict = "bad"
            why = f"loss {numbers.loss:.4g}, gradient norm {numbers.grad_norm:.4g}"
        elif why := self.judge.spike(numbers.loss, numbers.grad_norm):
            verdict = "spike"
        updated = verdict == "good" or (verdict == "spike" and self.options.on_spike == "warn")
        if updated:
            with self.stepper.breakdown.part("optimizer"):
                self._update(numbers.grad_norm)
            self.judge.add(numbers.loss, numbers.grad_norm)
        else:
            self.fp8_state.restore()  # in a history an infinite value would hold the scale for as long as it is there
        self.spikes += verdict == "spike"
        self.skipped += not updated
        self.without_update = 0 if updated else self.without_update + 1
        if why:
            done = "the update is made" if updated else f"no update ({self.without_update} in a row)"
            warn(f"step {number}: {verdict}: {why}; {done}")
        back = f"a spike in step {number}" if verdict == "spike" and self.options.on_spike == "rollback" else ""
        if self.without_update >= self.options.max_bad_steps:
            back = f"{self.without_update} steps in a row without an update (faults.max_bad_steps)"
        return Outcome(**vars(numbers), verdict=verdict, updated=updated, roll_back=back)

    def _compute(self, batches: Iterator[PackedBatch], number: int, first: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(this rank's loss sum and count, norm of the whole model's gradient, whether this rank's are all finite)."""
        # This also forgets what DDP's buckets have reduced, so that a second pass reduces again.
        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.stepper.spoil = self.injector.fires("nan-loss", number) or (
            first and self.injector.fires("transient-nan", number)
        )
        total = self.stepper.run(batches, forward_only=False)
        with self.stepper.breakdown.part("optimizer"):
            self.optimizer.prepare_grads()  # its answer is for scaled losses
            self._spoil_gradients(number)
            finite, gradients = total.isfinite().all(), self._gradients()
            if gradients:
                finite &= all_finite(gradients)
            return total, global_norm(self.optimizer), finite

    def _spoil_gradients(self, number: int) -> None:
        for kind, factor in (("nan-grad", math.nan), ("inf-grad", math.inf), ("spike", 1e4)):
            if self.injector.fires(kind, number):
                for gradient in self._gradients():
                    gradient.mul_(factor)

    def _parts(self) -> list[Any]:
        """The optimizers within a chained one that hold parameters here."""
        parts = getattr(self.optimizer, "chained_optimizers", [self.optimizer])
        return [part for part in parts if not part.is_stub_optimizer]

    def _gradients(self) -> list[Tensor]:
        """This rank's part of the summed gradients, as the optimizer takes it, copies of other ranks' included."""
        parameters = [parameter for part in self._parts() for parameter in part.get_parameters()]
        return [to_local_if_dtensor(p.grad) for p in parameters if p.grad is not None and p.grad.numel()]

    def _own_numbers(self, total: Tensor) -> tuple[float, float]:
        """(sum of losses, norm of the gradients) of this rank alone."""
        squares = [gradient.double().square().sum() for gradient in self._gradients()]
        return total.tolist()[0], math.sqrt(float(torch.stack(squares).sum())) if squares else 0.0

    def _compute_again(self, batches: Replay, number: int, before: Numbers, total: Tensor) -> Numbers:
        """The same step from the same micro-batches and weights, and who computed otherwise than before.

        Gradients are summed over ranks, so a wrong one shows on all that hold a part of the sum. A loss shows on the
        ranks of one data-parallel replica alone; so where losses differ, these ranks are named, and only where none
        does, those whose gradients differ.
        """
        mine = self._own_numbers(total)
        counts = self.stepper.counts.clone()
        batches.rewind()
        self.fp8_state.restore()
        total, norm, finite = self._compute(batches, number, first=False)
        self.stepper.counts = counts  # the micro-batches were counted the first time
        again = self._own_numbers(total)
        numbers = agree(total, norm, finite, no_stop_votes(), False)
        changed = [not _same(a, b) for a, b in zip(mine, again, strict=True)]
        where = f"rank {torch.distributed.get_rank()} on {socket.gethostname()} (process {os.getpid()})"
        reports: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(reports, (where, changed, mine, again))
        for kind, name in enumerate(("loss", "gradient norm")):
            named = [(rank, old[kind], new[kind]) for rank, differs, old, new in reports if differs[kind]]
            if named:
                warn(
                    f"step {number}: TRANSIENT FAULT: the same micro-batches with the same weights gave another "
                    f"{name} the second time; a device computes wrong; test or replace it: "
                    + "; ".join(f"{rank}: {old:.6g}, then {new:.6g}" for rank, old, new in named)
                )
                break
        else:
            warn(f"step {number}: the second pass gave the same numbers: a fault of data or model, not of a device")
        if numbers.finite:
            warn(f"step {number}: the second pass is finite and is used")
        return replace(numbers, stop=before.stop, unwritten=before.unwritten)

    def _update(self, grad_norm: float) -> None:
        """Clip and change the weights as ``ChainedOptimizer.step`` does, and go on in the schedule."""
        for part in self._parts():
            parameters = part.get_parameters()
            if parameters and part.config.clip_grad > 0:
                clip_grad_by_total_norm_fp32(parameters, max_norm=part.config.clip_grad, total_norm=grad_norm)
        self.optimizer.step_with_ready_grads()
        self.scheduler.step(increment=1)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on with: plain numbers and lists."""
        return {**self.judge.state_dict(), **{name: getattr(self, name) for name in _COUNTS}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``; that of an older version lacks rollbacks."""
        self.judge.load_state_dict(state)
        for name in _COUNTS:
            setattr(self, name, state.get(name, getattr(self, name)))

    def went_back(self, step: int, before: dict[str, Any]) -> None:
        """Count a rollback to the checkpoint of ``step``, whose state has been loaded.

        Args:
            before: ``state_dict`` before that; what was counted stays counted.
        """
        self.skipped, self.spikes, self.without_update = before["skipped"], before["spikes"], 0
        self.rollbacks = before["rollbacks"] + 1 if step <= before["back_at"] else 1
        self.back_at = step


def _same(first: float, second: float) -> bool:
    """Whether two results of one computation are the same but for rounding; NaN and Inf are alike."""
    if not (math.isfinite(first) and math.isfinite(second)):
        return math.isfinite(first) == math.isfinite(second)
    return math.isclose(first, second, rel_tol=_SAME_RESULT)
