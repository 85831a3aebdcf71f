"""A training run: set up, loop, validate, save."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.timers import Timers

from genlip_megatron.checkpoint.collectives import gather
from genlip_megatron.checkpoint.saving import Saver, check_free_space
from genlip_megatron.command import FILE_ERRORS, one_line
from genlip_megatron.config import RunConfig
from genlip_megatron.config.checks import check
from genlip_megatron.data.loader import Loader
from genlip_megatron.data.presence import absent
from genlip_megatron.data.quarantine import BadShare
from genlip_megatron.data.read_assignment import ReadAssignment
from genlip_megatron.device import current_device
from genlip_megatron.estimate import check_fits
from genlip_megatron.faults.exits import (
    EXIT_BAD_NUMBERS,
    EXIT_NOT_SAVED,
    EXIT_PREEMPTED,
    LeaveRun,
    UserError,
    mark_final,
    say_error,
    tell_torchrun,
)
from genlip_megatron.faults.inject import Injector, flip_bit
from genlip_megatron.faults.replicas import check_replicas
from genlip_megatron.faults.stop import StopRequest, told_by
from genlip_megatron.faults.watchdog import Watchdog
from genlip_megatron.model.genlip import build_model, unwrap
from genlip_megatron.model.pipeline import describe_split
from genlip_megatron.model.specs import check_machine, transformer_config
from genlip_megatron.parallel import groups
from genlip_megatron.parallel.user_buffers import prepare_user_buffers
from genlip_megatron.train.breakdown import Breakdown, StepTimers
from genlip_megatron.train.caption_samples import write_caption_samples
from genlip_megatron.train.fsdp import FullyShardedDataParallel
from genlip_megatron.train.guard import Guard, Outcome, no_stop_votes
from genlip_megatron.train.metrics import Writer
from genlip_megatron.train.oom import FIRST_STEPS, out_of_memory
from genlip_megatron.train.optimizer import build_optimizer, build_scheduler
from genlip_megatron.train.profile import Profiler
from genlip_megatron.train.report import Tally, log, report
from genlip_megatron.train.resume import finish_saves, gather_weights, load, make_saver, rewind, save
from genlip_megatron.train.step import Stepper, evaluate, finalize_gradients

_BUCKET_PARAMETERS = 40_000_000


@dataclass
class Run:
    """Everything a loop works on."""

    config: RunConfig
    model: list[Any]
    optimizer: Any
    scheduler: Any
    stepper: Stepper
    timers: Timers
    guard: Guard
    injector: Injector
    profiler: Profiler
    watchdog: Watchdog = field(default_factory=lambda: Watchdog(0))
    train_loader: Loader | None = None
    valid_loader: Loader | None = None
    writer: Writer | None = None
    iteration: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    quarantined: int = 0  # of the whole run, up to the last report
    bad_share: BadShare = field(default_factory=lambda: BadShare(1.0))
    validated: tuple[int, float] = (-1, 0.0)  # step and loss of the last validation
    saver: Saver | None = None


def set_up(config: RunConfig, watchdog: Watchdog | None = None) -> Run:
    """Join the processes, open the data, build the run, and load what is to be loaded.

    Args:
        watchdog: is told when each of these is done, and watches the run from then on.

    Raises:
        ValueError: a setting or a file is wrong.
    """
    watchdog = watchdog or Watchdog(0)
    check(config, int(os.environ.get("WORLD_SIZE", "1")))
    groups.initialize(config)
    watchdog.meet()
    watchdog.beat()
    log(check_machine(config))
    if config.train.check_memory and not config.log.eval_only:
        check_fits(config, torch.distributed.get_world_size(), memory_of_a_rank())
    # What is cheap to find comes first: the log, then the data.
    writer = Writer(config, torch.distributed.get_rank() == 0)
    data_parallel = (parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size())
    train_loader = None if config.log.eval_only else Loader(config, "train", *data_parallel, read_assignment(config))
    valid_loader = Loader(config, "valid", *data_parallel, read_assignment(config)) if config.data.valid_data else None
    look_for_shards({"train": train_loader, "valid": valid_loader})
    watchdog.beat()
    run = build_run(config)
    run.watchdog = watchdog
    run.train_loader, run.valid_loader = train_loader, valid_loader
    run.saver = make_saver(run)
    watchdog.beat()
    load(run)
    if train_loader is not None:
        run.bad_share, run.quarantined = BadShare(config.data.max_bad_share), sum(train_loader.quarantined)
    watchdog.beat()
    writer.begin(run.iteration)
    run.writer = writer
    return run


def look_for_shards(loaders: dict[str, Loader | None]) -> None:
    """Refuse a run whose shards are missing or not those that were indexed. A collective over all ranks.

    One process of each machine looks at its disks, since not all need be shared, and rank 0 at stores.

    Raises:
        ValueError: on every rank, the same line.
    """
    fault = ""
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        remote = torch.distributed.get_rank() == 0
        faults = (
            absent([shard for dataset in loader.datasets for shard in dataset.shards], f"data.{split}_data", remote)
            for split, loader in loaders.items()
            if loader is not None
        )
        fault = next(filter(None, faults), "")
    if fault := next(filter(None, gather(fault)), ""):
        raise ValueError(fault)


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
    smallest = torch.tensor([memory], dtype=torch.float64, device=current_device())
    torch.distributed.all_reduce(smallest, op=torch.distributed.ReduceOp.MIN)
    return float(smallest.item())


def read_assignment(config: RunConfig) -> ReadAssignment:
    """What this rank reads of each micro-batch; each loader has its own. A collective over all ranks."""
    place = groups.model_parallel_place()
    parallel = config.parallel
    return ReadAssignment(
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
    prepare_user_buffers(
        transformer, config.data.seq_length * config.train.micro_batch_size // parallel.context_parallel_size
    )
    model = build_model(config, transformer)
    first = parallel_state.get_tensor_model_parallel_rank() == 0
    held = [p.numel() for chunk in model for p in chunk.parameters() if first or p.tensor_model_parallel]
    parameters = torch.tensor([float(sum(held))], device=current_device())
    torch.distributed.all_reduce(parameters, group=parallel_state.get_model_parallel_group())
    log(f"parameters {int(parameters.item())} | {describe_split(config.model, parallel)}")
    if config.checkpoint.save and not config.log.eval_only:
        check_free_space(config.checkpoint.save, config, int(parameters.item()))
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=True,
        fp8_param_gather=bool(transformer.fp8_param),
        # By default it grows with the data-parallel size, and buckets are what checkpoints of shards are cut into.
        bucket_size=_BUCKET_PARAMETERS,
    )
    # DDP keeps the nodes of autograd that take the weights' gradients, and each stays on the stream it was made on. A
    # capture of the backward pass joins those streams, which the default one cannot be: nodes are made on another.
    current = torch.cuda.current_stream()
    stream = torch.cuda.Stream() if config.train.cuda_graph else current
    # Passes without a graph then find them on another stream than theirs, which torch would warn of.
    torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(not config.train.cuda_graph)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        if parallel.fsdp:
            chunks: list[Any] = [FullyShardedDataParallel(transformer, ddp, model[0])]
        else:
            # As Megatron-LM does, only the first chunk's gradients are reduced in several buckets.
            chunks = [
                DistributedDataParallel(transformer, ddp, chunk, disable_bucketing=i > 0)
                for i, chunk in enumerate(model)
            ]
    current.wait_stream(stream)
    transformer.finalize_model_grads_func = finalize_gradients
    transformer.grad_scale_func = None
    transformer.no_sync_func = _of_each(chunks, "no_sync") if parallel.overlap_grad_reduce else None
    transformer.param_sync_func = _of_each(chunks, "start_param_sync") if parallel.overlap_param_gather else None
    timers, breakdown = Timers(config.log.timing_log_level, "minmax"), Breakdown(current_device())
    transformer.timers = StepTimers(timers, breakdown)
    optimizer = build_optimizer(config, chunks, timers)
    scheduler, stepper = build_scheduler(config, optimizer), Stepper(config, chunks, breakdown)
    injector = Injector(config.faults, torch.distributed.get_rank())
    guard = Guard(config, chunks, optimizer, scheduler, stepper, injector)
    profiler = Profiler(config, torch.distributed.get_rank(), breakdown)
    return Run(config, chunks, optimizer, scheduler, stepper, timers, guard, injector, profiler)


def _of_each(chunks: list[Any], name: str) -> Any:
    """A function of the chunks as Megatron-Core's schedules take it: a list, or of one chunk the bare function."""
    functions = [getattr(chunk, name) for chunk in chunks]
    return functions if len(functions) > 1 else functions[0]


