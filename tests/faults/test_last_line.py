"""Under torchrun, whose traceback comes last, the reason for a run's end is still the last line."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from genlip_megatron.testing import CHECKOUT


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--hiden-size", "64"), "unknown flag --hiden-size. Did you mean '--hidden-size'"),
        (
            ("--tokenizer", "/nowhere.model", "--train-data", "x"),
            "data.tokenizer = '/nowhere.model': no such file. Give a",
        ),
    ],
)
def test_a_users_error_is_the_last_line(words: tuple[str, ...], reason: str) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, "pretrain_genlip.py", "--config", "demo", *words],
        cwd=CHECKOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    lines = done.stderr.splitlines()
    assert done.returncode == 1 and "ChildFailedError" in done.stderr, done.stderr
    assert lines[-1].startswith(f"ended: {reason}"), lines[-5:]
    assert sum(line.startswith("ended: ") for line in lines) == 1
