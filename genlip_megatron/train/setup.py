"""Set-up of a run: process groups, data, model, optimizer, and the checkpoint it continues from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import psutil
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.timers import Timers
from megatron.core.transformer.transformer_config import TransformerConfig

from genlip_megatron.checkpoint.collectives import gather
from genlip_megatron.checkpoint.saving import check_free_space
from genlip_megatron.config import RunConfig
from genlip_megatron.config.checks import check
from genlip_megatron.data.loader import Loader
from genlip_megatron.data.overlap import shared_images
from genlip_megatron.data.presence import absent
from genlip_megatron.data.quarantine import BadShare
from genlip_megatron.data.read_assignment import ReadAssignment
from genlip_megatron.device import current_device
from genlip_megatron.estimate import check_fits
from genlip_megatron.faults.inject import Injector
from genlip_megatron.faults.watchdog import Watchdog
from genlip_megatron.log import log, warn
from genlip_megatron.model.fp8_state import FP8Snapshot
from genlip_megatron.model.genlip import build_model, unwrap
from genlip_megatron.model.pipeline import describe_split
from genlip_megatron.model.specs import check_machine, transformer_config
from genlip_megatron.parallel import groups
from genlip_megatron.train.breakdown import Breakdown, StepTimers
from genlip_megatron.train.forward_backward import finalize_gradients
from genlip_megatron.train.fsdp import FullyShardedDataParallel
from genlip_megatron.train.graphs import GraphedStage
from genlip_megatron.train.optimizer import build_optimizer, build_scheduler
from genlip_megatron.train.profile import Profiler
from genlip_megatron.train.resume import load, make_saver
from genlip_megatron.train.state import Run
from genlip_megatron.train.summary import data_lines, machine_line, start_line, write_config
from genlip_megatron.train.verdict import Verdicts
from genlip_megatron.train.writer import Writer

_BUCKET_PARAMETERS = 40_000_000


def set_up(config: RunConfig, watchdog: Watchdog | None = None) -> Run:
    """Join the process groups, open the data, build the run, and load its checkpoint.

    Args:
        watchdog: watches the run from now on; each part of the set-up counts as progress.

    Raises:
        ValueError: a setting or a file is wrong.
    """
    watchdog = watchdog or Watchdog(0)
    check(config, groups.world_size())
    groups.initialize(config)
    watchdog.meet()
    watchdog.beat()
    log(check_machine(config))
    warn_of_few_cores()
    if config.log.eval_only and config.checkpoint.save:
        log("--eval-only writes nothing to checkpoint.save")
    if note := untested_torch(torch.__version__):
        log(f"WARNING: {note}")
    if config.train.check_memory and not config.log.eval_only:
        check_fits(config, torch.distributed.get_world_size(), memory_of_a_rank(), current_device().type)
    # Cheap checks come first: the log, then the data.
    writer = Writer(config, torch.distributed.get_rank() == 0)
    data_parallel = (parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size())
    train_loader = None if config.log.eval_only else Loader(config, "train", *data_parallel, read_assignment(config))
    valid_loader = Loader(config, "valid", *data_parallel, read_assignment(config)) if config.data.valid_data else None
    check_shards({"train": train_loader, "valid": valid_loader})
    if torch.distributed.get_rank() == 0:
        log("\n".join([*data_lines(config, train_loader, valid_loader), machine_line(config)]))
    warn_of_shared_images(train_loader, valid_loader)
    watchdog.beat()
    run = build_run(config)
    run.watchdog = watchdog
    run.train_loader, run.valid_loader = train_loader, valid_loader
    run.saver = make_saver(run)
    watchdog.beat()
    load(run)
    if train_loader is not None:
        if run.iteration == 0:
            log(start_line(config))
        write_config(config)
        run.bad_share, run.quarantined = BadShare(config.data.max_bad_share), sum(train_loader.quarantined)
    watchdog.beat()
    writer.begin(run.iteration)
    run.writer = writer
    return run


def warn_of_few_cores() -> None:
    """Warn if this process may use only some of the machine's cores, and fewer than two for each of its ranks."""
    cores, ranks = len(os.sched_getaffinity(0)), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if cores < min(2 * ranks, os.cpu_count() or 1):
        warn(
            f"warning: {cores} of {os.cpu_count()} CPU cores for {ranks} ranks: data will be decoded slowly. With "
            "SLURM launch by srun --cpu-bind=none --cpus-per-task=$SLURM_CPUS_ON_NODE, as examples/slurm_run.sh does"
        )


def untested_torch(version: str) -> str:
    """A line about a torch that setup.py does not allow; "" for others.

    >>> untested_torch("2.13.0+cpu"), untested_torch("2.10.1")
    ('', 'torch 2.10.1: tested with 2.11 to 2.13. Run pip install -e . in the checkout to get one of them')
    """
    major, minor = (int(part) for part in version.split(".")[:2])
    if (2, 11) <= (major, minor) < (2, 14):
        return ""
    return f"torch {version}: tested with 2.11 to 2.13. Run pip install -e . in the checkout to get one of them"


