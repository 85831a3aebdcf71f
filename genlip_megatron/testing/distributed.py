"""Real processes for tests, on gloo or, with GPUs, NCCL.

They are started once and join a new group for every job, since importing takes seconds. Each is started separately, so
ranks share no hash seed and no state of imports.
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing.connection
import os
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from genlip_megatron.testing.processes import free_port, import_training, rank_environment

_workers: dict[int, Worker] = {}  # by rank


def _serve(rank: int, pipe: Any) -> None:
    import_training()
    from megatron.core import parallel_state

    from genlip_megatron.parallel import groups

    while (job := _receive(pipe)) is not None:
        world_size, port, function, args = job
        os.environ.update(rank_environment(rank, world_size, port))
        try:
            torch.distributed.init_process_group(groups.backend())
            answer = (True, function(*args))
        except BaseException:
            answer = (False, traceback.format_exc())
        gc.collect()  # frees this job's runs, which lock their folders
        pipe.send(answer)
        pipe.recv()  # all ranks have answered, so none needs this one
        parallel_state.destroy_model_parallel()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        gc.collect()


def _receive(pipe: Any) -> Any:
    try:
        return pipe.recv()
    except EOFError:  # the tests were killed
        return None


class Worker:
    """The process of rank ``rank`` in every job that has this rank."""

    def __init__(self, rank: int) -> None:
        context = mp.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(rank, theirs), daemon=False)
        self.process.start()
        theirs.close()

    def close(self) -> None:
        """Ask the process to leave and wait for it."""
        if self.process.is_alive():
            self.pipe.send(None)
        self.process.join(10)
        self.process.kill()


def run_distributed(world_size: int, function: Callable, *args: Any) -> list[Any]:
    """Call ``function(*args)`` on every rank of ``world_size`` processes; returns the results by rank.

    The default process group exists, and ``megatron_patches`` are installed. The function creates model-parallel groups
    itself; they are destroyed after it.

    Args:
        function: importable by name.

    Raises:
        AssertionError: a rank failed; holds the tracebacks.
    """
    if torch.cuda.is_available() and torch.cuda.device_count() < world_size:
        pytest.skip(f"needs {world_size} GPUs; this machine has {torch.cuda.device_count()}")
    for rank in range(world_size):
        if rank not in _workers or not _workers[rank].process.is_alive():
            _workers[rank] = Worker(rank)
    waiting = {rank: _workers[rank].pipe for rank in range(world_size)}
    job = (world_size, free_port(), function, args)
    for pipe in waiting.values():
        pipe.send(job)
    errors: list[str] = []
    results: dict[int, Any] = {}
    while waiting:
        ready = multiprocessing.connection.wait(list(waiting.values()), timeout=15 if errors else 300)
        if not ready:
            errors.append(f"ranks {sorted(waiting)} did not answer")
            break
        for rank, pipe in list(waiting.items()):
            if pipe not in ready:
                continue
            del waiting[rank]
            try:
                good, value = pipe.recv()
            except EOFError:
                good, value = False, "the process died"
            results[rank] = value
            if not good:
                errors.append(f"rank {rank}:\n{value}")
    if errors:
        for rank in range(world_size):  # after a failed collective the processes cannot be trusted
            _workers.pop(rank).process.kill()
        raise AssertionError("\n".join(errors))
    for rank in range(world_size):
        _workers[rank].pipe.send("leave")
    return [results[rank] for rank in range(world_size)]


@atexit.register
def _close_all() -> None:
    for worker in _workers.values():
        worker.close()
