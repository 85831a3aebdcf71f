"""A hanging run shows the stacks of each rank and ends with status 20."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state

from genlip_megatron.config import RunConfig
from genlip_megatron.faults.exits import EXIT_HUNG
from genlip_megatron.faults.watchdog import Watchdog
from genlip_megatron.parallel import groups
from genlip_megatron.testing.distributed import run_distributed
from genlip_megatron.testing.runs import tiny_config
from tests.fault_table import FaultRow

ROOT = Path(__file__).parent.parent.parent


def start(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )


def test_the_watchdog_ignores_a_run_with_beats_and_does_not_delay_its_exit() -> None:
    watchdog = Watchdog(0.5 / 60)
    for _ in range(10):
        time.sleep(0.1)
        watchdog.beat()
    begin = time.monotonic()
    watchdog.close()
    Watchdog(0).close()
    assert time.monotonic() - begin < 0.3


@pytest.mark.faults
@pytest.mark.parametrize(
    ("work", "status", "said"),
    [
        ("time.sleep(60)", EXIT_HUNG, ["no step finished for", "in stuck", "in helper"]),
        # Matching takes years and never releases the GIL.
        ("re.match('(a+)+$', 'a' * 60 + 'b')", -signal.SIGKILL, ["GIL held for", "in stuck", "in helper"]),
    ],
)
def test_stacks_of_all_threads_are_shown(work: str, status: int, said: list[str], fault_row: FaultRow) -> None:
    process = start(f"""
import re, threading, time
from genlip_megatron.faults.watchdog import Watchdog

def helper():
    time.sleep(60)

def stuck():
    {work}

threading.Thread(target=helper, daemon=True).start()
Watchdog.listen()
Watchdog(0.7 / 60, grace=0.1)
time.sleep(0.3)
stuck()
""")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    for text in said:
        assert text in errors
    if status != EXIT_HUNG:
        fault_row("GIL never released", "one process", "stacks shown, process killed")


@pytest.mark.faults
def test_time_while_stopped_does_not_count(fault_row: FaultRow) -> None:
    process = start("""
import time
from genlip_megatron.faults.watchdog import Watchdog

Watchdog.listen()
watchdog = Watchdog(0.5 / 60, grace=0.1)
print("ready", flush=True)
for _ in range(30):
    time.sleep(0.05)
    watchdog.beat()
watchdog.close()
""")
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGSTOP)
    time.sleep(1.5)
    process.send_signal(signal.SIGCONT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    fault_row("SIGSTOP", "a process, longer than the limit, then SIGCONT", "continues")


def test_the_minder_does_not_outlive_the_process() -> None:
    process = start("""
import subprocess, sys, time
from genlip_megatron.faults.minder import Minder

print(Minder(60, 1)._process.pid, flush=True)
time.sleep(60)
""")
    assert process.stdout is not None
    minder = int(process.stdout.readline())
    process.kill()
    process.communicate(timeout=60)
    end = time.monotonic() + 10
    while Path(f"/proc/{minder}/stat").exists() and time.monotonic() < end:
        time.sleep(0.02)
    assert not Path(f"/proc/{minder}/stat").exists()


def test_sigusr2_shows_the_stacks_at_any_time() -> None:
    process = start("""
import time
from genlip_megatron.faults.watchdog import Watchdog
Watchdog.listen()
print("ready", flush=True)
time.sleep(1.5)
""")
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR2)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "most recent call first" in errors


def timeouts(config: RunConfig) -> list[float]:
    """Timeouts in seconds of a tensor-parallel and of a data-parallel group."""

    groups.initialize(config)
    found = (parallel_state.get_tensor_model_parallel_group(), parallel_state.get_data_parallel_group())
    return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in found]


@pytest.mark.parametrize(("minutes", "seconds"), [(60.0, 70 * 60), (0.0, 24 * 3600)])
def test_collectives_outlast_the_watchdog(minutes: float, seconds: float, demo_data: Path) -> None:
    """A pause that step_timeout allows must not exceed a process group's own timeout."""
    assert run_distributed(2, timeouts, tiny_config(demo_data, faults__step_timeout=minutes)) == [[seconds] * 2] * 2