def memory_of_a_rank() -> float:
    """Bytes that a rank may use: its GPU's, or its part of the machine's. A collective: the smallest of all ranks."""
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
    """The part of each micro-batch that this rank reads; each loader needs its own. A collective over all ranks."""
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


def check_shards(loaders: dict[str, Loader | None]) -> None:
    """Check that the shards exist and have not changed since indexing. A collective over all ranks.

    One process of each machine checks its disks, which need not be shared. Rank 0 checks remote stores.

    Raises:
        ValueError: on every rank, with the same text.
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


def warn_of_shared_images(train: Loader | None, valid: Loader | None) -> None:
    """Say on rank 0 if validation images are also training images."""
    if train is None or valid is None or torch.distributed.get_rank():
        return
    if shared := shared_images(train.datasets, valid.datasets):
        log(f"WARNING: {shared}")


def build_run(config: RunConfig) -> Run:
    """Model, optimizer and schedule on the current process groups, without data."""
    parallel = config.parallel
    transformer = transformer_config(config)
    groups.prepare_user_buffers(
        transformer, config.data.seq_length * config.train.micro_batch_size // parallel.context_parallel_size
    )
    model = build_model(config, transformer)
    parameters = _count_parameters(model)
    log(f"parameters {parameters} | {describe_split(config.model, parallel)}")
    if config.checkpoint.save and not config.log.eval_only:
        check_free_space(config.checkpoint.save, config, parameters)
    model = _wrap(config, transformer, model)
    timers, breakdown = Timers(config.log.timing_log_level, "minmax"), Breakdown(current_device())
    _configure_schedule(config, transformer, model, StepTimers(timers, breakdown))
    optimizer = build_optimizer(config, model, timers)
    rank = torch.distributed.get_rank()
    return Run(
        config=config,
        model=model,
        optimizer=optimizer,
        scheduler=build_scheduler(config, optimizer),
        graphed_stage=GraphedStage(model[0]) if config.train.cuda_graph else None,
        verdicts=Verdicts(config.faults),
        fp8_snapshot=FP8Snapshot(map(unwrap, model)),
        injector=Injector(config.faults.inject_fault, rank),
        timers=timers,
        breakdown=breakdown,
        profiler=Profiler(config, rank, breakdown),
    )


def _count_parameters(model: list[Any]) -> int:
    """Parameters of the whole model. A collective over the model-parallel ranks."""
    first = parallel_state.get_tensor_model_parallel_rank() == 0
    held = [p.numel() for chunk in model for p in chunk.parameters() if first or p.tensor_model_parallel]
    parameters = torch.tensor([float(sum(held))], device=current_device())
    torch.distributed.all_reduce(parameters, group=parallel_state.get_model_parallel_group())
    return int(parameters.item())


def _wrap(config: RunConfig, transformer: TransformerConfig, model: list[Any]) -> list[Any]:
    """The model's chunks, wrapped for data parallelism."""
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=config.parallel.overlap_grad_reduce,
        overlap_param_gather=config.parallel.overlap_param_gather,
        use_distributed_optimizer=True,
        fp8_param_gather=bool(transformer.fp8_param),
        # The default grows with the data-parallel size, and ``dp_reshardable`` checkpoints are cut into buckets.
        bucket_size=_BUCKET_PARAMETERS,
    )
    # A graph's capture of the backward pass joins the streams on which autograd's nodes for weight gradients were
    # made, and cannot join the default stream. So DDP, which keeps these nodes, is built on another stream.
    current = torch.cuda.current_stream()
    stream = torch.cuda.Stream() if config.train.cuda_graph else current
    # torch would warn because passes without a graph run on another stream than those nodes.
    torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(not config.train.cuda_graph)
    stream.wait_stream(current)
    wrapped: list[Any]
    with torch.cuda.stream(stream):
        if config.parallel.fsdp:
            wrapped = [FullyShardedDataParallel(transformer, ddp, model[0])]
        else:
            # As in Megatron-LM, only the first chunk reduces its gradients in several buckets.
            wrapped = [
                DistributedDataParallel(transformer, ddp, chunk, disable_bucketing=i > 0)
                for i, chunk in enumerate(model)
            ]
    current.wait_stream(stream)
    return wrapped


def _configure_schedule(config: RunConfig, transformer: TransformerConfig, model: list[Any], timers: Any) -> None:
    """Set the functions that Megatron-Core's pipeline schedules call, in ``transformer``."""

    def of_each_chunk(name: str) -> Any:
        functions = [getattr(chunk, name) for chunk in model]
        return functions if len(functions) > 1 else functions[0]

    transformer.finalize_model_grads_func = finalize_gradients
    transformer.grad_scale_func = None
    transformer.no_sync_func = of_each_chunk("no_sync") if config.parallel.overlap_grad_reduce else None
    transformer.param_sync_func = of_each_chunk("start_param_sync") if config.parallel.overlap_param_gather else None
    transformer.timers = timers
