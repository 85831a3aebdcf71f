"""The report of the last steps: to the log and the writers."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import psutil
import torch
from megatron.core import parallel_state

from genlip_megatron.device import current_device
from genlip_megatron.log import log
from genlip_megatron.train.breakdown import PARTS, describe, over_ranks
from genlip_megatron.train.metrics import COUNTS, HOPPER_TFLOPS, training_flops
from genlip_megatron.train.state import Run
from genlip_megatron.train.statistics import Statistics

# Listed here because ranks must agree on the names, and each pipeline stage has other timers.
_TIMERS = [
    "forward-backward",
    "all-grads-sync",
    "optimizer",
    "optimizer-clip-main-grad",
    "optimizer-inner-step",
]


@dataclass
class Progress:
    """One log interval, for the progress line and the writers."""

    iteration: int
    train_iters: int
    loss: float
    learning_rate: float
    grad_norm: float
    seconds: float  # of one step
    consumed_samples: int
    consumed_tokens: int
    tokens_per_second: float
    tflops: float  # per rank
    mfu: float | None
    pack_fill: float
    memory_gib: float
    data_wait: float  # seconds of a step, on the rank that waited longest
    quarantined: int  # bad samples so far
    truncated: int  # captions cut because their image leaves too little of the pack
    skipped: int  # steps without an update
    spikes: int

    def line(self) -> str:
        """The progress line."""
        left = int((self.train_iters - self.iteration) * self.seconds)
        mfu = "-" if self.mfu is None else f"{100 * self.mfu:.1f}%"
        return (
            f"iteration {self.iteration:>7}/{self.train_iters} | samples {self.consumed_samples} | "
            f"tokens {self.consumed_tokens} | lm loss {self.loss:.4f} | learning rate {self.learning_rate:.3e} | "
            f"grad norm {self.grad_norm:.3f} | step {1000 * self.seconds:.0f} ms | "
            f"tokens/s {self.tokens_per_second:.0f} | TFLOP/s {self.tflops:.3f} | MFU {mfu} | "
            f"pack fill {100 * self.pack_fill:.1f}% | data wait {1000 * self.data_wait:.0f} ms | "
            f"quarantined {self.quarantined} | truncated {self.truncated} | "
            f"skipped {self.skipped} | spikes {self.spikes} | memory {self.memory_gib:.1f} GiB | "
            f"left {left // 3600}:{left % 3600 // 60:02d}:{left % 60:02d}"
        )

    def scalars(self) -> dict[str, float]:
        """Values under Megatron's TensorBoard tag names."""
        values = {
            "lm loss": self.loss,
            "learning-rate": self.learning_rate,
            "grad-norm": self.grad_norm,
            "iteration-time": self.seconds,
            "throughput": self.tflops,
            "tokens-per-second": self.tokens_per_second,
            "pack-fill": self.pack_fill,
            "consumed-samples": float(self.consumed_samples),
            "mem-allocated-gib": self.memory_gib,
            "data-wait": self.data_wait,
            "quarantined-samples": float(self.quarantined),
            "truncated-captions": float(self.truncated),
            "skipped-steps": float(self.skipped),
            "spikes": float(self.spikes),
        }
        return values if self.mfu is None else {**values, "mfu": self.mfu}


@dataclass
class Tally:
    """Totals of the steps since the last report; the same on all ranks."""

    steps: int = 0
    loss_sum: float = 0.0
    loss_count: float = 0.0
    grad_norm: float = math.nan  # of the last step
    begin: float = field(default_factory=time.monotonic)

    def add(self, step: Statistics) -> None:
        """Count a step; a loss that is not finite is left out, because it would hide the others."""
        self.steps += 1
        self.grad_norm = step.grad_norm
        if step.finite:
            self.loss_sum += step.loss_sum
            self.loss_count += step.loss_count


def report(run: Run, tally: Tally) -> None:
    """Log and write the totals of the last steps. A collective over all ranks.

    Raises:
        DataFailure: too many of their samples were bad. Raised on all ranks.
    """
    seconds, steps = max(time.monotonic() - tally.begin, 1e-9), tally.steps
    device = current_device()
    counts = run.counts.to(device, copy=True)
    torch.distributed.all_reduce(counts, group=parallel_state.get_data_parallel_group())
    counts = counts.cpu()
    run.counts.zero_()
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
        skipped=run.verdicts.skipped,
        spikes=run.verdicts.spikes,
    )
    parts, longest = over_ranks(run.breakdown.take(), device)
    log(progress.line())
    log(describe(parts, longest))
    if run.config.log.timing_log_level:
        log(run.timers.get_all_timers_string(_TIMERS, normalizer=steps))
    if run.writer is not None:
        by_part = {f"step-parts/{part.replace(' ', '-')}": seconds for part, seconds in zip(PARTS, parts, strict=True)}
        run.writer.scalars({**progress.scalars(), **by_part}, run.iteration)
    run.quarantined, found = quarantined, quarantined - run.quarantined
    run.bad_share.add(int(by_name["samples"]), found)


def _loader_totals(run: Run, device: torch.device) -> tuple[int, int, float]:
    """(bad samples of the run, captions cut since it was resumed, longest wait in seconds since the last report).

    Over all ranks.
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
