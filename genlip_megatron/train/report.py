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
    log(_progress_line(run, values))
    log(describe(parts, longest))
    if run.config.log.timing_log_level:
        log(run.timers.get_all_timers_string(_TIMERS, normalizer=tally.steps))
    if run.writer is not None:
        by_part = {f"step-parts/{part.replace(' ', '-')}": mean for part, mean in zip(PARTS, parts, strict=True)}
        run.writer.scalars({**values, **by_part}, run.iteration)
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


def _memory() -> int:
    """Most bytes that were allocated on the GPU; without a GPU, this process's resident memory."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss


def _progress_line(run: Run, values: dict[str, float]) -> str:
    train_iters = run.config.train.train_iters
    left = int((train_iters - run.iteration) * values["iteration-time"])
    mfu = f"{100 * values['mfu']:.1f}%" if "mfu" in values else "-"
    return (
        f"iteration {run.iteration:>7}/{train_iters} | samples {run.consumed_samples} | "
        f"tokens {run.consumed_tokens} | lm loss {values['lm loss']:.4f} | "
        f"learning rate {values['learning-rate']:.3e} | grad norm {values['grad-norm']:.3f} | "
        f"step {1000 * values['iteration-time']:.0f} ms | tokens/s {values['tokens-per-second']:.0f} | "
        f"TFLOP/s {values['throughput']:.3f} | MFU {mfu} | pack fill {100 * values['pack-fill']:.1f}% | "
        f"data wait {1000 * values['data-wait']:.0f} ms | quarantined {values['quarantined-samples']:.0f} | "
        f"truncated {values['truncated-captions']:.0f} | skipped {values['skipped-steps']:.0f} | "
        f"spikes {values['spikes']:.0f} | memory {values['mem-allocated-gib']:.1f} GiB | "
        f"left {left // 3600}:{left % 3600 // 60:02d}:{left % 60:02d}"
    )
