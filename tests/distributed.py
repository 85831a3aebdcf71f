"""Real processes on gloo for tests. Each world size is started once and reused: importing takes seconds."""

from __future__ import annotations

import atexit
import gc
import multiprocessing.connection
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp

_pools: dict[int, Workers] = {}


def _serve(rank: int, world_size: int, port: int, pipe: Any) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    from genlip_megatron import host

    host.install()
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size)
    while True:
        job = pipe.recv()
        if job is None:
            break
        function, args = job
        _leave_groups()
        try:
            answer = (True, function(*args))
        except BaseException:
            answer = (False, traceback.format_exc())
        gc.collect()  # so that runs of this job leave their folders to the next
        pipe.send(answer)
    torch.distributed.destroy_process_group()


def _leave_groups() -> None:
    """Destroy the process groups of earlier jobs: each has threads that wake again and again, some sixty a job."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    default = torch.distributed.group.WORLD
    for group in list(torch.distributed.distributed_c10d._world.pg_map):
        if group is not default:
            torch.distributed.destroy_process_group(group)
    gc.collect()


class Workers:
    """``world_size`` processes that run functions together."""

    def __init__(self, world_size: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = mp.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world_size, port, theirs), daemon=False)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable, *args: Any) -> list[Any]:
        """``function(*args)`` on every rank; the results by rank. Raises AssertionError with the ranks' tracebacks."""
        for pipe in self.pipes:
            pipe.send((function, args))
        errors: list[str] = []
        waiting = dict(enumerate(self.pipes))
        results: dict[int, Any] = {}
        while waiting:
            ready = multiprocessing.connection.wait(list(waiting.values()), timeout=15 if errors else 300)
            if not ready:
                errors.append(f"ranks {sorted(waiting)} did not answer")
                self.kill()
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
            self.kill()
            raise AssertionError("\n".join(errors))
        return [results[rank] for rank in sorted(results)]

    def kill(self) -> None:
        """End the processes at once; after a failed collective their state cannot be trusted."""
        for process in self.processes:
            process.kill()
        for size, pool in list(_pools.items()):
            if pool is self:
                del _pools[size]

    def close(self) -> None:
        """Ask the processes to leave and wait for them."""
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(10)
            process.kill()


def run_distributed(world_size: int, function: Callable, *args: Any) -> list[Any]:
    """``function(*args)``, importable by name, on every rank of ``world_size`` gloo processes; results by rank.

    The default process group is up and Megatron-Core's CPU layer installed; model-parallel groups are the
    function's business (it must destroy those of an earlier job).
    """
    if world_size not in _pools:
        # Two cores carry no more than a few idle pools; the oldest makes room.
        while len(_pools) >= 3:
            _pools.pop(next(iter(_pools))).close()
        _pools[world_size] = Workers(world_size)
    return _pools[world_size].run(function, *args)


@atexit.register
def _close_all() -> None:
    for pool in list(_pools.values()):
        pool.close()
    _pools.clear()
