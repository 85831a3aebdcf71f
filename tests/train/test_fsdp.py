"""FSDP changes memory, not the results; ``test_parity.py`` compares it with other layouts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from genlip_megatron.config import RunConfig
from genlip_megatron.config.checks import check
from genlip_megatron.testing.distributed import run_distributed
from genlip_megatron.testing.runs import run_steps, tiny_config, weights

STEPS = 4
LAYOUTS = {"DP2": (2, {}), "TP2xDP2": (4, {"parallel__tensor_model_parallel_size": 2})}
FSDP = {"parallel__fsdp": True}


@pytest.fixture(scope="module")
def whole(demo_data: Path) -> Callable[[str, str], list[dict[str, Any]]]:
    """An uninterrupted run on a layout in a precision."""

    @functools.cache
    def run(name: str, precision: str) -> list[dict[str, Any]]:
        world_size, config = laid_out(name, precision, demo_data)
        return run_distributed(world_size, run_steps, config, STEPS)

    return run


def laid_out(name: str, precision: str, data: Path, **more: Any) -> tuple[int, RunConfig]:
    """(processes, settings) of a layout such as "one", "TP2xDP2" or "fsdp DP2"."""
    world_size, flags = LAYOUTS.get(name.removeprefix("fsdp "), (1, {}))
    flags = flags | (FSDP if name.startswith("fsdp") else {}) | {"train__precision": precision}
    return world_size, tiny_config(data, **flags, **more)


def held_values(config: RunConfig) -> tuple[int, int]:
    """(numbers of values in weights, gradients and optimizer state of this rank after a step; number of parameters)."""
    from genlip_megatron.train.setup import set_up
    from genlip_megatron.train.step import train_step

    run = set_up(config)
    assert run.train_loader is not None
    train_step(run, iter(run.train_loader))
    run.train_loader.close()
    parameters = list(run.model[0].parameters())
    tensors = [*parameters, *(p.grad for p in parameters)]
    tensors += [tensor for state in run.optimizer.state.values() for tensor in state.values()]
    storages = {s.data_ptr(): s.nbytes() // 4 for s in (tensor.to_local().untyped_storage() for tensor in tensors)}
    return sum(storages.values()), sum(p.numel() for p in parameters)


def test_a_rank_holds_only_its_shard(demo_data: Path) -> None:
    for held, parameters in run_distributed(2, held_values, tiny_config(demo_data, **FSDP)):
        assert held < 0.55 * 4 * parameters


@pytest.mark.slow
@pytest.mark.parametrize(
    ("saving", "loading", "precision"),
    [
        ("fsdp DP2", "one", "bf16"),
        ("one", "fsdp DP2", "fp32"),
        ("fsdp TP2xDP2", "fsdp DP2", "fp32"),
        ("fsdp DP2", "TP2xDP2", "fp32"),
    ],
)
def test_checkpoints_do_not_depend_on_fsdp(
    saving: str, loading: str, precision: str, whole: Callable, demo_data: Path, tmp_path: Path
) -> None:
    folder = str(tmp_path / "run")
    world_size, first = laid_out(saving, precision, demo_data, checkpoint__save=folder)
    run_distributed(world_size, run_steps, first, STEPS // 2)
    world_size, second = laid_out(loading, precision, demo_data, checkpoint__load=folder)
    continued = run_distributed(world_size, run_steps, second, STEPS)[0]["losses"]
    assert continued == pytest.approx(whole(saving, precision)[0]["losses"][STEPS // 2 :], rel=1e-5)


@pytest.mark.slow
def test_resume_is_bit_for_bit(whole: Callable, demo_data: Path, tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    undisturbed = whole("fsdp DP2", "fp32")
    config = tiny_config(demo_data, **FSDP, checkpoint__save=folder, checkpoint__load=folder)
    first = run_distributed(2, run_steps, config, STEPS // 2)
    second = run_distributed(2, run_steps, config, STEPS)
    assert first[0]["losses"] + second[0]["losses"] == undisturbed[0]["losses"]
    expected = weights(undisturbed)
    for name, weight in weights(second).items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"parallel__pipeline_model_parallel_size": 2},
            "parallel.fsdp = true, parallel.pipeline_model_parallel_size = 2: every micro-batch",
        ),
        (
            {"parallel__overlap_grad_reduce": True},
            "parallel.fsdp = true, parallel.overlap_grad_reduce = true: FSDP always overlaps",
        ),
    ],
)
def test_incompatible_settings_are_refused(flags: dict[str, Any], message: str, demo_data: Path) -> None:
    with pytest.raises(ValueError, match=message):
        check(tiny_config(demo_data, **flags, **FSDP))
