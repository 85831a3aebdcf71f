"""The state of a training run: its parts and its counters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.timers import Timers
from torch import Tensor

from genlip_megatron.checkpoint.saving import Saver
from genlip_megatron.config import RunConfig
from genlip_megatron.data.loader import Loader
from genlip_megatron.data.quarantine import BadShare
from genlip_megatron.faults.inject import Injector
from genlip_megatron.faults.watchdog import Watchdog
from genlip_megatron.model.flops import COUNTS
from genlip_megatron.model.fp8_state import FP8Snapshot
from genlip_megatron.train.breakdown import Breakdown
from genlip_megatron.train.graphs import GraphedStage
from genlip_megatron.train.profile import Profiler
from genlip_megatron.train.verdict import Verdicts
from genlip_megatron.train.writer import Writer


@dataclass
class Run:
    """A training run on this rank.

    Attributes:
        model: this rank's chunks, wrapped for data parallelism.
        optimizer: any of Megatron-Core's, or ``FullyShardedOptimizer``.
        graphed_stage: replays CUDA graphs in place of the model; None without ``train.cuda_graph``.
        verdicts: judges each step, and counts spikes, skipped steps and rollbacks.
        fp8_snapshot: FP8 scales before the current step.
        counts: float64 [len(COUNTS)] on the CPU, what this rank trained on since the last report.
        iteration: steps done.
        consumed_samples, consumed_tokens: of the whole run, up to the last report.
        quarantined: bad samples of the whole run, up to the last report.
        counted: counters of the last report that are not 0; None before the first.
        validated: step and loss of the last validation.
    """

    config: RunConfig
    model: list[Any]
    optimizer: Any
    scheduler: Any
    graphed_stage: GraphedStage | None
    verdicts: Verdicts
    fp8_snapshot: FP8Snapshot
    injector: Injector
    timers: Timers
    breakdown: Breakdown
    profiler: Profiler
    watchdog: Watchdog = field(default_factory=lambda: Watchdog(0))
    train_loader: Loader | None = None
    valid_loader: Loader | None = None
    saver: Saver | None = None
    writer: Writer | None = None
    bad_share: BadShare = field(default_factory=lambda: BadShare(1.0))
    counts: Tensor = field(default_factory=lambda: torch.zeros(len(COUNTS), dtype=torch.float64))
    iteration: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    quarantined: int = 0
    counted: dict[str, int] | None = None
    validated: tuple[int, float] = (-1, 0.0)

    def close(self) -> None:
        """Flush the writers and end the threads of the loaders and the saver. Not a collective."""
        for part in (self.profiler, self.writer, self.saver, self.train_loader, self.valid_loader):
            if part is not None:
                part.close()
