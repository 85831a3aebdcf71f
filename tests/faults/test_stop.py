"""A run that is told to stop, however it is told, saves after the step in flight and says so by its status."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from genlip_megatron.config import CheckpointConfig, FaultsConfig, RunConfig
from genlip_megatron.faults.exits import EXIT_PREEMPTED
from genlip_megatron.faults.stop import StopRequest
from tests.distributed import run_distributed
from tests.runs import tiny_config


def train(config: RunConfig) -> int:
    from genlip_megatron.train.loop import train

    return train(config)


def config(demo_data: Path, folder: Path, **flags: Any) -> RunConfig:
    return tiny_config(
        demo_data,
        **{"checkpoint__save": str(folder), "log__eval_iters": 1, "faults__allow_fault_injection": True} | flags,
    )


@pytest.mark.parametrize("flags", [{"faults__inject_fault": "term@2:1"}, {"faults__inject_fault": "usr1@2:0"}])
def test_a_signal_on_one_rank_stops_all(flags: dict[str, Any], demo_data: Path, tmp_path: Path) -> None:
    assert run_distributed(2, train, config(demo_data, tmp_path, **flags)) == [EXIT_PREEMPTED] * 2
    assert [path.name for path in tmp_path.glob("iter_*")] == ["iter_0000002"]


def test_the_stop_file_stops_the_run_and_is_marked_as_obeyed(demo_data: Path, tmp_path: Path) -> None:
    (tmp_path / "stop").touch()
    assert run_distributed(2, train, config(demo_data, tmp_path)) == [EXIT_PREEMPTED] * 2
    assert (tmp_path / "iter_0000001").is_dir() and not (tmp_path / "stop").exists()
    assert (tmp_path / "stop.obeyed").exists()


@pytest.mark.parametrize(
    ("flags", "status"),
    [
        ({"train__exit_duration_in_mins": 1e-6}, EXIT_PREEMPTED),
        ({"train__exit_interval": 1}, 0),
        ({"train__exit_interval": 1, "faults__inject_fault": "term@1:0"}, 0),
    ],
)
def test_the_ends_that_settings_give(flags: dict[str, Any], status: int, demo_data: Path, tmp_path: Path) -> None:
    assert run_distributed(2, train, config(demo_data, tmp_path, **flags)) == [status] * 2
    assert (tmp_path / "iter_0000001").is_dir()


def test_signals_are_given_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    stop = StopRequest(RunConfig(checkpoint=CheckpointConfig(save=str(tmp_path))))
    try:
        assert stop.votes() == [0, 0, 0]
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # as from a launcher and a scheduler at once
        time.sleep(0.05)
        assert stop.votes() == [1, 0, 0]
    finally:
        stop.close()
    assert signal.getsignal(signal.SIGTERM) == before and signal.set_wakeup_fd(-1) == -1


def test_the_file_is_looked_for_once_a_second_by_one_process_a_machine(tmp_path: Path, monkeypatch: Any) -> None:
    file = tmp_path / "halt"
    options = RunConfig(faults=FaultsConfig(stop_file=str(file)))
    monkeypatch.setenv("LOCAL_RANK", "1")
    other = StopRequest(options)
    monkeypatch.setenv("LOCAL_RANK", "0")
    stop = StopRequest(options)
    try:
        assert stop.votes() == [0, 0, 0]
        file.touch()
        assert stop.votes() == [0, 0, 0]
        time.sleep(1.05)
        assert stop.votes() == [0, 1, 0] and other.votes() == [0, 0, 0]
        other.obey()
        assert file.exists()
        stop.obey()
        assert not file.exists() and (tmp_path / "halt.obeyed").exists()
    finally:
        stop.close()
        other.close()


def test_a_second_signal_ends_a_process_that_is_stuck_in_c() -> None:
    code = (
        "import hashlib; from genlip_megatron.config import RunConfig\n"
        "from genlip_megatron.faults.stop import StopRequest; StopRequest(RunConfig()); print('ready', flush=True)\n"
        "hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)"  # minutes in C, deaf to signals, without the lock
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGTERM)
        time.sleep(1.3)
        assert process.poll() is None
        process.send_signal(signal.SIGUSR1)
        assert process.wait(3) == 128 + signal.SIGUSR1
    finally:
        process.kill()
