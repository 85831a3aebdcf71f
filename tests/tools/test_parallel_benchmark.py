"""The benchmark runs all layouts on the same work; its figures depend on the machine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_every_layout_has_its_ratio() -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    flags = ["--packs", "4", "--samples", "1", "--steps", "1", "--rounds", "1"]
    done = subprocess.run(
        [*torchrun, "tools/benchmarks/parallel.py", *flags],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("DP2", "DP2 FSDP", "TP2", "PP2", "PP2xVPP2", "CP2 a2a", "CP2 all_gather"):
        assert re.search(rf"^{name} +\d+ ms a step +\d+ tokens/s   ratio \d+\.\d\d$", done.stdout, re.M), name


@pytest.mark.slow
def test_one_process_gets_a_hint() -> None:
    script = [sys.executable, "tools/benchmarks/parallel.py"]
    alone = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"}
    done = subprocess.run(script, cwd=ROOT, env=alone, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "start it with torchrun on two processes or more" in done.stderr
