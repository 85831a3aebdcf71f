"""Under ``torchrun --max-restarts`` a run recovers from a crash, and a run with a final exit code is not restarted."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from genlip_megatron.checkpoint import paths as checkpoints
from genlip_megatron.config import RunConfig
from genlip_megatron.faults import exits
from genlip_megatron.testing.distributed import run_distributed
from genlip_megatron.testing.runs import full_weights, tiny_config
from tests.fault_table import FaultRow
from tests.train.steps import take_steps

ROOT = Path(__file__).parent.parent.parent


class Launch:
    """``torchrun --max-restarts pretrain_genlip.py`` on two processes, with its output in a file."""

    def __init__(self, config: RunConfig, folder: Path, shared_store: bool, restarts: int) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "config.yaml").write_text(config.to_yaml())
        self.file = folder / "output.txt"
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts",
            str(restarts), "pretrain_genlip.py", "--config", str(folder / "config.yaml"),
        ]  # fmt: skip
        own_store = {} if shared_store else {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **own_store}
        with open(self.file, "w") as output:
            self.torchrun = psutil.Popen(
                command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, text=True
            )

    @property
    def output(self) -> str:
        return self.file.read_text()

    def wait_for(self, what: str, happened: Callable[[], Any], seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while not happened():
            if time.monotonic() > end or self.torchrun.poll() is not None:
                raise AssertionError(f"{what} did not happen:\n{self.output[-4000:]}")
            time.sleep(0.02)

    def wait_for_text(self, text: str) -> None:
        self.wait_for(repr(text), lambda: text in self.output)

    def wait_for_step(self, step: int) -> None:
        self.wait_for(f"step {step}", lambda: re.search(rf"^iteration +{step}/", self.output, re.MULTILINE))

    def workers(self) -> list[psutil.Process]:
        return [child for child in self.torchrun.children() if "pretrain_genlip.py" in child.cmdline()]

    def ended(self, seconds: float) -> int:
        try:
            return self.torchrun.wait(seconds)
        except psutil.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s:\n{self.output[-4000:]}") from None

    def trainings(self) -> int:
        """Number of starts of training: rank 0 prints a line about the run each time."""
        return len(re.findall(r"^train_data .* \| save ", self.output, re.MULTILINE))


@contextmanager
def launched(config: RunConfig, folder: Path, shared_store: bool = False, restarts: int = 2) -> Iterator[Launch]:
    launch = Launch(config, folder, shared_store, restarts)
    try:
        yield launch
    finally:
        if launch.torchrun.poll() is None:
            for process in (*launch.torchrun.children(recursive=True), launch.torchrun):
                process.kill()
            launch.torchrun.wait()


def resuming(data: Path, save: Path, **flags: Any) -> RunConfig:
    folder = {"checkpoint__save": str(save), "checkpoint__load": str(save), "data__valid_data": ""}
    return tiny_config(data, **folder, log__log_interval=1, **flags)


def loaded_weights(config: RunConfig) -> dict[str, torch.Tensor]:
    return full_weights(take_steps(config, 0)[0])


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.long)])
def test_preempted_run_saves_and_is_not_started_again(
    number: signal.Signals, demo_data: Path, tmp_path: Path, fault_row: FaultRow
) -> None:
    save = tmp_path / "run"
    with launched(resuming(demo_data, save, train__train_iters=100_000), tmp_path / "first") as launch:
        launch.wait_for_step(3)
        launch.workers()[1].send_signal(number)
        assert launch.ended(60)
        assert launch.trainings() == 1
        assert "exitcode  : 17 " in launch.output
    steps = checkpoints.pointed(save)
    assert steps is not None and steps >= 3
    # The recorded code of that launch does not stop the next one.
    with launched(resuming(demo_data, save, train__train_iters=100_000), tmp_path / "second") as launch:
        launch.wait_for_text(f"resumed at step {steps} from")
        assert not (save / exits.FINAL_EXIT).exists()
    fault_row(number.name, "a worker of torchrun --max-restarts", "saved, not restarted; a new launch resumes")


@pytest.mark.slow
@pytest.mark.faults
def test_ctrl_c_at_torchrun_saves(demo_data: Path, tmp_path: Path, fault_row: FaultRow) -> None:
    """A terminal's Ctrl-C reaches torchrun, which passes it on to its workers in their own sessions."""
    save = tmp_path / "run"
    with launched(resuming(demo_data, save, train__train_iters=100_000), tmp_path / "first") as launch:
        launch.wait_for_step(3)
        launch.torchrun.send_signal(signal.SIGINT)
        assert launch.ended(60)
    steps = checkpoints.pointed(save)
    assert f"leaving after step {steps}" in launch.output
    assert launch.output.count("stop requested by SIGINT") == 1 and "KeyboardInterrupt" not in launch.output
    assert launch.output.count("Traceback") == 1, "beside torchrun's own"
    assert not [path for path in save.iterdir() if path.name.startswith(".")]
    fault_row("SIGINT", "torchrun, as by Ctrl-C", "all save, not restarted")


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.long
def test_killed_worker_is_started_again_and_the_result_is_the_same(
    demo_data: Path, tmp_path: Path, fault_row: FaultRow
) -> None:
    flags = {"train__train_iters": 24, "checkpoint__save_interval": 4}
    with launched(resuming(demo_data, tmp_path / "whole", **flags), tmp_path / "first") as launch:
        assert launch.ended(240) == 0
    with launched(resuming(demo_data, tmp_path / "killed", **flags), tmp_path / "second") as launch:
        launch.wait_for_step(10)
        launch.workers()[1].kill()
        assert launch.ended(240) == 0
        assert launch.trainings() == 2
        assert "resumed at step 8 from" in launch.output
    whole, killed = (
        run_distributed(2, loaded_weights, resuming(demo_data, tmp_path / name, **flags))[0]
        for name in ("whole", "killed")
    )
    for name, weight in whole.items():
        assert torch.equal(weight, killed[name]), name
    fault_row("SIGKILL", "a worker of torchrun --max-restarts", "restarted, equals an undisturbed run bit for bit")


