"""A weight that differs between replicas is found, and the rank that holds it is named."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch

from genlip_megatron.config import RunConfig
from genlip_megatron.faults.exits import EXIT_REPLICAS_DIFFER, LeaveRun
from genlip_megatron.faults.replicas import check_replicas, odd_ranks
from genlip_megatron.parallel import groups
from genlip_megatron.testing.distributed import run_distributed
from genlip_megatron.testing.runs import layout, tiny_config
from genlip_megatron.train import loop
from tests.fault_table import FaultRow


def compare(config: RunConfig, odd: str) -> str:
    """The result of comparing two parameters; ``odd`` has another value on rank 1."""
    groups.initialize(config)
    parameters = {"first": torch.zeros(3), "second": torch.full((2, 2), torch.nan, dtype=torch.bfloat16)}
    parameters["second"].sequence_parallel = True  # type: ignore[attr-defined]
    if odd and torch.distributed.get_rank() == 1:
        parameters[odd].view(-1)[1] = -0.0
    try:
        check_replicas(parameters.items(), 7)
    except LeaveRun as leave:
        assert leave.status == EXIT_REPLICAS_DIFFER
        return str(leave)
    return ""


@pytest.mark.parametrize(
    ("name", "odd", "named"),
    [
        ("DP2", "", []),
        ("DP2", "first", [0, 1]),  # with two ranks, either may be wrong
        ("CP2", "second", [0, 1]),
        ("TP2", "second", [0, 1]),
        ("TP2", "first", []),  # each rank computes this gradient itself
    ],
)
def test_different_weights_are_named_on_all_ranks(name: str, odd: str, named: list[int], tmp_path: Path) -> None:
    world_size, flags = layout(name)
    messages = set(run_distributed(world_size, compare, tiny_config(tmp_path, **flags), odd))
    assert len(messages) == 1
    message = messages.pop()
    assert message.startswith("step 7: ") == bool(named)
    assert [rank for rank in range(2) if f"rank {rank} on {socket.gethostname()}, first in {odd}" in message] == named


def test_the_majority_is_right() -> None:
    good, bad, worse = {"a": b"1", "b": b"2"}, {"a": b"1", "b": b"3"}, {"a": b"0", "b": b"2"}
    assert odd_ranks({4: good, 5: good, 6: bad, 7: good}) == {6: "b"}
    assert odd_ranks({4: good, 5: bad, 6: worse, 7: good, 8: good}) == {5: "b", 6: "a"}
    assert odd_ranks({4: good, 5: bad, 6: good, 7: bad}) == dict.fromkeys((4, 5, 6, 7), "b")
    assert odd_ranks({4: good, 5: good}) == {}


@pytest.mark.faults
@pytest.mark.parametrize("overlap", [False, True])
def test_a_flipped_bit_ends_the_run_before_it_is_saved(
    overlap: bool, demo_data: Path, tmp_path: Path, fault_row: FaultRow
) -> None:
    flags = {"faults__allow_fault_injection": True, "faults__inject_fault": "flip@4:1"}
    if overlap:
        # The weights are gathered first, which repairs weights that another rank owns.
        flags = {"parallel__overlap_param_gather": True, "parallel__overlap_grad_reduce": True}
    config = tiny_config(
        demo_data,
        **flags,
        checkpoint__save=str(tmp_path),
        checkpoint__save_interval=2,
        faults__check_replicas_interval=2,
        train__train_iters=4,
        log__eval_iters=1,
    )
    assert run_distributed(2, loop.train, config) == [0 if overlap else EXIT_REPLICAS_DIFFER] * 2
    assert (tmp_path / "iter_0000002").is_dir()
    assert (tmp_path / "iter_0000004").is_dir() == overlap
    if not overlap:
        fault_row("flipped bit of a weight", "one replica of 2", f"status {EXIT_REPLICAS_DIFFER}, not saved")
