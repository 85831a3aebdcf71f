"""What ``examples/launch.sh`` sets for torchrun gives workers the time to save."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from genlip_megatron.testing import CHECKOUT
from tests.fault_table import FaultRow
from tests.launch.lab import wait_for

WORKER = """
import pathlib, signal, sys, time

def save(number, frame):
    time.sleep(float(sys.argv[2]))
    pathlib.Path(sys.argv[1], "saved").touch()
    sys.exit(17)

signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGUSR1, save)
pathlib.Path(sys.argv[1], "runs").touch()
time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "seconds"), [(signal.SIGUSR1, 1), pytest.param(signal.SIGTERM, 35, marks=pytest.mark.long)]
)
def test_a_stop_signal_at_torchrun_waits_for_the_save(
    number: signal.Signals, seconds: int, tmp_path: Path, fault_row: FaultRow
) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    launch = f"source examples/launch.sh; exec torchrun --standalone {tmp_path}/worker.py {tmp_path} {seconds}"
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    torchrun = subprocess.Popen(["bash", "-c", launch], cwd=CHECKOUT, env=environment, stderr=subprocess.DEVNULL)
    try:
        wait_for("the worker runs", (tmp_path / "runs").exists, 120)
        began = time.monotonic()
        torchrun.send_signal(number)
        assert torchrun.wait(seconds + 60) == 1 and time.monotonic() - began >= seconds
    finally:
        torchrun.kill()
    assert (tmp_path / "saved").exists()
    fault_row(f"{number.name} at torchrun", f"a worker needs {seconds} s to save", "saved")