@pytest.mark.slow
def test_a_user_error_is_printed_once(demo_data: Path, tmp_path: Path) -> None:
    config = resuming(demo_data, tmp_path / "run", data__train_data="/nowhere/*.tar")
    with launched(config, tmp_path / "launch", shared_store=True) as launch:
        assert launch.ended(120)
        assert launch.output.count("export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1") == 1
        error = "pretrain_genlip.py: error: data.train_data: '/nowhere/*.tar' matches no .tar file"
        assert len(re.findall(f"^{re.escape(error)}$", launch.output, re.MULTILINE)) == 1
        # torchrun's last lines: the restarted workers left for the same reason.
        assert "exitcode  : 2 " in launch.output and "To enable traceback" not in launch.output
        _, _, cause = launch.output.partition("Root Cause")
        assert f"traceback : {error}\n" in cause and cause.count("\n") < 10


@pytest.mark.slow
def test_a_command_line_error_is_printed_once(demo_data: Path, tmp_path: Path) -> None:
    config = resuming(demo_data, tmp_path / "run", train__global_batch_size=3)
    with launched(config, tmp_path / "launch", restarts=0) as launch:
        assert launch.ended(120)
        assert len(re.findall(r"^pretrain_genlip.py: error: .*global_batch_size", launch.output, re.MULTILINE)) == 1
        assert re.search(r"traceback : pretrain_genlip.py: error: .*global_batch_size", launch.output)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT])
@pytest.mark.slow
def test_preempted_before_training_began(number: signal.Signals, demo_data: Path, tmp_path: Path) -> None:
    """After a signal during the import of torch there is nothing to save, and torchrun must not start training."""

    def listening() -> bool:
        return len(launch.workers()) == 2 and all(
            int(re.findall(r"SigCgt:\s*(\w+)", Path(f"/proc/{worker.pid}/status").read_text())[0], 16)
            & 1 << signal.SIGUSR1 - 1  # Python itself handles SIGINT
            for worker in launch.workers()
        )

    with launched(resuming(demo_data, tmp_path / "run"), tmp_path / "launch") as launch:
        launch.wait_for("both workers listen", listening)
        launch.workers()[0].send_signal(number)
        assert launch.ended(60)
        assert launch.trainings() <= 1 and "| lm loss" not in launch.output
        assert "exitcode  : 17 " in launch.output


