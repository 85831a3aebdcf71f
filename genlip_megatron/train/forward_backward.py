"""Forward and backward passes over the micro-batches of a step, by Megatron-Core's pipeline schedules."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
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
from genlip_megatron.device import current_device
from genlip_megatron.model.attention import PackedAttention
from genlip_megatron.model.flops import count_batch
from genlip_megatron.model.genlip import unwrap
from genlip_megatron.train.state import Run


def loss_sum(batch: PackedBatch, total: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(sum of the losses of this rank's answer rows, their count, report) of a micro-batch.

    Megatron-Core adds sums and counts over the global batch and divides gradients once, so every answer token has the
    same weight. Context-parallel ranks split the rows; only the first of these ranks reports the count.
    """
    count = (batch.loss_weights > 0).sum()
    if parallel_state.get_context_parallel_rank():
        count = torch.zeros_like(count)
    return total, count.to(torch.int), {"loss": torch.stack((total.detach().double(), count.double()))}


def finalize_gradients(model: list[Any], num_tokens: Tensor | None = None, **options: Any) -> None:
    """Megatron-Core's ``finalize_model_grads`` without its wait for the device, a check for any tokens.

    Args:
        num_tokens: int32 scalar, answer tokens of this rank's micro-batches; 0 before the last pipeline stage.
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
    """One iterator over ``items`` for each chunk of an interleaved stage; all chunks get the same micro-batches.

    An item is released once the last chunk has taken it; ``itertools.tee`` releases items only in blocks of 57.

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


def prepare(run: Run, batch: PackedBatch, counted: bool) -> tuple[PackedBatch, PackedAttention]:
    """The micro-batch on the device, and the ``PackedAttention`` that all model chunks of this rank share."""
    if counted:
        run.counts += count_batch(batch)
    graphed = run.graphed_stage is not None
    batch = batch.with_fixed_shapes() if graphed else batch
    packed = unwrap(run.model[0]).prepare(batch, fixed_shapes=graphed)
    return batch.to(current_device()), packed


def _prepared(
    run: Run, batches: Iterator[PackedBatch], number: int, counted: bool
) -> Iterator[tuple[PackedBatch, PackedAttention]]:
    """The next ``number`` micro-batches, prepared."""
    for _ in range(number):
        with run.breakdown.part("data wait"):
            batch = next(batches, None)
        if batch is None:
            return
        with run.breakdown.part("to device"):
            prepared = prepare(run, batch, counted)
        del batch  # frees it while the model works
        yield prepared
        del prepared


def forward_backward(
    run: Run, batches: Iterator[PackedBatch], forward_only: bool = False, counted: bool = False, spoil: bool = False
) -> Tensor:
    """Run one global batch through the pipeline; gradients add up in the buffers and are reduced over ranks.

    Args:
        batches: this rank's micro-batches.
        counted: add what the micro-batches hold to ``run.counts``.
        spoil: for drills, this rank's part of the model gives NaN.

    Returns:
        float64 [2], on the device: this rank's (sum of losses, answer tokens); zeros before the last pipeline stage.
    """

    def forward(prepared: Iterator[tuple[PackedBatch, PackedAttention]], stage: Any) -> tuple[Tensor, Any]:
        batch, packed = next(prepared)
        output = (run.graphed_stage or stage)(batch, packed)
        return output * math.nan if spoil else output, partial(loss_sum, batch)

    number = get_num_microbatches()
    reports = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=for_each_chunk(_prepared(run, batches, number, counted), len(run.model)),
        model=run.model,
        num_microbatches=number,
        seq_length=run.config.data.seq_length * run.config.train.micro_batch_size,
        micro_batch_size=1,
        forward_only=forward_only,
    )
    if forward_only and run.config.parallel.offload_modules:
        # Megatron-Core resets it after training steps only.
        offloading.FineGrainedActivationOffloadingInterface.reset()
    loss = torch.zeros(2, dtype=torch.float64, device=current_device())
    for report in reports:
        loss += report["loss"]
    return loss
