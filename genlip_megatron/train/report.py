"""What a run prints and writes of its steps."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import psutil
import torch
from megatron.core import parallel_state

from genlip_megatron.model.flops import COUNTS, HOPPER_TFLOPS, training_flops
from genlip_megatron.train.breakdown import PARTS, describe, over_ranks
from genlip_megatron.train.guard import Outcome
from genlip_megatron.train.metrics import Progress

if TYPE_CHECKING:
    from genlip_megatron.train.loop import Run

# Names are given, since ranks must agree on them and stages have timers of their own.
_TIMERS = [
    "forward-backward",
    "all-grads-sync",
    "optimizer",
    "optimizer-clip-main-grad",
    "optimizer-inner-step",
]


def log(text: str) -> None:
    """Print on rank 0."""
    if torch.distributed.get_rank() == 0:
        print(text, flush=True)


@dataclass
class Tally:
    """What the steps since the last report add up to; the same on all ranks."""

    steps: int = 0
    loss_sum: float = 0.0
    loss_count: float = 0.0
    grad_norm: float = math.nan  # of the last step
    begin: float = field(default_factory=time.monotonic)

    def add(self, outcome: Outcome) -> None:
        """Count a step. A loss that is not finite would hide those of the other steps, and is left out."""
        self.steps += 1
        self.grad_norm = outcome.grad_norm
        if outcome.finite:
            self.loss_sum += outcome.loss_sum
            self.loss_count += outcome.loss_count


def report(run: Run, tally: Tally) -> None:
    """The progress line of the last steps. A collective over all ranks.

    Raises:
        DataFailure: too many of their samples were bad; on all ranks.
    """
    seconds, steps = max(time.monotonic() - tally.begin, 1e-9), tally.steps
    device = run.stepper.device
    counts = run.stepper.counts.to(device, copy=True)
    torch.distributed.all_reduce(counts, group=parallel_state.get_data_parallel_group())
    counts = counts.cpu()
    run.stepper.counts.zero_()
    quarantined, truncated, waited = _loader_totals(run, device)
    by_name = dict(zip(COUNTS, counts.tolist(), strict=True))
    run.consumed_samples += int(by_name["samples"])
    run.consumed_tokens += int(by_name["tokens"])
    flops = training_flops(counts, run.config.model) / seconds / torch.distributed.get_world_size() / 1e12
    memory = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else _resident_gib()
    progress = Progress(
        iteration=run.iteration,
        train_iters=run.config.train.train_iters,
        loss=tally.loss_sum / tally.loss_count if tally.loss_count else math.nan,
        learning_rate=run.optimizer.param_groups[0]["lr"] if run.optimizer.param_groups else 0.0,
        grad_norm=tally.grad_norm,
        seconds=seconds / steps,
        consumed_samples=run.consumed_samples,
        consumed_tokens=run.consumed_tokens,
        tokens_per_second=by_name["tokens"] / seconds,
        tflops=flops,
        mfu=flops / HOPPER_TFLOPS if torch.cuda.is_available() else None,
        pack_fill=by_name["tokens"] / by_name["slots"],
        memory_gib=memory,
        data_wait=waited / steps,
        quarantined=quarantined,
        truncated=truncated,
        skipped=run.guard.skipped,
        spikes=run.guard.spikes,
    )
    parts, longest = over_ranks(run.stepper.breakdown.take(), device)
    log(progress.line())
    log(describe(parts, longest))
    if run.config.log.timing_log_level:
        log(run.timers.get_all_timers_string(_TIMERS, normalizer=steps))
    if run.writer is not None:
        by_part = {f"step-parts/{part.replace(' ', '-')}": seconds for part, seconds in zip(PARTS, parts, strict=True)}
        run.writer.scalars({**progress.scalars(), **by_part}, run.iteration)
    # What a rollback goes back to was counted before it.
    run.quarantined, found = quarantined, quarantined - run.quarantined
    run.bad_share.add(int(by_name["samples"]), found)


def _loader_totals(run: Run, device: torch.device) -> tuple[int, int, float]:
    """(bad samples in the whole run, captions cut since it was resumed; longest wait since the last report, seconds).

    Of all ranks.
    """
    assert run.train_loader is not None
    before, mine = run.train_loader.quarantined
    found = torch.tensor([float(mine), float(run.train_loader.truncated)], device=device)
    waited = torch.tensor([run.train_loader.waited], device=device)
    run.train_loader.waited = 0.0
    torch.distributed.all_reduce(found, group=parallel_state.get_data_parallel_group())
    torch.distributed.all_reduce(waited, op=torch.distributed.ReduceOp.MAX)
    return before + int(found[0].item()), int(found[1].item()), float(waited.item())


def _resident_gib() -> float:
    return psutil.Process().memory_info().rss / 2**30
