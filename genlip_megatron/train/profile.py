"""Traces of chosen steps on chosen ranks: ``--profile --profile-steps 10:12 --profile-ranks 0``.

A rank writes ``rank0.steps10-12.pt.trace.json.gz``, for chrome://tracing, Perfetto and TensorBoard's profiler, and on
a GPU ``rank0.steps10-12.memory.pickle``, for https://pytorch.org/memory_viz. During recording the parts of
``breakdown.py`` and Megatron-Core's own are NVTX ranges, which Nsight shows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.utils import configure_nvtx_profiling

from genlip_megatron.config import RunConfig
from genlip_megatron.log import to_stderr
from genlip_megatron.train.breakdown import Breakdown

# Allocations in a snapshot; beyond this the oldest are dropped.
_MEMORY_EVENTS = 1_000_000


class Profiler:
    """Records the chosen steps on the chosen ranks.

    Args:
        breakdown: names the parts of a step in the trace.
    """

    def __init__(self, config: RunConfig, rank: int, breakdown: Breakdown) -> None:
        self._left = config.log.profile and rank in config.log.profile_ranks
        self._first, self._last = config.log.profiled_steps if self._left else (0, 0)
        self._folder, self._rank, self._breakdown = Path(config.profile_folder), rank, breakdown
        self._trace: Any = None
        self._recorded: list[int] = []

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Record the code inside the block if step ``number`` is chosen; write the files after the last chosen step."""
        if not (self._left and number >= self._first):
            yield
            return
        if self._trace is None:
            if number > self._last:  # resumed after them
                self._left = False
                self._say(f"profiler: steps {self._first} to {self._last} are over; nothing is recorded")
                yield
                return
            self._start()
        with torch.profiler.record_function(f"step {number}"):
            yield
        self._recorded.append(number)
        if number >= self._last:
            self.close()

    def _start(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=_MEMORY_EVENTS)
        self._breakdown.annotate = True
        configure_nvtx_profiling(True)
        self._trace = torch.profiler.profile(activities=activities, record_shapes=True)
        self._trace.start()

    def close(self) -> None:
        """Write the files, also when the run ends early. If the disk is full, the run continues without them."""
        if self._trace is None:
            return
        trace, self._trace, self._left = self._trace, None, False
        self._breakdown.annotate = False
        configure_nvtx_profiling(False)
        trace.stop()
        steps = f"{self._recorded[0]}-{self._recorded[-1]}" if self._recorded else "none"
        file = self._folder / f"rank{self._rank}.steps{steps}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            trace.export_chrome_trace(f"{file}.pt.trace.json.gz")
            if torch.cuda.is_available():
                torch.cuda.memory._dump_snapshot(f"{file}.memory.pickle")
            self._say(f"profiler: {file}.pt.trace.json.gz written")
        except (OSError, RuntimeError) as error:
            self._say(f"profiler: {file}.pt.trace.json.gz could not be written; the run continues: {error}")
        if torch.cuda.is_available():
            torch.cuda.memory._record_memory_history(enabled=None)

    def _say(self, text: str) -> None:
        to_stderr(f"genlip: rank {self._rank}: {text}")
