"""Where a step's time goes: data wait, copies to the device, forward, backward, reduction, optimizer, pipeline.

The time of a step is cut where a part begins or ends; each piece belongs to the innermost open part. So parts never
overlap, and they sum to the whole step in whatever order a pipeline runs its micro-batches.

On a GPU a cut is a CUDA event on the compute stream. It is read steps later, when the device has passed it, so nothing
waits for it. A part lasts until its kernels are done, and includes idle time between them. A forward pass that waits
for its data is "data wait"; one whose kernels the host launches too slowly is still "forward". A reduction on another
stream counts only while the step waits for it. On a CPU a cut reads the clock.

Megatron-Core's timers mark the begin and end of forward and backward passes, transfers between stages and reductions;
``StepTimers`` listens to them. ``tools/benchmarks/gpu.py`` measures the cost of a cut.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch

PARTS = ("data wait", "to device", "forward", "backward", "pipeline", "reduce", "optimizer", "other")


def _part_of(timer: str) -> str | None:
    """The part that one of Megatron-Core's timers marks."""
    if timer.endswith(("-send", "-recv")):
        return "pipeline"
    if timer.endswith(("-grads-sync", "-grads-all-reduce")):
        return "reduce"
    return {"forward-compute": "forward", "backward-compute": "backward"}.get(timer)


class Breakdown:
    """Seconds of each part of the steps, on this rank.

    Args:
        device: runs the steps.

    Attributes:
        annotate: name the parts in traces of the profiler and of Nsight (NVTX).
    """

    def __init__(self, device: torch.device) -> None:
        self.annotate = False
        self._cuda = device.type == "cuda"
        self._open: list[tuple[str, Any]] = []  # open parts, outermost first, and their marks in a trace
        self._cuts: list[tuple[Any, str]] = []  # of this step: the moment, and the part that follows
        self._unread: deque[list[tuple[Any, str]]] = deque()
        self._spare: list[Any] = []  # events to use again
        self._steps, self._seconds = 0, dict.fromkeys(PARTS, 0.0)

    def _cut(self) -> None:
        if self._cuda:
            moment: Any = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
            moment.record()
        else:
            moment = time.perf_counter()
        self._cuts.append((moment, self._open[-1][0] if self._open else ""))

    def begin(self, part: str) -> None:
        """Begin ``part`` (one of PARTS); outside a step only ``step`` begins one."""
        if not self._open and part != "other":
            return
        shown = torch.profiler.record_function(part) if self.annotate else None
        if shown is not None:
            torch.cuda.nvtx.range_push(part)
            shown.__enter__()
        self._open.append((part, shown))
        self._cut()

    def end(self) -> None:
        """End the part that began last."""
        if not self._open:
            return
        _, shown = self._open.pop()
        self._cut()
        if shown is not None:
            shown.__exit__(None, None, None)
            torch.cuda.nvtx.range_pop()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Measure the code inside as part ``name``."""
        self.begin(name)
        try:
            yield
        finally:
            self.end()

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Measure the code inside as one step; time in no other part is "other"."""
        self.begin("other")
        try:
            yield
        finally:
            while self._open:
                self.end()
            self._unread.append(self._cuts)
            self._cuts = []
            self._read()

    def _read(self) -> None:
        """Add up the steps that the device has finished."""
        while self._unread and (not self._cuda or self._unread[0][-1][0].query()):
            cuts = self._unread.popleft()
            for (begin, part), (end, _) in itertools.pairwise(cuts):
                self._seconds[part] += begin.elapsed_time(end) / 1000 if self._cuda else end - begin
            if self._cuda:
                self._spare += [moment for moment, _ in cuts]
            self._steps += 1

    def take(self) -> list[float]:
        """Mean seconds per step of each of PARTS, over the steps read since the last call; 0 if there are none.

        On a GPU the last step is usually not read yet; the next call counts it.
        """
        self._read()
        steps = max(self._steps, 1)
        means = [self._seconds[part] / steps for part in PARTS]
        self._steps, self._seconds = 0, dict.fromkeys(PARTS, 0.0)
        return means


class StepTimers:
    """Megatron-Core's timers, which also mark the parts of a breakdown.

    Args:
        timers: ``megatron.core.timers.Timers``; they wait for the device, and do nothing below their log level.
    """

    def __init__(self, timers: Any, breakdown: Breakdown) -> None:
        self._timers, self._breakdown = timers, breakdown

    def __call__(self, name: str, log_level: int | None = None) -> Any:
        timer, part = self._timers(name, log_level=log_level), _part_of(name)
        return timer if part is None else _Listening(timer, part, self._breakdown)


class _Listening:
    def __init__(self, timer: Any, part: str, breakdown: Breakdown) -> None:
        self._timer, self._part, self._breakdown = timer, part, breakdown

    def start(self, barrier: bool = False) -> None:
        self._timer.start(barrier=barrier)
        self._breakdown.begin(self._part)

    def stop(self, barrier: bool = False) -> None:
        self._breakdown.end()
        self._timer.stop(barrier=barrier)


def over_ranks(seconds: list[float], device: torch.device) -> tuple[list[float], list[float]]:
    """(mean over ranks, longest of any rank) of each part, from this rank's ``take``. A collective over all ranks."""
    mean = torch.tensor(seconds, dtype=torch.float64, device=device)
    longest = mean.clone()
    torch.distributed.all_reduce(mean)
    torch.distributed.all_reduce(longest, op=torch.distributed.ReduceOp.MAX)
    return (mean / torch.distributed.get_world_size()).tolist(), longest.tolist()


def describe(mean: list[float], longest: list[float]) -> str:
    """A log line in milliseconds, without parts that round to 0.

    Where a rank is furthest above the mean, and a quarter at least, its time is in brackets.

    >>> describe([0, 0.001, 0.04, 0.08, 0, 0.002, 0.005, 0.001], [0, 0.001, 0.05, 0.08, 0, 0.002, 0.005, 0.001])
    'step parts, ms: to device 1 | forward 40 [50] | backward 80 | reduce 2 | optimizer 5 | other 1'
    """
    shown, furthest = [], max(most - average for average, most in zip(mean, longest, strict=True))
    for part, average, most in zip(PARTS, (1000 * x for x in mean), (1000 * x for x in longest), strict=True):
        if f"{most:.0f}" == "0":
            continue
        slow = most >= 1.25 * average and most - average >= 1000 * furthest * (1 - 1e-9)
        bracket = f" [{most:.0f}]" if slow else ""
        shown.append(f"{part} {average:.0f}{bracket}")
    return "step parts, ms: " + " | ".join(shown)
