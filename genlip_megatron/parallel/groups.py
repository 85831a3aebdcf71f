"""Process groups, device and seeds of this rank."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
from megatron.core import num_microbatches_calculator, parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from genlip_megatron.config import RunConfig, check


def initialize(config: RunConfig, timeout_minutes: float = 30.0) -> None:
    """Join the run's processes and make Megatron-Core's groups.

    Started by torchrun, or by hand as one process. NCCL on GPUs, gloo without.

    Raises:
        ValueError: the layout does not fit the number of processes.
    """
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    check(config, world_size)
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if gpu else "gloo",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(minutes=timeout_minutes),
        )
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.parallel.pipeline_model_parallel_size,
        context_parallel_size=config.parallel.context_parallel_size,
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


def finalize() -> None:
    """Leave the groups."""
    if torch.distributed.is_initialized():
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
