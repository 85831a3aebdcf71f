"""The parts of a step add up to the step, events of a device are read without waiting, and chosen steps are traced."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from genlip_megatron.config import RunConfig, override
from genlip_megatron.testing.distributed import run_distributed
from genlip_megatron.testing.runs import tiny_config
from genlip_megatron.train.breakdown import PARTS, Breakdown
from genlip_megatron.train.profile import Profiler
from genlip_megatron.train.report import Tally, report
from tests.train.steps import take_steps


def parts_of(breakdown: Breakdown) -> dict[str, float]:
    return {part: seconds for part, seconds in zip(PARTS, breakdown.take(), strict=True) if seconds}


def test_nested_parts_are_not_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 3.0, 7.0, 15.0, 31.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    breakdown = Breakdown(torch.device("cpu"))
    breakdown.begin("forward")  # a validation's: no step
    breakdown.end()
    with breakdown.step():  # 0
        breakdown.begin("forward")  # 1
        with breakdown.part("data wait"):  # 3 to 7
            pass
        breakdown.end()  # 15
    assert parts_of(breakdown) == {"other": 1 + 16, "forward": 2 + 8, "data wait": 4}
    assert parts_of(breakdown) == {}


class Moment:
    """A CUDA event with a fake clock; waiting for it fails, because it has no ``synchronize``."""

    done, recorded, made = 0, 0, 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        Moment.made += 1

    def record(self) -> None:
        Moment.recorded += 1
        self.at = Moment.recorded

    def query(self) -> bool:
        return self.at <= Moment.done

    def elapsed_time(self, end: Moment) -> float:
        assert end.query()
        return 1000.0 * (end.at - self.at)


def test_on_a_device_steps_are_read_once_they_are_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Moment)
    breakdown = Breakdown(torch.device("cuda"))

    def step() -> None:
        with breakdown.step(), breakdown.part("forward"):
            pass

    step()
    step()
    Moment.done = 7  # of eight: the second step is not over
    assert parts_of(breakdown) == {"other": 2.0, "forward": 1.0}
    step()
    assert Moment.made == 8, "events that were read serve again"
    Moment.done = 12
    assert parts_of(breakdown) == {"other": 2.0, "forward": 1.0}, "of two steps, in the mean"


def traced(config: RunConfig, steps: int) -> tuple[dict[str, float], float]:
    """(parts of a run's steps on this rank, measured seconds per step)."""
    run, outcomes, seen = take_steps(config, steps, see=lambda run: time.perf_counter())
    found, tally = parts_of(run.breakdown), Tally()
    for outcome in outcomes:
        tally.add(outcome)
    report(run, tally)
    run.close()
    return found, (seen[-1] - seen[0]) / steps


@pytest.mark.slow
def test_pipeline_steps_are_broken_down_and_traced(demo_data: Path, tmp_path: Path) -> None:
    config = tiny_config(
        demo_data, parallel__pipeline_model_parallel_size=2, log__profile=True, log__profile_steps="2:3",
        log__profile_ranks=[1], log__tensorboard_dir=str(tmp_path),
    )  # fmt: skip
    for found, seconds in run_distributed(2, traced, config, 4):
        assert {"to device", "forward", "backward", "pipeline", "reduce", "optimizer", "other"} <= set(found)
        # Time outside of steps, above all the profiler's start and its files.
        assert sum(found.values()) <= seconds
        # Not the forward share: one rank waits while the other's profiler starts.
        assert found["forward"] > 0 and found["backward"] > 0
    (file,) = (tmp_path / "profile").iterdir()
    assert file.name == "rank1.steps2-3.pt.trace.json.gz"
    events: list[dict[str, Any]] = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    spans = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert [name for name in sorted(set(spans)) if name.startswith("step ")] == ["step 2", "step 3"]
    # Two steps of four micro-batches under 1F1B.
    assert (spans.count("forward"), spans.count("backward"), spans.count("data wait")) == (8, 8, 8)
    board = next(path for path in tmp_path.iterdir() if path.is_file()).read_bytes()
    assert b"step-parts/backward" in board


def test_a_trace_that_cannot_be_written_does_not_end_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "profile").write_text("in the way")
    config = override(
        RunConfig(), {"log.profile": True, "log.profile_steps": "3:4", "log.tensorboard_dir": str(tmp_path)}
    )
    profiler = Profiler(config, 0, Breakdown(torch.device("cpu")))
    for number in range(1, 6):
        with profiler.step(number):
            pass
    assert "rank0.steps3-4.pt.trace.json.gz could not be written; the run continues" in capsys.readouterr().err
    late = Profiler(config, 0, Breakdown(torch.device("cpu")))
    with late.step(5):
        pass
    assert "steps 3 to 4 are over" in capsys.readouterr().err
