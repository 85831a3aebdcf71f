"""The benchmarks print every figure; the values depend on the machine."""

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


def run(name: str, *words: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *torchrun, f"tools/benchmarks/{name}.py", *words]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment["OMP_NUM_THREADS"] = "1"
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.long)])
def test_every_method_of_saving_and_loading_is_measured(ranks: int, tmp_path: Path) -> None:
    settings = [f"model.{setting}" for setting in [*TINY, "num_layers=1", "rope_sections=[2,1,1]"]]
    done = run("checkpoint", "--dir", str(tmp_path), "--rounds", "2", "--set", *settings, ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    kinds = ("dp_reshardable", "fully_reshardable")
    methods = (
        *(f"{way}, {kind}" for way in ("dist_checkpointing.save", "ours") for kind in kinds),
        *("ours, dp_reshardable, behind work", "ours, verify full", "ours, verify sizes", "dist_checkpointing.load"),
    )
    for line in (
        *(ROW.format(f"torch.{name}", r"1\.00") for name in ("save, one file a rank, synced", "load, copied into .*")),
        *(ROW.format(method, r"\d+\.\d\d") for method in methods),
        *(STOPPED.format(when) for when in ("to begin, and before the next update", "to complete it")),
        r"^resume \d+\.\d\d s without data: \d+\.\d\d s from the start of the",
    ):
        assert re.search(line, done.stdout, re.M), (line, done.stdout)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_every_layout_has_its_ratio() -> None:
    done = run("parallel", "--packs", "4", "--samples", "1", "--steps", "1", "--rounds", "1", ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("DP2", "DP2 FSDP", "TP2", "PP2", "PP2xVPP2", "CP2 a2a", "CP2 all_gather"):
        assert re.search(rf"^{name} +\d+ ms a step +\d+ tokens/s   ratio \d+\.\d\d$", done.stdout, re.M), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("checkpoint", ["--dir", ".", "--rounds", "1"], "--rounds 1: must be at least 2"),
        ("parallel", [], "start it with torchrun on two processes or more"),
    ],
)
def test_what_cannot_be_measured_is_refused(name: str, flags: list[str], message: str) -> None:
    done = run(name, *flags)
    assert done.returncode == 2 and message in done.stderr
