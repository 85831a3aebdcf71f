"""The checkpoint benchmark measures every method of saving and loading; its figures depend on the machine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
TINY = ["hidden_size=32", "num_attention_heads=4", "ffn_hidden_size=48", "text_hidden_size=24", "vocab_size=64"]
ROW = r"^\| {} \| \d+\.\d+ \| \d+\.\d\d \(\d+\.\d\d to \d+\.\d\d\) \| \d+\.\d\d \| {} \|$"
STOPPED = r"^\| {} \| \d+\.\d+ \(\d+\.\d+ to \d+\.\d+\) \| \d+\.\d% \|$"


def run(*words: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *torchrun, "tools/benchmarks/checkpoint.py", *words]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment["OMP_NUM_THREADS"] = "1"
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.long)])
def test_every_method_is_measured(ranks: int, tmp_path: Path) -> None:
    settings = [f"model.{setting}" for setting in [*TINY, "num_layers=1", "rope_sections=[2,1,1]"]]
    done = run("--dir", str(tmp_path), "--rounds", "2", "--set", *settings, ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    for baseline in ("torch.save, one file a rank, synced", "torch.load, copied into the state"):
        assert re.search(ROW.format(baseline, r"1\.00"), done.stdout, re.M), done.stdout
    for way in ("dist_checkpointing.save", "ours"):
        for kind in ("dp_reshardable", "fully_reshardable"):
            assert re.search(ROW.format(f"{way}, {kind}", r"\d+\.\d\d"), done.stdout, re.M), done.stdout
    for way in (
        "ours, dp_reshardable, behind work",
        "ours, verify full",
        "ours, verify sizes",
        "dist_checkpointing.load",
    ):
        assert re.search(ROW.format(way, r"\d+\.\d\d"), done.stdout, re.M), done.stdout
    for when in ("to begin, and before the next update", "to complete it"):
        assert re.search(STOPPED.format(when), done.stdout, re.M), done.stdout
    assert re.search(r"^resume \d+\.\d\d s without data: \d+\.\d\d s from the start of the", done.stdout, re.M), (
        done.stdout
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_one_round_is_too_few(tmp_path: Path) -> None:
    done = run("--dir", str(tmp_path), "--rounds", "1")
    assert done.returncode == 2 and "--rounds 1: must be at least 2" in done.stderr