def validate(run: Run) -> None:
    """Validation loss, to the log and the writers; captions of a few images beside their truth."""
    if run.valid_loader is None:
        return
    run.injector.at("validation", run.iteration)
    loss = evaluate(run.stepper, run.valid_loader, run.watchdog.beat)
    run.validated = (run.iteration, loss)
    log(f"iteration {run.iteration} | validation loss {loss:.4f}")
    if run.writer is None:
        return
    run.writer.scalars({"lm loss validation": loss}, run.iteration)
    if run.config.log.caption_samples:
        write_caption_samples(run.config, run.model, run.valid_loader, run.writer, run.iteration)
        run.watchdog.beat()


def train_step(run: Run, batches: Iterator[Any], stop: StopRequest | None = None) -> Outcome:
    """The step after ``run.iteration``; what became of it, the same on all ranks. A collective over them.

    Args:
        batches: this rank's micro-batches.
        stop: whether this rank was told to stop.
    """
    number = run.iteration + 1
    run.injector.at("step", number)
    saver = run.saver
    with run.profiler.step(number), run.stepper.breakdown.step():
        outcome = run.guard.step(
            batches,
            number,
            stop=stop.votes if stop else no_stop_votes,
            unwritten=lambda: saver is not None and not saver.written,
        )
    if run.injector.fires("flip", number):
        if saver is not None:
            saver.wait_for_copy()
        flip_bit(unwrap(run.model[0]).parameters())
    return outcome


