"""One of two ranks gets a stop signal, is suspended or killed, at any place. The run ends as documented and resumes."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from genlip_megatron.faults.exits import EXIT_HUNG, EXIT_PREEMPTED
from genlip_megatron.testing.processes import Ended, Zygote
from tests.fault_table import FaultRow
from tests.reliability.training import Training

pytestmark = pytest.mark.faults

STEP = 3
TIMEOUT = 4.0  # seconds; a step takes a tenth of one
PLACES = ("step", "validation", "save")


@pytest.fixture(scope="module")
def flags(demo_data: Path) -> dict[str, Any]:
    """Validation and saves at steps 1, 3 and 5, so that step 3 has every place."""
    return {
        "model__num_layers": 1,
        "data__valid_data": (f"{demo_data}/val-*.tar",),
        "log__eval_interval": 1,
        "log__eval_iters": 1,
        "checkpoint__save_interval": 1,
        "train__train_iters": 5,
    }


@pytest.fixture(scope="module")
def whole(zygote: Zygote, demo_data: Path, tmp_path_factory: pytest.TempPathFactory, flags: dict[str, Any]) -> Training:
    """The undisturbed run."""
    training = Training(zygote, demo_data, tmp_path_factory.mktemp("signals") / "whole", 2, flags)
    assert [ended.code for ended in training.go()] == [0, 0]
    return training


def _every(quick: set[tuple[str, int]]) -> list[Any]:
    """Parameters (place, rank) for every place; all but a few are marked slow."""
    return [
        pytest.param(place, rank, marks=() if (place, rank) in quick else pytest.mark.long, id=f"{place}-rank{rank}")
        for place in PLACES
        for rank in (0, 1)
    ]


def disturbed(
    whole: Training, folder: Path, kind: str, place: str, rank: int, **flags: Any
) -> tuple[Training, list[Ended]]:
    """(a run with the fault at step 3, how its ranks ended)."""
    training = Training(whole.zygote, whole.data, folder, 2, whole.flags)
    fault = f"{kind}@{STEP}:{rank}" if place == "step" else f"{kind}.{place}@{STEP}:{rank}"
    return training, training.go("--inject-fault", fault, "--allow-fault-injection", **flags)


def check_resumes(training: Training, whole: Training) -> None:
    """Check that the restarted run ends with the same bits as the undisturbed one."""
    ended = training.go()
    assert [one.code for one in ended] == [0, 0], ended[0].output[-2000:]
    assert "resumed at step" in ended[0].output
    assert training.history() == whole.history()


@pytest.mark.slow
@pytest.mark.parametrize(("place", "rank"), _every({("step", 1), ("validation", 0)}))
def test_stop_requested(place: str, rank: int, whole: Training, tmp_path: Path, fault_row: FaultRow) -> None:
    """SIGTERM on one rank: all save and exit with status 17."""
    training, ended = disturbed(whole, tmp_path / "run", "term", place, rank)
    assert [one.code for one in ended] == [EXIT_PREEMPTED] * 2, ended[rank].output[-2000:]
    steps = max(step for _, step in training.history())
    assert steps <= STEP + 1
    ended = training.go()
    assert f"resumed at step {steps}" in ended[0].output, "a step in flight was lost although there was time to save"
    assert training.history() == whole.history()
    fault_row("SIGTERM", f"{place}, rank {rank} of 2", f"all save, status {EXIT_PREEMPTED}, resumed bit for bit")


@pytest.mark.slow
@pytest.mark.parametrize(("place", "rank"), _every({("step", 0), ("save", 1)}))
def test_killed(place: str, rank: int, whole: Training, tmp_path: Path, fault_row: FaultRow) -> None:
    """SIGKILL on one rank: the launcher ends the others, and a restart resumes."""
    training, ended = disturbed(whole, tmp_path / "run", "kill", place, rank)
    assert ended[rank].code == -signal.SIGKILL, ended[rank].output[-2000:]
    assert ended[1 - rank].code != 0
    check_resumes(training, whole)
    fault_row("SIGKILL", f"{place}, rank {rank} of 2", "others ended, resumed bit for bit")


@pytest.mark.slow
@pytest.mark.parametrize(("place", "rank"), _every({("step", 1)}))
def test_hung(place: str, rank: int, whole: Training, tmp_path: Path, fault_row: FaultRow) -> None:
    """SIGSTOP on one rank: the other shows its stacks, wakes it to show its own, and exits with status 20."""
    training, ended = disturbed(whole, tmp_path / "run", "stop", place, rank, faults__step_timeout=TIMEOUT / 60)
    other = ended[1 - rank]
    assert other.code == EXIT_HUNG, other.output[-2000:]
    for one in ended:
        assert "most recent call first" in one.output and "train_step" in one.output, f"no stacks: {one.output[-2000:]}"
    assert f"rank {rank} " in other.output and "is stopped (SIGSTOP)" in other.output
    check_resumes(training, whole)
    fault_row("SIGSTOP", f"{place}, rank {rank} of 2", f"stacks shown, status {EXIT_HUNG}, resumed bit for bit")


def stopped_while_starting() -> int:
    """Training in which rank 1 is suspended while the run is built."""
    from genlip_megatron.train import setup

    build_run = setup.build_run

    def stopping(config: Any) -> Any:
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGSTOP)
        return build_run(config)

    setup.build_run = stopping
    import pretrain_genlip

    return pretrain_genlip.main()


@pytest.mark.slow
def test_hung_while_starting(zygote: Zygote, demo_data: Path, tmp_path: Path, fault_row: FaultRow) -> None:
    """The other ranks do not wait forever in the first collective of the start."""
    training = Training(zygote, demo_data, tmp_path, 2, {"faults__step_timeout": TIMEOUT / 60})
    ended = training.start(target=f"{__name__}:stopped_while_starting").wait(end_others=0.5)
    assert ended[0].code == EXIT_HUNG, ended[0].output[-2000:]
    for one in ended:
        assert "most recent call first" in one.output and "set_up" in one.output
    fault_row("SIGSTOP", "start, rank 1 of 2", f"stacks shown, status {EXIT_HUNG}")
