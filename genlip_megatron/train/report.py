"""The report of the last steps: to the log and the writers."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import psutil
import torch
from megatron.core import parallel_state

from genlip_megatron.config import RunConfig, source_epochs
from genlip_megatron.data.loader import Loader
from genlip_megatron.device import current_device
from genlip_megatron.log import log
from genlip_megatron.model.flops import COUNTS, HOPPER_TFLOPS, training_flops
from genlip_megatron.train.breakdown import PARTS, describe, over_ranks
from genlip_megatron.train.state import Run
from genlip_megatron.train.statistics import Statistics

# Listed here because ranks must agree on the names, and each pipeline stage has other timers.
_TIMERS = ["forward-backward", "all-grads-sync", "optimizer", "optimizer-clip-main-grad", "optimizer-inner-step"]


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
    elapsed, device = max(time.monotonic() - tally.begin, 1e-9), current_device()
    counts = run.counts.to(device, copy=True)
    torch.distributed.all_reduce(counts, group=parallel_state.get_data_parallel_group())
    counts = counts.cpu()
    run.counts.zero_()
    quarantined, truncated, waited = _loader_totals(run, device)
    by_name = dict(zip(COUNTS, counts.tolist(), strict=True))
    run.consumed_samples += int(by_name["samples"])
    run.consumed_tokens += int(by_name["tokens"])
    seconds = elapsed / tally.steps
    tflops = training_flops(counts, run.config.model) / elapsed / torch.distributed.get_world_size() / 1e12
    values = {  # by Megatron's TensorBoard tags
        "lm loss": tally.loss_sum / tally.loss_count if tally.loss_count else math.nan,
        "learning-rate": run.optimizer.param_groups[0]["lr"] if run.optimizer.param_groups else 0.0,
        "grad-norm": tally.grad_norm,
        "iteration-time": seconds,
        "throughput": tflops,  # per rank
        "tokens-per-second": by_name["tokens"] / elapsed,
        "pack-fill": by_name["tokens"] / by_name["slots"],
        "consumed-samples": float(run.consumed_samples),
        "consumed-tokens": float(run.consumed_tokens),
        "epoch": run.consumed_samples / epoch_samples(run.config, run.train_loader),
        "mem-allocated-gib": _memory() / 2**30,
        "data-wait": waited / tally.steps,
        "quarantined-samples": float(quarantined),
        "truncated-captions": float(truncated),
        "skipped-steps": float(run.verdicts.skipped),
        "spikes": float(run.verdicts.spikes),
    }
    if torch.cuda.is_available():
        values["mfu"] = tflops / HOPPER_TFLOPS
    parts, longest = over_ranks(run.breakdown.take(), device)
    log(progress_line(run.iteration, run.config.train.train_iters, values))
    log(describe(parts, longest))
    if (counted := counters(values)) != run.counted or run.iteration == run.config.train.train_iters:
        log(totals_line(values))
        run.counted = counted
    if run.config.log.timing_log_level:
        log(run.timers.get_all_timers_string(_TIMERS, normalizer=tally.steps))
    if run.writer is not None:
        by_part = {f"step-parts/{part.replace(' ', '-')}": mean for part, mean in zip(PARTS, parts, strict=True)}
        run.writer.scalars({**values, **by_part}, run.iteration)
    run.quarantined, found = quarantined, quarantined - run.quarantined
    run.bad_share.add(int(by_name["samples"]), found)


def epoch_samples(config: RunConfig, loader: Loader | None) -> float:
    """Samples of one epoch of the training data; with ``data.train_epochs`` of the mixture."""
    assert loader is not None
    sizes = [len(dataset) for dataset in loader.datasets]
    repeats = source_epochs(config.data) or [1.0] * len(sizes)
    return sum(size * times for size, times in zip(sizes, repeats, strict=True))


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


def _memory() -> int:
    """Most bytes that were allocated on the GPU; without a GPU, this process's resident memory."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss


def progress_line(iteration: int, train_iters: int, values: dict[str, float]) -> str:
    """What a person reads every minute, in less than 120 columns.

    >>> values = {"epoch": 1.32, "lm loss": 0.6434, "learning-rate": 1.99e-3, "grad-norm": 0.302}
    >>> line = progress_line(60, 480, values | {"iteration-time": 2.9282, "tokens-per-second": 2798.4})
    >>> line.split(" | lr ")[0]
    'iteration 60/480 | epoch 1.32 | lm loss 0.6434'
    >>> line.split(" | lr ")[1]
    '1.99e-03 | grad norm 0.302 | 2928 ms | tokens/s 2798 | left 0:20:29'
    """
    step = values["iteration-time"]
    left = int((train_iters - iteration) * step)
    hours, minutes, seconds = left // 3600, left % 3600 // 60, left % 60
    speed = f"MFU {100 * values['mfu']:.1f}%" if "mfu" in values else f"tokens/s {values['tokens-per-second']:.0f}"
    return (
        f"iteration {iteration}/{train_iters} | epoch {values['epoch']:.2f} | lm loss {values['lm loss']:.4f} | "
        f"lr {values['learning-rate']:.2e} | grad norm {values['grad-norm']:.3f} | "
        + (f"{1000 * step:.0f} ms" if step < 10 else f"{step:.1f} s")
        + f" | {speed} | "
        + (f"left {hours}:{minutes:02d}:{seconds:02d}" if hours < 10 else f"left {hours} h")
    )


def bar(iteration: int, train_iters: int, tally: Tally) -> str:
    """The steps done, for the last line of a terminal.

    >>> bar(120, 480, Tally(steps=2, loss_sum=6, loss_count=4, begin=time.monotonic() - 5))
    'iteration 120/480 [#######.....................] 25% | lm loss 1.5000 | 2.5 s a step'
    """
    done = 28 * iteration // train_iters
    loss = tally.loss_sum / tally.loss_count if tally.loss_count else math.nan
    return (
        f"iteration {iteration}/{train_iters} [{'#' * done}{'.' * (28 - done)}] {100 * iteration // train_iters}% | "
        f"lm loss {loss:.4f} | {(time.monotonic() - tally.begin) / tally.steps:.2g} s a step"
    )


def counters(values: dict[str, float]) -> dict[str, int]:
    """Counters of what went wrong so far, without those that are 0."""
    names = {
        "quarantined": "quarantined-samples",
        "truncated": "truncated-captions",
        "skipped": "skipped-steps",
        "spikes": "spikes",
    }
    return {name: int(values[tag]) for name, tag in names.items() if values[tag]}


def totals_line(values: dict[str, float]) -> str:
    """Totals of the run, logged in the first and last report of a launch and when a counter changes."""
    return (
        f"samples {values['consumed-samples']:.0f} | tokens {values['consumed-tokens']:.0f} | "
        f"pack fill {100 * values['pack-fill']:.1f}% | memory {values['mem-allocated-gib']:.1f} GiB"
        + "".join(f" | {name} {count}" for name, count in counters(values).items())
    )
