"""The GPU check says so without a GPU, and its parts work; the figures themselves need a CUDA machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from genlip_megatron.checks import check
from genlip_megatron.config import from_dict, load_yaml, override
from genlip_megatron.estimate import check_fits

SCRIPT = Path(__file__).parent.parent.parent / "tools" / "gpu_check.py"
sys.path.insert(0, str(SCRIPT.parent))

import gpu_check  # noqa: E402


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_cuda_it_says_so_and_succeeds() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=True)
    assert "no CUDA device here" in done.stdout


def test_the_large_model_fits_the_smallest_gpu_meant() -> None:
    flags = {name.replace("__", "."): value for name, value in gpu_check.so16_settings(False).items()}
    config = override(from_dict(load_yaml("so16_stage1"), "so16_stage1"), flags)
    check(config, 1)
    check_fits(config, 1, 79 * 2**30, "cuda")  # what a GPU of 80 GB says it has


@pytest.mark.slow
def test_every_part_runs_on_a_cpu(tmp_path: Path) -> None:
    output = tmp_path / "check.json"
    command = [sys.executable, str(SCRIPT), "--rehearse", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(output.read_text())
    assert report["passed"]
    # Float32 on one device twice is the same run; bfloat16 is not.
    assert report["results"]["demo-cpu"]["losses"] == report["results"]["demo-fp32"]["losses"]
    assert report["results"]["demo-cpu"]["losses"] != report["results"]["demo-bf16"]["losses"]
