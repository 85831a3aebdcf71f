"""One of two ranks gets a stop signal, is suspended or killed, at any place. The run ends as documented and resumes."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from genlip_megatron.faults.exits import EXIT_HUNG, EXIT_PREEMPTED
from genlip_megatron.testing.processes import Zygote
from genlip_megatron.train import setup
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


# The other cases are marked long.
QUICK = ("term step 1", "term validation 0", "kill step 0", "kill save 1", "stop step 1")
CASES = [
    pytest.param(kind, place, rank, marks=() if f"{kind} {place} {rank}" in QUICK else pytest.mark.long)
    for kind in ("term", "stop", "kill")
    for place in PLACES
    for rank in (0, 1)
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "place", "rank"), CASES)
def test_a_signal_at_one_rank(
    kind: str, place: str, rank: int, whole: Training, tmp_path: Path, fault_row: FaultRow
) -> None:
    """SIGTERM: all save and exit with status 17. SIGKILL: the launcher ends the others. SIGSTOP: the other rank shows
    its stacks, wakes the rank to show its own, and exits with status 20. A restart ends with the undisturbed run's
    bits.
    """
    training = Training(whole.zygote, whole.data, tmp_path / "run", 2, whole.flags)
    fault = f"{kind}@{STEP}:{rank}" if place == "step" else f"{kind}.{place}@{STEP}:{rank}"
    timeout = {"faults__step_timeout": TIMEOUT / 60} if kind == "stop" else {}
    ended = training.go("--inject-fault", fault, "--allow-fault-injection", **timeout)
    this, other = ended[rank], ended[1 - rank]
    resumed = "resumed at step"
    if kind == "term":
        assert this.code == other.code == EXIT_PREEMPTED, this.output[-2000:]
        last = max(step for _, step in training.history())
        assert last <= STEP + 1
        resumed = f"resumed at step {last}"  # no step in flight is lost
        name, outcome = "SIGTERM", f"all save, status {EXIT_PREEMPTED}"
    elif kind == "kill":
        assert this.code == -signal.SIGKILL and other.code != 0, this.output[-2000:]
        name, outcome = "SIGKILL", "others ended"
    else:
        assert other.code == EXIT_HUNG, other.output[-2000:]
        for one in ended:
            assert "most recent call first" in one.output and "train_step" in one.output, one.output[-2000:]
        assert f"rank {rank} " in other.output and "is stopped (SIGSTOP)" in other.output
        name, outcome = "SIGSTOP", f"stacks shown, status {EXIT_HUNG}"
    again = training.go()
    assert [one.code for one in again] == [0, 0] and resumed in again[0].output, again[0].output[-2000:]
    assert training.history() == whole.history()
    fault_row(name, f"{place}, rank {rank} of 2", f"{outcome}, resumed bit for bit")


def stopped_while_starting() -> int:
    """Training in which rank 1 is suspended while the run is built."""
    import pretrain_genlip

    build_run = setup.build_run

    def stopping(config: Any) -> Any:
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGSTOP)
        return build_run(config)

    setup.build_run = stopping
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