def check_weights(run: Run, saving: bool) -> None:
    """Compare the weights of replicas, when it is due and before they are saved.

    A collective over all ranks; LeaveRun when they differ.
    """
    interval = run.config.faults.check_replicas_interval
    if not interval or not (saving or run.iteration % interval == 0) or run.config.parallel.fsdp:
        return
    gather_weights(run)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    check_replicas(
        (
            (f"stage {stage} chunk {i} {name}", parameter)
            for i, chunk in enumerate(run.model)
            for name, parameter in unwrap(chunk).named_parameters()
        ),
        run.iteration,
    )


def roll_back(run: Run, batches: Any, why: str) -> Iterator[Any]:
    """Go back to the newest good checkpoint and leave out the data since, up to and including this step's.

    Afterwards ``run.iteration`` and the loader's step differ by the steps that were left out: the order of the data and
    DropPath follow the loader's. Without a checkpoint nothing changes, if the last update was merely a spike's.
    A collective over all ranks.

    Returns:
        the micro-batches to go on with.

    Raises:
        LeaveRun: rolling back has not cured it, is not wanted, or cannot be done.
    """
    loader, options, step = run.train_loader, run.config.faults, run.iteration
    assert loader is not None
    helpless = run.guard.without_update >= options.max_bad_steps
    if helpless and options.on_spike != "rollback":
        raise LeaveRun(
            EXIT_BAD_NUMBERS,
            f"step {step}: {why}. Look at the data of these steps, lower train.lr, or let the run go back by itself "
            "with --on-spike rollback",
        )
    finish_saves(run)
    # The loader's thread works on the same plan, together with those of the ranks that share its micro-batches.
    batches.close()
    seen, before = loader.step, run.guard.state_dict()
    back = rewind(run)
    if back is None:
        if helpless:
            raise LeaveRun(EXIT_BAD_NUMBERS, f"step {step}: {why}, and there is no checkpoint to go back to")
        log(f"{why}: no checkpoint to go back to yet; only its update was left out")
        return iter(loader)
    run.guard.went_back(back, before)
    if run.guard.rollbacks > options.max_rollbacks:
        raise LeaveRun(
            EXIT_BAD_NUMBERS,
            f"step {step}: {why}, after {run.guard.rollbacks - 1} rollbacks since the checkpoint of step {back} "
            "(faults.max_rollbacks). Look at the data since then, or lower train.lr",
        )
    if run.writer is not None:
        run.writer.rewind(back)
    first = loader.step + 1
    loader.skip(seen - loader.step)
    run.stepper.counts.zero_()
    log(
        f"ROLLBACK {run.guard.rollbacks} of at most {options.max_rollbacks}: {why}; back from step {step} to the "
        f"checkpoint of step {back}; the data of steps {first} to {seen} are left out for good"
    )
    return iter(loader)


