"""After any kind of stop request a run saves after the step in flight and exits with status 17."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from genlip_megatron.checkpoint.paths import pointed
from genlip_megatron.config import RunConfig
from genlip_megatron.faults import exits
from genlip_megatron.faults.exits import EXIT_PREEMPTED
from genlip_megatron.faults.stop import StopRequest
from genlip_megatron.testing.distributed import run_distributed
from genlip_megatron.testing.processes import Zygote
from genlip_megatron.testing.runs import tiny_config
from genlip_megatron.train import loop
from tests.fault_table import FaultRow
from tests.reliability.training import Training


def config(demo_data: Path, folder: Path, **flags: Any) -> RunConfig:
    return tiny_config(
        demo_data,
        **{"checkpoint__save": str(folder), "log__eval_iters": 1, "faults__allow_fault_injection": True} | flags,
    )


@pytest.mark.faults
@pytest.mark.parametrize("flags", [{"faults__inject_fault": "term@2:1"}, {"faults__inject_fault": "usr1@2:0"}])
def test_a_signal_on_one_rank_stops_all(
    flags: dict[str, Any], demo_data: Path, tmp_path: Path, fault_row: FaultRow
) -> None:
    assert run_distributed(2, loop.train, config(demo_data, tmp_path, **flags)) == [EXIT_PREEMPTED] * 2
    assert [path.name for path in tmp_path.glob("iter_*")] == ["iter_0000002"]
    name = {"term": "SIGTERM", "usr1": "SIGUSR1"}[flags["faults__inject_fault"].partition("@")[0]]
    fault_row(name, "one rank of 2", f"all save, status {EXIT_PREEMPTED}")


def train_until(config: RunConfig, how: str) -> int:
    """Train without end; in the second step the stop file appears or the time limit is reached."""
    step = loop.train_step

    def told(run: Any, batches: Any, stop: Any) -> Any:
        if run.iteration == 1 and how == "file":
            Path(config.stop_file).touch()
        if run.iteration == 1 and how == "time":
            stop._deadline = 0.0
        return step(run, batches, stop)

    with mock.patch.object(loop, "train_step", told):
        return loop.train(config)


@pytest.mark.faults
@pytest.mark.parametrize("how", ["file", "time"])
def test_a_stop_request_during_training(how: str, demo_data: Path, tmp_path: Path, fault_row: FaultRow) -> None:
    settings = config(demo_data, tmp_path, train__train_iters=100_000, log__eval_interval=0)
    assert run_distributed(2, train_until, settings, how) == [EXIT_PREEMPTED] * 2
    (saved,) = tmp_path.glob("iter_*")
    assert saved.name >= "iter_0000002"
    assert (tmp_path / "stop.obeyed").exists() == (how == "file") and not (tmp_path / "stop").exists()
    fault = {"file": "stop file", "time": "exit_duration_in_mins over"}[how]
    fault_row(fault, "while training, 2 ranks", f"all save, status {EXIT_PREEMPTED}")


@pytest.mark.faults
@pytest.mark.parametrize("flags", [{}, {"train__exit_duration_in_mins": 1e-6}])
def test_a_request_before_the_first_step_ends_the_run_without_one(
    flags: dict[str, Any], demo_data: Path, tmp_path: Path, fault_row: FaultRow
) -> None:
    if not flags:
        (tmp_path / "stop").touch()
    assert run_distributed(2, loop.train, config(demo_data, tmp_path, **flags)) == [EXIT_PREEMPTED] * 2
    assert not list(tmp_path.glob("iter_*"))
    assert (tmp_path / "stop.obeyed").exists() != bool(flags)
    fault = "exit_duration_in_mins over" if flags else "stop file"
    fault_row(fault, "before the first step, 2 ranks", f"nothing trained, status {EXIT_PREEMPTED}")


def test_the_time_limit_counts_from_the_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A restart of workers by torchrun does not reset the clock."""
    ages = {os.getpid(): 5.0, os.getppid(): 600.0}
    monkeypatch.setattr(exits, "age", ages.get)
    for launched, over in ((False, 0), (True, 1)):
        if launched:
            monkeypatch.setenv("TORCHELASTIC_RUN_ID", "launch")
        with contextlib.closing(StopRequest(minutes=5)) as stop:
            assert stop.votes() == [0, 0, over]