@pytest.fixture
def as_worker(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def set_environment(run_id: str = "", restart: int = 0, rank: int = 0) -> None:
        for name, value in {"RUN_ID": run_id, "RESTART_COUNT": str(restart)}.items():
            monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
        monkeypatch.setenv("RANK", str(rank))

    return set_environment


def test_a_restarted_worker_exits_with_the_launchs_code(as_worker: Callable[..., None], tmp_path: Path) -> None:
    as_worker("launch 1")
    exits.mark_final(tmp_path, exits.EXIT_BAD_NUMBERS)
    as_worker("launch 1", restart=1, rank=1)
    assert exits.final_exit(tmp_path) == exits.EXIT_BAD_NUMBERS
    # A restart that another node requested is not counted, but the launcher (here pytest) is older than the file.
    as_worker("launch 1", restart=0)
    assert exits.final_exit(tmp_path) == exits.EXIT_BAD_NUMBERS


def test_a_stop_for_a_host_that_joins_does_not_end_the_launch(
    as_worker: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for code, ends in ((exits.EXIT_PREEMPTED, False), (exits.EXIT_USER_ERROR, True)):
        as_worker("launch 1")
        monkeypatch.setenv("GROUP_WORLD_SIZE", "1")
        exits.mark_final(tmp_path, code)
        assert exits.final_exit(tmp_path) == code
        monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
        assert exits.final_exit(tmp_path) == (code if ends else None)
        assert (tmp_path / exits.FINAL_EXIT).exists() == ends


def test_a_new_launch_removes_an_older_final_exit_file(as_worker: Callable[..., None], tmp_path: Path) -> None:
    as_worker("none")
    exits.mark_final(tmp_path, exits.EXIT_PREEMPTED)
    os.utime(tmp_path / exits.FINAL_EXIT, (0, 0))
    as_worker("none", rank=1)
    assert exits.final_exit(tmp_path) is None and (tmp_path / exits.FINAL_EXIT).exists()
    as_worker("none", rank=0)
    assert exits.final_exit(tmp_path) is None and not (tmp_path / exits.FINAL_EXIT).exists()
    as_worker("launch 1")
    exits.mark_final(tmp_path, exits.EXIT_PREEMPTED)
    as_worker("launch 2", restart=1)
    assert exits.final_exit(tmp_path) is None


@pytest.mark.parametrize("code", [0, 1, exits.EXIT_HUNG, exits.EXIT_REPLICAS_DIFFER, exits.EXIT_NOT_SAVED])
def test_codes_that_a_restart_may_fix_are_not_recorded(
    code: int, as_worker: Callable[..., None], tmp_path: Path
) -> None:
    as_worker("launch")
    exits.mark_final(tmp_path, code)
    assert not list(tmp_path.iterdir())


def test_without_torchrun_nothing_is_recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    exits.mark_final(tmp_path, exits.EXIT_PREEMPTED)
    assert exits.final_exit(tmp_path) is None and not list(tmp_path.iterdir())


def test_a_damaged_or_unwritable_final_exit_file_is_ignored(as_worker: Callable[..., None], tmp_path: Path) -> None:
    as_worker("launch", restart=1)
    (tmp_path / exits.FINAL_EXIT).write_bytes(b"\xff\x00 launch")
    assert exits.final_exit(tmp_path) is None
    exits.mark_final(tmp_path / exits.FINAL_EXIT, exits.EXIT_PREEMPTED)  # a file where a folder is needed


def test_a_restarted_worker_reads_the_final_code_without_importing_torch() -> None:
    code = "import sys, pretrain_genlip; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
