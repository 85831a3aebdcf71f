"""A training run: set up, loop, validate, save."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.timers import Timers

from genlip_megatron import host
from genlip_megatron.checkpoint.saving import Saver, check_free_space
from genlip_megatron.config import RunConfig
from genlip_megatron.data.loader import Loader
from genlip_megatron.data.share import Share
from genlip_megatron.estimate import check_fits
from genlip_megatron.faults.exits import EXIT_PREEMPTED
from genlip_megatron.faults.stop import StopRequest
from genlip_megatron.model.genlip import build_model
from genlip_megatron.model.pipeline import describe_split
from genlip_megatron.model.specs import check_machine, transformer_config
from genlip_megatron.parallel import groups
from genlip_megatron.parallel.fsdp import FullyShardedDataParallel
from genlip_megatron.train.metrics import COUNTS, HOPPER_TFLOPS, Progress, Writer, training_flops
from genlip_megatron.train.optimizer import build_optimizer, build_scheduler
from genlip_megatron.train.resume import finish_saves, load, log, make_saver, save
from genlip_megatron.train.samples import write_caption_samples
from genlip_megatron.train.step import Stepper, evaluate, sum_over_run

_BUCKET_PARAMETERS = 40_000_000
# Names are given, since ranks must agree on them and stages have timers of their own.
_TIMERS = [
    "forward-backward",
    "all-grads-sync",
    "optimizer",
    "optimizer-clip-main-grad",
    "optimizer-inner-step",
]


@dataclass
class Run:
    """Everything a loop works on."""

    config: RunConfig
    model: list[Any]
    optimizer: Any
    scheduler: Any
    stepper: Stepper
    timers: Timers
    train_loader: Loader | None = None
    valid_loader: Loader | None = None
    writer: Writer | None = None
    iteration: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    validated: tuple[int, float] = (-1, 0.0)  # step and loss of the last validation
    saver: Saver | None = None


def set_up(config: RunConfig) -> Run:
    """Join the processes, open the data, build the run, and load what is to be loaded."""
    groups.initialize(config)
    log(check_machine(config))
    if config.train.check_memory and not config.log.eval_only:
        check_fits(config, torch.distributed.get_world_size(), memory_of_a_rank())
    # Data comes first: its mistakes are cheap to find.
    data_parallel = (parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size())
    train_loader = None if config.log.eval_only else Loader(config, "train", *data_parallel, data_share(config))
    valid_loader = Loader(config, "valid", *data_parallel, data_share(config)) if config.data.valid_data else None
    if config.log.eval_only and valid_loader is None:
        raise ValueError("log.eval_only needs data.valid_data: name the validation shards with --valid-data")
    run = build_run(config)
    run.train_loader, run.valid_loader = train_loader, valid_loader
    run.saver = make_saver(run)
    load(run)
    save = config.checkpoint.save
    folder = config.log.tensorboard_dir or (f"{save}/tensorboard" if save and not config.log.eval_only else "")
    run.writer = Writer(config.log, folder, torch.distributed.get_rank() == 0, config.to_dict())
    return run


def memory_of_a_rank() -> float:
    """Bytes that a rank may use: its GPU's, or its share of the machine's. The smallest of all ranks, since they must
    agree; a collective."""
    if torch.cuda.is_available():
        memory = float(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    else:
        limit = Path("/sys/fs/cgroup/memory.max")  # of the container
        text = limit.read_text().strip() if limit.is_file() else "max"
        whole = float(psutil.virtual_memory().total)
        memory = min(whole, float(text) if text.isdigit() else whole) / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    smallest = torch.tensor([memory], dtype=torch.float64, device=host.device())
    torch.distributed.all_reduce(smallest, op=torch.distributed.ReduceOp.MIN)
    return float(smallest.item())


def data_share(config: RunConfig) -> Share:
    """What this rank reads of each micro-batch; each loader has its own. A collective over all ranks."""
    place = groups.model_parallel_place()
    parallel = config.parallel
    return Share(
        images=parallel_state.is_pipeline_first_stage(ignore_virtual=True),
        captions=parallel_state.is_pipeline_last_stage(ignore_virtual=True),
        index=place.index,
        count=place.count,
        split_images=parallel.sequence_parallel or parallel.tensor_model_parallel_size == 1,
        group=place.group,
        sources=place.first_stage,
    )


def build_run(config: RunConfig) -> Run:
    """Model, optimizer and schedule on the process groups at hand, without data."""
    parallel = config.parallel
    transformer = transformer_config(config)
    model = build_model(config, transformer)
    first = parallel_state.get_tensor_model_parallel_rank() == 0
    held = [p.numel() for chunk in model for p in chunk.parameters() if first or p.tensor_model_parallel]
    parameters = torch.tensor([float(sum(held))], device=host.device())
    torch.distributed.all_reduce(parameters, group=parallel_state.get_model_parallel_group())
    log(f"parameters {int(parameters.item())} | {describe_split(config.model, parallel)}")
    if config.checkpoint.save and not config.log.eval_only:
        check_free_space(config.checkpoint.save, config, int(parameters.item()))
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=True,
        # By default it grows with the data-parallel size, and buckets are what checkpoints of shards are cut into.
        bucket_size=_BUCKET_PARAMETERS,
    )
    if parallel.fsdp:
        chunks: list[Any] = [FullyShardedDataParallel(transformer, ddp, model[0])]
    else:
        # As Megatron-LM does, only the first chunk's gradients are reduced in several buckets.
        chunks = [
            DistributedDataParallel(transformer, ddp, chunk, disable_bucketing=i > 0) for i, chunk in enumerate(model)
        ]
    transformer.finalize_model_grads_func = finalize_model_grads
    transformer.grad_scale_func = None
    transformer.no_sync_func = _of_each(chunks, "no_sync") if parallel.overlap_grad_reduce else None
    transformer.param_sync_func = _of_each(chunks, "start_param_sync") if parallel.overlap_param_gather else None
    transformer.timers = timers = Timers(config.log.timing_log_level, "minmax")
    optimizer = build_optimizer(config, chunks, timers)
    return Run(config, chunks, optimizer, build_scheduler(config, optimizer), Stepper(config, chunks), timers)


def _of_each(chunks: list[Any], name: str) -> Any:
    """A function of the chunks as Megatron-Core's schedules take it: a list, or of one chunk the bare function."""
    functions = [getattr(chunk, name) for chunk in chunks]
    return functions if len(functions) > 1 else functions[0]


