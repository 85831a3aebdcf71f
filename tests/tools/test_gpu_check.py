"""The GPU check says so without a GPU, and its parts work; the figures themselves need a CUDA machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent.parent.parent / "tools" / "gpu_check.py"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_cuda_it_says_so_and_succeeds() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=True)
    assert "no CUDA device here" in done.stdout


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