def train_steps(run: Run, stop: StopRequest) -> int:
    """Train to the end of the configuration or until told to stop; the exit status. LeaveRun where it cannot go on."""
    config, options = run.config, run.config.log
    assert run.train_loader is not None
    if config.parallel.fsdp and config.faults.check_replicas_interval:
        log("replicas are not compared: with parallel.fsdp there are none")
    wishes = torch.tensor(stop.votes(), device=run.stepper.device)
    torch.distributed.all_reduce(wishes)
    if told := told_by(wishes.tolist()):
        log(text := f"stop requested by {told}: leaving before the first step, with nothing to save")
        tell_torchrun(text)
        stop.obey()
        return EXIT_PREEMPTED
    if run.iteration == 0:
        validate(run)
    batches: Iterator[Any] = iter(run.train_loader)
    saved, safe, tally, status, leave = run.iteration, True, Tally(), 0, False
    while run.iteration < config.train.train_iters:
        outcome = train_step(run, batches, stop)
        run.watchdog.beat()
        run.iteration += 1
        tally.add(outcome)
        leave = any(outcome.stop)
        if outcome.roll_back and not leave:
            before = run.iteration
            batches = roll_back(run, batches, outcome.roll_back)
            run.watchdog.beat()
            if run.iteration < before:
                saved, tally = run.iteration, Tally()
                continue
        if run.saver is not None and run.saver.writing and not outcome.unwritten:
            finish_saves(run)
        due = bool(config.train.exit_interval) and run.iteration % config.train.exit_interval == 0
        last = run.iteration == config.train.train_iters
        at_end = due or last or leave
        validation = last or (options.eval_interval and run.iteration % options.eval_interval == 0)
        saving = at_end or run.iteration % config.checkpoint.save_interval == 0
        check_weights(run, saving and run.saver is not None)
        if run.iteration % options.log_interval == 0 or at_end or validation or saving:
            report(run, tally)
            if validation and not leave:
                validate(run)
            if saving and run.iteration != saved:
                run.watchdog.beat()
                safe = save(run, last=at_end)
                run.watchdog.beat()
                saved = run.iteration
            tally = Tally()
        if leave:
            nowhere = "; nothing is saved, since checkpoint.save names no folder" if run.saver is None else ""
            log(text := f"stop requested by {told_by(outcome.stop)}: leaving after step {run.iteration}{nowhere}")
            tell_torchrun(text)
            status = 0 if due or last else EXIT_PREEMPTED
        if at_end:
            break
    safe = finish_saves(run) and safe
    if leave and not safe:
        # torchrun would start it again, and the stop file is gone.
        mark_final(config.checkpoint.save, EXIT_NOT_SAVED, told_to_stop=True)
    stop.obey()
    return status if safe else EXIT_NOT_SAVED


def train(config: RunConfig, watchdog: Watchdog | None = None) -> int:
    """Run to the end of ``config``; returns the exit status.

    Args:
        watchdog: watches all of it; it is the caller's to close.

    Raises:
        UserError: a setting or a file is wrong, or the first steps need more memory than a GPU has.
    """
    run: Run | None = None
    stop: StopRequest | None = None
    began = 0
    try:
        try:
            run = set_up(config, watchdog)
        except (ValueError, *FILE_ERRORS) as error:
            raise UserError(one_line(error)) from error
        if config.log.eval_only:
            validate(run)
            return 0
        # Not before: until then, and in a validation alone, signals end the process at once.
        stop = StopRequest(config)
        began = run.iteration
        return train_steps(run, stop)
    except torch.OutOfMemoryError as error:
        if run is not None and run.iteration - began >= FIRST_STEPS:
            raise
        raise UserError(out_of_memory(config, torch.distributed.get_world_size(), error)) from error
    except LeaveRun as leave:
        assert run is not None
        say_error(str(leave), torch.distributed.get_rank() == 0)
        finish_saves(run)
        return leave.status
    finally:
        if stop is not None:
            stop.close()
        if run is not None:
            run.profiler.close()
            if run.writer is not None:
                run.writer.close()
            if run.saver is not None:
                run.saver.close()
            for loader in (run.train_loader, run.valid_loader):
                if loader is not None:
                    loader.close()
