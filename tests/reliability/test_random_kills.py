"""A run that is killed any number of times ends with the same bits and the same samples."""

from __future__ import annotations

import random
import re
import signal
import time
from pathlib import Path

import pytest

from genlip_megatron.checkpoint import paths as checkpoints
from genlip_megatron.testing.processes import Job, Zygote
from tests.fault_table import FaultRow
from tests.reliability.training import Training

pytestmark = pytest.mark.faults


def wait_for_step(job: Job, step: int) -> bool:
    """Whether the run reached a step (True) or ended before."""
    while True:
        job.zygote.receive(0.005)
        reached = [int(number) for number in re.findall(r"^iteration +(\d+)/", job.output(0), re.MULTILINE)]
        if step == 0 or (reached and reached[-1] >= step):
            return True
        if job.codes:
            return False


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kills", "steps", "world_size"),
    [(3, 20, 2), pytest.param(20, 100, 2, marks=pytest.mark.long), pytest.param(20, 100, 1, marks=pytest.mark.long)],
)
def test_killed_at_random(
    kills: int, steps: int, world_size: int, zygote: Zygote, demo_data: Path, tmp_path: Path, fault_row: FaultRow
) -> None:
    flags = {"model__num_layers": 1, "train__train_iters": steps}
    whole = Training(zygote, demo_data, tmp_path / "whole", world_size, flags)
    assert all(ended.code == 0 for ended in whole.go())
    training = Training(zygote, demo_data, tmp_path / "killed", world_size, flags)
    draw = random.Random(kills)
    for number in range(1, kills + 1):
        # Steps after the step that it resumes from; 0: during the start.
        further = draw.randrange(3)
        step = max(checkpoints.steps(training.run), default=0) + further if further else 0
        job = training.start()
        assert wait_for_step(job, step), f"start {number} ended by itself: {job.codes} {job.output(0)[-1500:]}"
        time.sleep(draw.uniform(0, 0.1 if further else 1))
        job.signal(draw.randrange(world_size), signal.SIGKILL)
        ended = job.wait(end_others=0.1)
        assert -signal.SIGKILL in [one.code for one in ended], "the run was over before it was killed"
    ended = training.go()
    assert all(one.code == 0 for one in ended), ended[0].output[-2000:]
    assert training.history() == whole.history()
    fault_row(
        "SIGKILL",
        f"random moments of {steps} steps, {world_size} rank{'s' * (world_size > 1)}",
        "weights and samples equal",
        count=kills,
    )


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_twenty_steps_are_ten_and_ten(
    precision: str, zygote: Zygote, demo_data: Path, tmp_path: Path, fault_row: FaultRow
) -> None:
    """20 steps, and 10 + kill -9 + 10: losses, gradient norms, samples and weights of every step agree bit for bit."""
    flags = {"train__train_iters": 20, "checkpoint__save_interval": 10, "train__precision": precision}
    whole = Training(zygote, demo_data, tmp_path / "whole", 1, flags)
    assert whole.go()[0].code == 0
    halves = Training(zygote, demo_data, tmp_path / "halves", 1, flags)
    job = halves.start()
    job.wait_for("saved ")
    job.signal(0, signal.SIGKILL)
    assert job.wait()[0].code == -signal.SIGKILL
    (ended,) = halves.go()
    assert ended.code == 0 and "resumed at step 10" in ended.output, ended.output[-2000:]
    assert len(whole.history()) == 20
    assert halves.history() == whole.history()
    fault_row("SIGKILL", f"10 steps, kill -9, 10 steps, {precision}", "equals 20 steps bit for bit")