@pytest.mark.parametrize("flags", [{}, {"faults__inject_fault": "term@2:0"}])
@pytest.mark.slow
def test_each_multiple_of_exit_interval_ends_the_run(flags: dict[str, Any], demo_data: Path, tmp_path: Path) -> None:
    for step in (2, 4):
        assert run_distributed(2, loop.train, config(demo_data, tmp_path, train__exit_interval=2, **flags)) == [0, 0]
        assert pointed(tmp_path) == step


def test_signal_handlers_are_restored() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with contextlib.closing(StopRequest()) as stop:
        assert stop.votes() == [0, 0, 0]
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # as from a launcher and a scheduler at once
        time.sleep(0.05)
        assert stop.votes() == [1, 0, 0]
    assert signal.getsignal(signal.SIGTERM) == before and signal.set_wakeup_fd(-1) == -1


def test_one_process_per_machine_looks_for_the_stop_file_once_a_second(tmp_path: Path, monkeypatch: Any) -> None:
    file = tmp_path / "halt"
    monkeypatch.setenv("LOCAL_RANK", "1")
    other = StopRequest(str(file))
    monkeypatch.setenv("LOCAL_RANK", "0")
    with contextlib.closing(other), contextlib.closing(StopRequest(str(file))) as stop:
        assert stop.votes() == [0, 0, 0]
        file.touch()
        assert stop.votes() == [0, 0, 0]
        time.sleep(1.05)
        assert stop.votes() == [0, 1, 0] and other.votes() == [0, 0, 0]
        other.obey()
        assert file.exists()
        stop.obey()
        assert not file.exists() and (tmp_path / "halt.obeyed").exists()


def stuck_in_c(listen: str) -> subprocess.Popen[str]:
    """A process that spends minutes in C without the GIL, where Python handles no signals; after ``listen``."""
    code = (
        "import hashlib; from genlip_megatron.faults import stop\n"
        f"{listen}; print('ready', flush=True); hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", code], text=True, **pipes)  # type: ignore[call-overload]
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.faults
@pytest.mark.parametrize(("first", "second"), [("SIGTERM", "SIGUSR1"), ("SIGINT", "SIGINT")])
def test_a_second_signal_ends_a_process_that_is_stuck_in_c(first: str, second: str, fault_row: FaultRow) -> None:
    process = stuck_in_c("stop.StopRequest()")
    try:
        process.send_signal(getattr(signal, first))
        assert process.stderr is not None and f"stop requested by {first}" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)  # signals within a second are the same request
        time.sleep(1.3)
        assert process.poll() is None
        process.send_signal(getattr(signal, second))
        _, errors = process.communicate(timeout=3)
        assert process.returncode == 128 + getattr(signal, second)
        assert errors == ""
    finally:
        process.kill()
    fault_row("second signal", "stuck in C with the GIL", "process ended at once")


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_before_training_the_first_signal_ends_a_process_that_is_stuck_in_c(
    number: signal.Signals, fault_row: FaultRow
) -> None:
    """For example during the rendezvous, when it waits for other processes."""
    process = stuck_in_c("stop.leave_on_signal('')")
    try:
        process.send_signal(number)
        _, errors = process.communicate(timeout=3)
        assert process.returncode == EXIT_PREEMPTED
        assert errors == f"stop requested by {number.name} outside of training: leaving at once\n"
    finally:
        process.kill()
    fault_row(number.name, "before training, stuck in C", f"nothing trained, status {EXIT_PREEMPTED}")


@pytest.mark.faults
@pytest.mark.slow
def test_ctrl_c_in_a_terminal_saves(zygote: Zygote, demo_data: Path, tmp_path: Path, fault_row: FaultRow) -> None:
    """The terminal sends SIGINT to the foreground process group: the run and its child processes."""
    training = Training(zygote, demo_data, tmp_path)
    job = training.start(train__train_iters=100_000)
    job.wait_for(" 2/100000")
    os.killpg(job.pids[0], signal.SIGINT)
    (ended,) = job.wait()
    assert ended.code == EXIT_PREEMPTED and "Traceback" not in ended.output, ended.output[-2000:]
    (steps,) = {step for _, step in training.history()} & {pointed(training.run)}
    assert f"leaving after step {steps}" in ended.output
    fault_row("SIGINT", "the process group, as by Ctrl-C", f"saved, status {EXIT_PREEMPTED}")
