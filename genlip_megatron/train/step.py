"""One training step and one validation pass on Megatron-Core's schedules."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.pipeline_parallel import fine_grained_activation_offload as offloading
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from genlip_megatron.batch import PackedBatch
from genlip_megatron.config import RunConfig
from genlip_megatron.device import current_device
from genlip_megatron.faults.exits import UserError
from genlip_megatron.model.attention import PackedAttention
from genlip_megatron.model.flops import COUNTS, count_batch
from genlip_megatron.model.genlip import unwrap
from genlip_megatron.train.breakdown import Breakdown
from genlip_megatron.train.graphs import GraphedStage


def loss_sum(batch: PackedBatch, total: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(sum of this rank's answer rows' losses, their count, report) of a micro-batch, from the sum.

    Megatron-Core adds sums and counts over the global batch and divides gradients once, so that every answer token
    weighs the same wherever it is. Of context-parallel ranks, which share the rows out, the first counts them.
    """
    count = (batch.loss_weights > 0).sum()
    if parallel_state.get_context_parallel_rank():
        count = torch.zeros_like(count)
    return total, count.to(torch.int), {"loss": torch.stack((total.detach().double(), count.double()))}


def finalize_gradients(model: list[Any], num_tokens: Tensor | None = None, **options: Any) -> None:
    """Megatron-Core's ``finalize_model_grads``, which would ask the device whether there are tokens at all, and wait.

    Args:
        num_tokens: int32 scalar, answer tokens of this rank's micro-batches; 0 but on the last pipeline stage.
    """
    finalize_model_grads(model, None, **options)
    if num_tokens is None:
        return
    torch.distributed.broadcast(
        num_tokens,
        src=parallel_state.get_pipeline_model_parallel_last_rank(),
        group=parallel_state.get_pipeline_model_parallel_group(),
    )
    torch.distributed.all_reduce(num_tokens, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    for chunk in model:
        chunk.scale_gradients(1.0 / num_tokens.clamp(min=1))


def for_each_chunk(items: Iterator[Any], chunks: int) -> list[Iterator[Any]]:
    """One iterator over ``items`` for every chunk of an interleaved stage, which all go through the same micro-batches.

    An item is held until the last chunk has taken it, and no longer (``itertools.tee`` holds blocks of 57).

    >>> first, second = for_each_chunk(iter("ab"), 2)
    >>> next(first), next(first), next(second), list(first), list(second)
    ('a', 'b', 'a', [], ['b'])
    """
    waiting: list[deque[Any]] = [deque() for _ in range(chunks)]

    def take(mine: deque[Any]) -> Iterator[Any]:
        while True:
            if not mine:
                try:
                    item = next(items)
                except StopIteration:
                    return
                for queue in waiting:
                    queue.append(item)
                del item
            yield mine.popleft()

    return [take(mine) for mine in waiting]


class Stepper:
    """Runs micro-batches through the pipeline and keeps count of what they held.

    Attributes:
        counts: float64 [len(COUNTS)], since they were last set to 0.
        breakdown: is told what a step does.
        spoil: for drills, this rank's part of the model gives NaN.
    """

    def __init__(self, config: RunConfig, model: list[Any], breakdown: Breakdown) -> None:
        self.config, self.model, self.breakdown = config, model, breakdown
        self.device = current_device()
        self.counts = torch.zeros(len(COUNTS), dtype=torch.float64)
        self.spoil = False
        self._graphed = GraphedStage(model[0]) if config.train.cuda_graph else None

    def _prepare(self, batch: PackedBatch) -> tuple[PackedBatch, PackedAttention]:
        """The micro-batch on the device and the plan of its attention, for all model chunks of this rank."""
        self.counts += count_batch(batch)
        batch = batch.with_fixed_shapes() if self._graphed else batch
        plan = unwrap(self.model[0]).prepare(batch, fixed_shapes=self._graphed is not None)
        return batch.to(self.device), plan

    def _next(self, batches: Iterator[PackedBatch], count: int) -> Iterator[tuple[PackedBatch, PackedAttention]]:
        """The next ``count`` micro-batches, prepared."""
        for _ in range(count):
            with self.breakdown.part("data wait"):
                batch = next(batches, None)
            if batch is None:
                return
            with self.breakdown.part("to device"):
                prepared = self._prepare(batch)
            del batch  # not held while the model is at work
            yield prepared
            del prepared

    def _forward(self, iterator: Iterator[tuple[PackedBatch, PackedAttention]], stage: Any) -> tuple[Tensor, Any]:
        batch, plan = next(iterator)
        output = (self._graphed or stage)(batch, plan)
        return output * math.nan if self.spoil else output, partial(loss_sum, batch)

    def run(self, batches: Iterator[PackedBatch], forward_only: bool) -> Tensor:
        """float64 [2]: this rank's (sum of losses, answer tokens) of one global batch; zeros before the last stage."""
        count = get_num_microbatches()
        prepared = self._next(batches, count)
        reports = get_forward_backward_func()(
            forward_step_func=self._forward,
            data_iterator=for_each_chunk(prepared, len(self.model)),
            model=self.model,
            num_microbatches=count,
            seq_length=self.config.data.seq_length * self.config.train.micro_batch_size,
            micro_batch_size=1,
            forward_only=forward_only,
        )
        if forward_only and self.config.parallel.offload_modules:
            # Megatron-Core resets it after training steps alone.
            offloading.FineGrainedActivationOffloadingInterface.reset()
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        for report in reports:
            total += report["loss"]
        return total


def sum_over_run(values: Tensor) -> Tensor:
    """``values`` summed over data-parallel ranks and shared from the last pipeline stage with every rank."""
    torch.distributed.all_reduce(values, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    torch.distributed.all_reduce(values, group=parallel_state.get_pipeline_model_parallel_group())
    return values


def evaluate(stepper: Stepper, loader: Any, done: Callable[[], None] = lambda: None) -> float:
    """Mean loss of an answer token over the validation split's batches; ``done`` is called after each global batch.

    Raises:
        UserError: they hold no answer token.
    """
    for chunk in stepper.model:
        chunk.eval()
    counts = stepper.counts.clone()
    batches = iter(loader)
    total = torch.zeros(2, dtype=torch.float64, device=stepper.device)
    with torch.no_grad():
        for _ in range(stepper.config.log.eval_iters):
            total += stepper.run(batches, forward_only=True)
            done()
    for chunk in stepper.model:
        chunk.train()
    stepper.counts = counts
    total, count = sum_over_run(total).tolist()
    if not count:
        raise UserError("data.valid_data holds no answer token: name other validation shards")
    return total / count
