"""Validation only (--eval-only), and the start of stage 2 from stage 1's weights (--finetune)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from genlip_megatron.config import RunConfig
from genlip_megatron.testing.distributed import run_distributed
from genlip_megatron.testing.runs import full_weights, run_steps, tiny_config
from genlip_megatron.train.setup import set_up
from genlip_megatron.train.validation import evaluate


@pytest.fixture(scope="module")
def trained(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """(folder with the checkpoint of two steps on one process, their results)."""
    folder = str(tmp_path_factory.mktemp("trained"))
    return folder, run_distributed(1, run_steps, tiny_config(demo_data, checkpoint__save=folder), 2)[0]


def evaluated(config: RunConfig) -> float:
    """The validation loss of an eval-only run."""
    run = set_up(config)
    assert run.train_loader is None
    return evaluate(run)


def test_eval_only_gives_the_validation_loss_of_the_run_on_another_layout(
    trained: tuple[str, dict[str, Any]], demo_data: Path
) -> None:
    folder, before = trained
    flags = {"log__eval_only": True, "data__train_data": [], "parallel__tensor_model_parallel_size": 2}
    config = tiny_config(demo_data, checkpoint__load=folder, **flags)
    # Sums run in another order; the measured relative difference was 2e-7.
    for loss in run_distributed(2, evaluated, config):
        assert abs(loss / before["validation"] - 1) < 1e-5


def started(config: RunConfig) -> dict[str, Any]:
    """The state in which a run starts."""
    run = set_up(config)
    assert run.train_loader is not None
    batch = next(iter(run.train_loader))
    run.train_loader.close()
    return {
        "weights": full_weights(run),
        "iteration": run.iteration,
        "step": run.train_loader.step,
        "lr": run.optimizer.param_groups[0]["lr"],
        "next": batch.keys,
    }


def test_finetune_takes_the_weights_and_nothing_else(trained: tuple[str, dict[str, Any]], demo_data: Path) -> None:
    folder, stage1 = trained
    fresh = run_distributed(1, started, tiny_config(demo_data))[0]
    stage2 = run_distributed(1, started, tiny_config(demo_data, checkpoint__load=folder, checkpoint__finetune=True))[0]
    for name, weight in stage1["weights"].items():
        assert torch.equal(stage2["weights"][name], weight), name
    for name in ("iteration", "step", "lr", "next"):
        assert stage2[name] == fresh[name], name


def test_a_run_continues_with_another_global_batch_size(trained: tuple[str, dict[str, Any]], demo_data: Path) -> None:
    folder, first = trained
    changed = tiny_config(
        demo_data, checkpoint__load=folder, train__global_batch_size=2, data__change_lanes=True, data__num_workers=1
    )
    steps = run_distributed(2, run_steps, changed, 4)
    assert {result["data_parallel"] for result in steps} == {0, 1} and len(steps[0]["losses"]) == 2
    seen = [key for keys in first["keys"] for key in keys]
    later = [key for result in steps for keys in result["keys"] for key in keys]
    assert len(set(seen + later)) == len(seen + later), "a sample came twice in an epoch"
    same = tiny_config(demo_data, checkpoint__load=folder)
    for config, world_size in ((changed, 2), (same, 1)):
        begun = run_distributed(world_size, started, config)[0]
        # The learning rate after two of two warmup steps does not depend on the batch size.
        assert begun["iteration"] == 2 and begun["lr"] == config.train.lr
