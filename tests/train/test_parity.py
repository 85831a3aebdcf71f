"""The same run on every layout. ``tools/parity_matrix.py`` (``make parity``) runs all layouts. These tests run the
essential ones, and check that the comparison finds planted faults."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from genlip_megatron.testing.distributed import run_distributed
from genlip_megatron.testing.parity import BFLOAT16, EXACT, FLOAT32, parity_config, parity_run, problems
from genlip_megatron.testing.planted import FAULTS
from genlip_megatron.testing.runs import layout

STEPS = 4
SOON = 2  # steps in which a planted fault must be found
ALL_GATHER = {"parallel__cp_comm_type": "all_gather"}

FSDP = {"parallel__fsdp": True}
SELECTIVE = {
    "parallel__recompute": "selective",
    "parallel__recompute_modules": ["core_attn", "layernorm", "mlp_act", "output_gate"],
}
OVERLAP = {"parallel__overlap_grad_reduce": True, "parallel__overlap_param_gather": True}

# Fewest processes first, so each process starts only once.
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("DP2", {}, {}),
    ("TP2", {}, {}),
    ("TP2", {}, {"parallel__recompute": "selective", "parallel__recompute_modules": "core_attn,mlp"}),
    ("TP2", {}, SELECTIVE),
    ("TP2", {"stage": "stage 1"}, {"parallel__sequence_parallel": False}),
    ("PP2xVPP2", {}, {"parallel__recompute": "full"}),
    ("CP2", {}, {}),
    ("CP2", {"stage": "stage 1"}, ALL_GATHER),
    ("TP2xPP2", {}, {"parallel__num_layers_in_first_pipeline_stage": 3, **SELECTIVE}),
    ("TP2xCP2", {"drop_path": 0.0}, {}),
    ("CP2xDP2", {}, OVERLAP),
    ("PP2xVPP2xDP2", {}, OVERLAP),
    ("PP4", {"stage": "stage 1"}, {}),
    ("CP4", {}, ALL_GATHER),
    ("TP2xDP2", {}, {**FSDP, **SELECTIVE}),
    ("CP2xDP2", {}, {**FSDP, "parallel__recompute": "full"}),
    ("CP2xDP2", {}, {**OVERLAP, **SELECTIVE}),
    ("TP2xPP2xCP2", {}, {}),
    ("TP2xPP2xDP2", {"stage": "stage 1"}, {}),
]


@functools.cache
def reference(data: Path, steps: int = STEPS, **case: Any) -> dict[str, Any]:
    """A case's run on one process."""
    return run_distributed(1, parity_run, parity_config(data, **case), steps)[0]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "case", "flags"), CASES, ids=lambda value: str(value) if value else "")
def test_same_run_on_every_layout(name: str, case: dict[str, Any], flags: dict[str, Any], demo_data: Path) -> None:
    world_size, sizes = layout(name)
    results = run_distributed(world_size, parity_run, parity_config(demo_data, **case, **sizes, **flags), STEPS)
    # A layout with only pipeline parallelism changes no sum.
    tolerance = EXACT if set(name) <= set("PVx0123456789") else FLOAT32
    assert problems(results, reference(demo_data, **case), tolerance) == []


@pytest.mark.slow
@pytest.mark.parametrize(("name", "flags"), [("TP2", {}), ("CP2", {}), ("PP2", {}), ("DP2", FSDP)])
def test_same_run_in_bfloat16(name: str, flags: dict[str, Any], demo_data: Path) -> None:
    world_size, sizes = layout(name)
    half: dict[str, Any] = {"train__precision": "bf16"}
    results = run_distributed(world_size, parity_run, parity_config(demo_data, **half, **sizes, **flags), STEPS)
    assert problems(results, reference(demo_data, **half), BFLOAT16) == []


@pytest.mark.parametrize("modules", ["layernorm", "mlp_act", "output_gate", "layernorm,mlp,output_gate"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.slow
def test_recomputation_changes_no_bit(modules: str, precision: str, demo_data: Path) -> None:
    recomputed = {"parallel__recompute": "selective", "parallel__recompute_modules": modules}
    case = {"train__precision": precision}
    results = run_distributed(1, parity_run, parity_config(demo_data, **case, **recomputed), SOON)
    assert problems(results, reference(demo_data, SOON, **case), EXACT) == []


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str, demo_data: Path) -> None:
    name, flags, _, sign = FAULTS[fault]
    world_size, sizes = layout(name)
    results = run_distributed(world_size, parity_run, parity_config(demo_data, **sizes, **flags), SOON, fault)
    assert sign in "; ".join(problems(results, reference(demo_data, SOON)))


@pytest.mark.parametrize("fault", ["norm's gradient not summed", "DropPath drawn per rank"])
def test_a_planted_fault_is_found_in_bfloat16(fault: str, demo_data: Path) -> None:
    half: dict[str, Any] = {"train__precision": "bf16"}
    world_size, sizes = layout(FAULTS[fault][0])
    results = run_distributed(world_size, parity_run, parity_config(demo_data, **half, **sizes), SOON, fault)
    assert "gradient differs" in "; ".join(problems(results, reference(demo_data, SOON, **half), BFLOAT16))


@pytest.mark.slow
def test_a_checkpoint_loads_on_each_layout(demo_data: Path, tmp_path: Path) -> None:
    """Each layout continues from the checkpoint of the previous one, on the curve of one process."""
    folder = str(tmp_path / "relay")
    whole = reference(demo_data)
    losses: list[float] = []
    for step, (name, flags) in enumerate([("PP2xVPP2", {}), ("CP2", OVERLAP), ("TP2", {}), ("1", {})], start=1):
        world_size, sizes = layout(name)
        config = parity_config(demo_data, **sizes, **flags, checkpoint__save=folder, checkpoint__load=folder)
        results = run_distributed(world_size, parity_run, config, step)
        losses += results[0]["losses"]
    # As between layouts without a checkpoint; the largest measured difference was 1e-7.
    assert losses == pytest.approx(whole["losses"], rel=1e-6)


def test_weights_saved_under_overlap_are_those_after_the_last_step(demo_data: Path, tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    saving = parity_config(demo_data, **OVERLAP, checkpoint__save=folder)
    run_distributed(2, parity_run, saving, 2)
    trained = run_distributed(2, parity_run, parity_config(demo_data), 2)[0]
    taken = parity_config(demo_data, checkpoint__load=folder, checkpoint__finetune=True)
    started = run_distributed(1, parity_run, taken, 1)[0]
    for name, weight in trained["weights"].items():
        # The same sums in the same order; a step moves a weight by 1e-3.
        torch.testing.assert_close(started["initial"][name], weight, atol=1e-7, rtol=1e-6, msg=name)
