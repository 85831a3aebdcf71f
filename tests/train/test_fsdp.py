"""FSDP shards what a rank holds; ``test_parity.py`` and ``test_resume.py`` compare its results with other layouts."""

from __future__ import annotations

from pathlib import Path

from genlip_megatron.config import RunConfig
from genlip_megatron.testing.distributed import run_distributed
from genlip_megatron.testing.runs import tiny_config
from tests.train.steps import take_steps


def held_values(config: RunConfig) -> tuple[int, int]:
    """(numbers of values in weights, gradients and optimizer state of this rank after a step; number of parameters)."""
    run, _, _ = take_steps(config, 1)
    parameters = list(run.model[0].parameters())
    tensors = [*parameters, *(p.grad for p in parameters)]
    tensors += [tensor for state in run.optimizer.state.values() for tensor in state.values()]
    storages = {s.data_ptr(): s.nbytes() // 4 for s in (tensor.to_local().untyped_storage() for tensor in tensors)}
    return sum(storages.values()), sum(p.numel() for p in parameters)


def test_a_rank_holds_only_its_shard(demo_data: Path) -> None:
    for held, parameters in run_distributed(2, held_values, tiny_config(demo_data, parallel__fsdp=True)):
        assert held < 0.55 * 4 * parameters
