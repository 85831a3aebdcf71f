"""Process groups, device and seeds of this rank."""

from __future__ import annotations

import hashlib
import importlib
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from megatron.core import num_microbatches_calculator, parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig

from genlip_megatron.config import RunConfig
from genlip_megatron.faults.exits import first_of_machine


def timeout(config: RunConfig) -> timedelta:
    """Time limit of a collective: longer than the watchdog's, whose error says more. A day without a watchdog.

    >>> str(timeout(RunConfig()))  # faults.step_timeout is 20 minutes
    '0:30:00'
    """
    return timedelta(minutes=config.faults.step_timeout + 10) if config.faults.step_timeout else timedelta(days=1)


def backend() -> str:
    """The backend: NCCL for tensors on GPUs, gloo for tensors in host memory."""
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def world_size() -> int:
    """Number of processes that the launcher started, before they have joined.

    Raises:
        ValueError: WORLD_SIZE is left over in the environment, without a launcher.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count > 1 and "MASTER_ADDR" not in os.environ:
        raise ValueError(
            f"WORLD_SIZE = {count}: is set in the environment, but no launcher started this process. Run unset "
            "WORLD_SIZE RANK LOCAL_RANK for one process, or start several with torchrun"
        )
    return count


def initialize(config: RunConfig) -> None:
    """Join the run's processes and create Megatron-Core's groups.

    Works under torchrun and for one process started by hand, which needs no port.

    Raises:
        ValueError: there are more processes than GPUs.
        ConnectionError: the processes cannot connect to each other.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if torch.cuda.is_available():
        grow_segments(config)
        torch.cuda.set_device(own_gpu())
    if not torch.distributed.is_initialized():
        try:
            torch.distributed.init_process_group(
                backend(),
                # With its own store a single process does not connect to MASTER_ADDR.
                store=torch.distributed.HashStore() if world_size == 1 else None,
                rank=rank,
                world_size=world_size,
                timeout=timeout(config),
            )
        except (torch.distributed.DistNetworkError, torch.distributed.DistStoreError) as error:
            place = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
            reason = str(error).splitlines()[0]
            raise ConnectionError(
                f"rank {rank} of {world_size} cannot connect to the others at {place}: {reason}"
            ) from error
    parallel_state.destroy_model_parallel()
    vpp = config.parallel.virtual_pipeline_model_parallel_size
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
        context_parallel_size=config.parallel.context_parallel_size,
        distributed_timeout_minutes=timeout(config) / timedelta(minutes=1),
    )
    num_microbatches_calculator.unset_num_microbatches_calculator()
    num_microbatches_calculator.init_num_microbatches_calculator(
        rank=rank,
        rampup_batch_size=None,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
        decrease_batch_size_if_needed=False,
    )
    torch.manual_seed(config.train.seed)
    model_parallel_cuda_manual_seed(config.train.seed)


def grow_segments(config: RunConfig) -> None:
    """Make torch's allocator grow its memory segments. By default it adds segments, which leaves gigabytes unused.

    Off with CUDA graphs, because hangs and illegal accesses were reported for the combination. Does nothing if the
    environment configures the allocator. Affects later allocations only.
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        torch._C._accelerator_setAllocatorSettings(f"expandable_segments:{not config.train.cuda_graph}")


def own_gpu() -> int:
    """The number of this process's GPU.

    Raises:
        ValueError: there are fewer GPUs than processes.
    """
    place, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if place >= gpus:
        started = os.environ.get("LOCAL_WORLD_SIZE", str(place + 1))
        raise ValueError(
            f"torchrun started {started} processes on a machine that shows {gpus} GPUs; each process needs one. Use "
            f"--nproc-per-node {gpus}, or let CUDA_VISIBLE_DEVICES show more"
        )
    return place


@dataclass(frozen=True)
class ModelParallelPlace:
    """This rank's place among the ranks that work on the same micro-batches.

    Attributes:
        group: gloo group of all of them, across pipeline stages; None for a single rank.
        index, count: place among the tensor- and context-parallel ranks of its pipeline stage.
        first_stage: global ranks of the ``count`` ranks of the first stage, in order.
    """

    group: torch.distributed.ProcessGroup | None
    index: int
    count: int
    first_stage: tuple[int, ...]


def model_parallel_place() -> ModelParallelPlace:
    """This rank's place, with a new process group. A collective over all ranks."""
    mine = (
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_context_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
    )
    places: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(places, mine)
    by_lanes: dict[int, list[int]] = {}
    for rank, place in enumerate(places):
        by_lanes.setdefault(place[0], []).append(rank)
    group = None
    for lanes, ranks in sorted(by_lanes.items()):
        if len(ranks) > 1:
            # Loaders wait in it during a validation or a save; the watchdog notices hangs.
            made = torch.distributed.new_group(ranks, backend="gloo", timeout=timedelta(days=1))
            group = made if lanes == mine[0] else group
    together = sorted(by_lanes[mine[0]], key=lambda rank: places[rank][2:])
    stage = [rank for rank in together if places[rank][1] == mine[1]]
    first_stage = tuple(rank for rank in together if places[rank][1] == 0)
    return ModelParallelPlace(group, stage.index(torch.distributed.get_rank()), len(stage), first_stage)


def first_to_say(text: str) -> bool:
    """Whether this rank is the first to call this with ``text``, or the first of its machine without process groups.

    Not a collective: other ranks may have another text or none.
    """
    if torch.distributed.is_initialized():
        store = torch.distributed.distributed_c10d._get_default_store()
        try:
            return bool(store.add(f"said/{hashlib.sha256(text.encode()).hexdigest()}", 1) == 1)
        except RuntimeError:  # the rank with the store is gone; printing twice is better than not at all
            return True
    return first_of_machine(text)


def prepare_user_buffers(transformer: TransformerConfig, tokens: int) -> None:
    """Allocate Transformer Engine's user buffers, which overlap tensor-parallel communication with matrix products.

    Does nothing without ``tp_comm_overlap``. Call before the first forward pass. A collective.

    Args:
        tokens: slots of a micro-batch on one context-parallel rank.
    """
    if not transformer.tp_comm_overlap:
        return
    base: Any = importlib.import_module("transformer_engine.pytorch.module.base")
    modes = base.UserBufferQuantizationMode
    used = [modes.FP8 if transformer.fp8 else modes.NONE]
    if transformer.fp8 and transformer.first_last_layers_bf16:
        used.append(modes.NONE)
    base.initialize_ub(
        shape=[tokens, transformer.hidden_size],
        tp_size=transformer.tensor_model_parallel_size,
        quantization_modes=used,
        dtype=transformer.params_dtype,
        bootstrap_backend="nccl",
    )


def finalize() -> None:
    """Destroy the process groups."""
    if torch.distributed.is_initialized():
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
