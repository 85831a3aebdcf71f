"""The GPU check reports a missing GPU, and its parts work; the figures need a CUDA machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from genlip_megatron.config.checks import check
from genlip_megatron.estimate import check_fits
from genlip_megatron.model import te_support
from tools import gpu_check

SCRIPT = Path(gpu_check.__file__)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_cuda_it_reports_this_and_succeeds() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=True)
    assert "no CUDA device here" in done.stdout


def test_the_largest_model_fits_on_80_gb() -> None:
    config = gpu_check.configuration("so16_stage1", Path(), gpu_check.so16_settings(False))
    check(config, 1)
    check_fits(config, 1, 79 * 2**30, "cuda")  # what a GPU of 80 GB reports


@pytest.mark.parametrize(("factor", "holds"), [(1.009, True), (0.98, False), (float("nan"), False)])
def test_fp8_is_compared_by_the_mean_loss_of_the_last_steps(factor: float, holds: bool) -> None:
    reference = [9.0] * 450 + [2.0, 4.0] * 25
    results = {"loss-bf16": {"losses": reference}, "loss-fp8": {"losses": [1.0] * 450 + [3.0 * factor] * 50}}
    ((what, measured, judged),) = gpu_check.judge(results)
    assert (what, judged) == ("loss-fp8 loss against BF16", holds)
    assert "in the mean of the last 50 steps, allowed 1e-02" in measured


def test_every_loss_curve_is_compared_with_its_reference() -> None:
    curves: dict[str, dict[str, Any]] = {
        **{name: {"losses": [2.0, 1.0]} for name in (*gpu_check.VARIANTS, "demo-cpu", "demo-fp32")},
        **{name: {"losses": [3.0, 2.0]} for name in gpu_check.FIXED_IMAGES},
    }
    rows = gpu_check.judge(curves)
    assert len(rows) == len(gpu_check.VARIANTS) + 2 and all(holds for *_, holds in rows)
    for name in (*gpu_check.VARIANTS, "demo-fp32", "demo-fp8-attention"):
        worse = {**curves, name: {"losses": [2.0, 5.0]}}
        against = "BF16" if name == "demo-fp8-attention" else "the CPU"
        assert [what for what, _, holds in gpu_check.judge(worse) if not holds] == [f"{name} loss against {against}"]
    rows = gpu_check.judge({**curves, "demo-fp8": {"skipped": "no FP8"}, "demo-te": {"error": "broken"}})
    assert ("demo-fp8", "skipped: no FP8", True) in rows and ("demo-te", "broken", False) in rows


@pytest.mark.parametrize("name", [*gpu_check.VARIANTS, *gpu_check.FIXED_IMAGES, *gpu_check.LOSS_PARTS])
def test_settings_of_every_variant_are_valid(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {**gpu_check.VARIANTS, **gpu_check.FIXED_IMAGES, **gpu_check.LOSS_PARTS}[name]
    config = gpu_check.configuration("so16_stage1" if name in gpu_check.LOSS_PARTS else "demo", tmp_path, settings)
    check(config, 1)
    monkeypatch.setattr(te_support, "why_no_engine", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for gpu, able in ((te_support.Gpu((8, 0), 91300), False), (te_support.Gpu((9, 0), 91300), True)):
        monkeypatch.setattr(te_support.Gpu, "here", lambda gpu=gpu: gpu)
        assert bool(gpu_check.why_skipped(config)) is ("fp8" in name and not able)


@pytest.mark.long
def test_losses_in_fp8_and_bf16_rehearse(tmp_path: Path) -> None:
    output = tmp_path / "check.json"
    command = [sys.executable, str(SCRIPT), "--fp8-loss", "--rehearse", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(output.read_text())["results"]
    assert set(results) == {"loss-bf16", "loss-fp8"} and len(results["loss-bf16"]["losses"]) == 4
    assert torch.cuda.is_available() or results["loss-fp8"]["skipped"]


@pytest.mark.long
def test_every_part_runs_on_a_cpu(tmp_path: Path) -> None:
    output = tmp_path / "check.json"
    command = [sys.executable, str(SCRIPT), "--rehearse", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(output.read_text())
    assert report["passed"]
    # Two float32 runs on one device are equal; a bfloat16 run differs.
    assert report["results"]["demo-cpu"]["losses"] == report["results"]["demo-fp32"]["losses"]
    assert report["results"]["demo-cpu"]["losses"] != report["results"]["demo-bf16"]["losses"]
