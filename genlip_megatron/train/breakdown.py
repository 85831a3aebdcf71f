"""Where a step's time goes: waiting for data, to the device, forward, backward, reduction, optimizer, pipeline.

One line of time, cut where a part begins or ends; each piece belongs to the innermost part that is open. So parts never
overlap, add up over a step's micro-batches in whatever order a pipeline runs them, and sum to the whole step.

On a GPU a cut is a CUDA event on the compute stream, read when the device has passed it, steps later: nothing waits
for it. A part so lasts until its kernels are done, idle time between them included: a forward pass that waits for its
data is "data wait", one whose kernels the host launches too slowly is still "forward", and reduction that runs on
another stream behind the backward pass shows only as far as the step waits for it. On a CPU a cut reads the clock.

Megatron-Core's schedules say where forward and backward passes, transfers between stages and reductions begin and end,
through its timers; ``StepTimers`` listens there. ``tools/benchmarks/gpu.py`` tells what a cut costs.
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
_TRANSFERS = (
    "forward-recv", "backward-recv", "forward-send", "backward-send", "forward-send-backward-recv",
    "backward-send-forward-recv", "forward-send-forward-recv", "backward-send-backward-recv",
    "forward-backward-send-forward-backward-recv",
)  # fmt: skip
_REDUCTIONS = (
    "all-grads-sync", "conditional-embedder-grads-all-reduce", "non-tensor-parallel-grads-all-reduce",
    "embedding-grads-all-reduce",
)  # fmt: skip
# Parts by the names of Megatron-Core's timers.
_PART_OF = {
    "forward-compute": "forward",
    "backward-compute": "backward",
    **dict.fromkeys(_TRANSFERS, "pipeline"),
    **dict.fromkeys(_REDUCTIONS, "reduce"),
}


class Breakdown:
    """Seconds of each part of the steps, on this rank.

    Args:
        device: where the steps run.

    Attributes:
        annotate: name the parts in traces, for the profiler and for Nsight (NVTX).
    """

    def __init__(self, device: torch.device) -> None:
        self.annotate = False
        self._cuda = device.type == "cuda"
        self._open: list[tuple[str, Any]] = []  # parts that have begun, outermost first, and their names in a trace
        self._cuts: list[tuple[Any, str]] = []  # of this step: when, and the part from then on
        self._unread: deque[list[tuple[Any, str]]] = deque()
        self._spare: list[Any] = []  # events that have been read
        self._steps, self._seconds = 0, dict.fromkeys(PARTS, 0.0)

    def _cut(self) -> None:
        if self._cuda:
            moment: Any = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
            moment.record()
        else:
            moment = time.perf_counter()
        self._cuts.append((moment, self._open[-1][0] if self._open else ""))

    def begin(self, part: str) -> None:
        """``part`` (one of PARTS) begins; outside a step nothing happens."""
        if not self._open:
            return
        self._push(part)

    def end(self) -> None:
        """The part that began last ends."""
        if len(self._open) > 1:
            self._pop()

    def _push(self, part: str) -> None:
        shown = torch.profiler.record_function(part) if self.annotate else None
        if shown is not None:
            torch.cuda.nvtx.range_push(part)
            shown.__enter__()
        self._open.append((part, shown))
        self._cut()

    def _pop(self) -> None:
        _, shown = self._open.pop()
        self._cut()
        if shown is not None:
            shown.__exit__(None, None, None)
            torch.cuda.nvtx.range_pop()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """``name`` lasts as long as what is done within."""
        self.begin(name)
        try:
            yield
        finally:
            self.end()

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """A step lasts as long as what is done within; what is in no other part of it is "other"."""
        self._push("other")
        try:
            yield
        finally:
            while self._open:
                self._pop()
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
        """Mean seconds of a step in each of PARTS, of the steps read since this was last asked; 0 when there is none.

        On a GPU the last step is usually not among them yet, and counts the next time.
        """
        self._read()
        steps = max(self._steps, 1)
        means = [self._seconds[part] / steps for part in PARTS]
        self._steps, self._seconds = 0, dict.fromkeys(PARTS, 0.0)
        return means


class StepTimers:
    """Megatron-Core's timers, which also tell a breakdown what begins and ends.

    Args:
        timers: ``megatron.core.timers.Timers``; they wait for the device, and do nothing below their log level.
        breakdown: is told.
    """

    def __init__(self, timers: Any, breakdown: Breakdown) -> None:
        self._timers, self._breakdown = timers, breakdown

    def __call__(self, name: str, log_level: int | None = None) -> Any:
        timer, part = self._timers(name, log_level=log_level), _PART_OF.get(name)
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
    """(mean over ranks, longest of a rank) of each part, from this rank's ``take``. A collective over all ranks."""
    mean = torch.tensor(seconds, dtype=torch.float64, device=device)
    longest = mean.clone()
    torch.distributed.all_reduce(mean)
    torch.distributed.all_reduce(longest, op=torch.distributed.ReduceOp.MAX)
    return (mean / torch.distributed.get_world_size()).tolist(), longest.tolist()


def describe(mean: list[float], longest: list[float]) -> str:
    """One line of the log, in milliseconds; the longest of a rank stands in brackets where it differs.

    >>> describe([0, 0.001, 0.04, 0.08, 0, 0.002, 0.005, 0.001], [0, 0.001, 0.05, 0.08, 0, 0.002, 0.005, 0.001])
    'step parts, ms: data wait 0 | to device 1 | forward 40 [50] | backward 80 | reduce 2 | optimizer 5 | other 1'
    """
    shown = []
    for part, average, most in zip(PARTS, (1000 * x for x in mean), (1000 * x for x in longest), strict=True):
        if part == "pipeline" and not most:
            continue
        bracket = f" [{most:.0f}]" if f"{most:.0f}" != f"{average:.0f}" else ""
        shown.append(f"{part} {average:.0f}{bracket}")
    return "step parts, ms: " + " | ".join(shown)