def validate(run: Run) -> None:
    """Validation loss, to the log and the writers; captions of a few images beside their truth."""
    if run.valid_loader is None:
        return
    loss = evaluate(run.stepper, run.valid_loader)
    run.validated = (run.iteration, loss)
    log(f"iteration {run.iteration} | validation loss {loss:.4f}")
    if run.writer is None:
        return
    run.writer.scalars({"lm loss validation": loss}, run.iteration)
    if run.config.log.caption_samples:
        write_caption_samples(run.config, run.model, run.valid_loader, run.writer, run.iteration)


def train_step(run: Run, batches: Any) -> tuple[torch.Tensor, float, bool]:
    """(this rank's loss sum and count, gradient norm, whether the update was applied)."""
    for chunk in run.model:
        chunk.zero_grad_buffer()
    run.optimizer.zero_grad()
    total = run.stepper.run(batches, forward_only=False)
    updated, grad_norm, _ = run.optimizer.step()
    if updated:
        run.scheduler.step(increment=1)
    return total, float(grad_norm or 0.0), updated


def report(run: Run, total: torch.Tensor, grad_norm: float, seconds: float, steps: int) -> None:
    """The progress line of the last ``steps`` steps, which took ``seconds``."""
    device = run.stepper.device
    counts = run.stepper.counts.to(device, copy=True)
    torch.distributed.all_reduce(counts, group=parallel_state.get_data_parallel_group())
    counts = counts.cpu()
    run.stepper.counts.zero_()
    quarantined, truncated, waited = _loader_totals(run, device)
    loss_total, loss_count = sum_over_run(total).tolist()
    by_name = dict(zip(COUNTS, counts.tolist(), strict=True))
    run.consumed_samples += int(by_name["samples"])
    run.consumed_tokens += int(by_name["tokens"])
    flops = training_flops(counts, run.config.model) / seconds / torch.distributed.get_world_size() / 1e12
    memory = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else _resident_gib()
    progress = Progress(
        iteration=run.iteration,
        train_iters=run.config.train.train_iters,
        loss=loss_total / max(loss_count, 1),
        learning_rate=run.optimizer.param_groups[0]["lr"] if run.optimizer.param_groups else 0.0,
        grad_norm=grad_norm,
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
    )
    log(progress.line())
    if run.config.log.timing_log_level:
        log(run.timers.get_all_timers_string(_TIMERS, normalizer=steps))
    if run.writer is not None:
        run.writer.scalars(progress.scalars(), run.iteration)


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


def train(config: RunConfig) -> int:
    """Run to the end of ``config``; returns the exit status."""
    run = set_up(config)
    stop = StopRequest()
    options, status = config.log, 0
    try:
        if options.eval_only:
            validate(run)
            return status
        if run.iteration == 0:
            validate(run)
        assert run.train_loader is not None
        batches = iter(run.train_loader)
        saved, logged = run.iteration, run.iteration
        total = torch.zeros(2, dtype=torch.float64, device=run.stepper.device)
        begin = time.monotonic()
        while run.iteration < config.train.train_iters:
            losses, grad_norm, _ = train_step(run, batches)
            total += losses
            run.iteration += 1
            due = run.iteration == config.train.exit_interval
            last = run.iteration == config.train.train_iters
            leave = stop.agreed(run.stepper.device)
            at_end = due or last or leave
            validation = last or (options.eval_interval and run.iteration % options.eval_interval == 0)
            saving = at_end or run.iteration % config.checkpoint.save_interval == 0
            if run.iteration % options.log_interval == 0 or at_end or validation or saving:
                report(run, total, grad_norm, time.monotonic() - begin, run.iteration - logged)
                total.zero_()
                logged = run.iteration
                if validation and not leave:
                    validate(run)
                if saving and run.iteration != saved:
                    save(run, last=at_end)
                    saved = run.iteration
                begin = time.monotonic()
            if at_end:
                finish_saves(run)
                status = EXIT_PREEMPTED if leave and not last else 0
                break
        return status
    finally:
        if run.writer is not None:
            run.writer.close()
        for loader in (run.train_loader, run.valid_loader):
            if loader is not None:
                loader.close()
