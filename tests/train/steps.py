"""A few steps in a process of a distributed test, and micro-batches without a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from genlip_megatron.batch import PackedBatch, Sample, pack_samples
from genlip_megatron.config import ModelConfig, RunConfig
from genlip_megatron.train.setup import set_up
from genlip_megatron.train.state import Run
from genlip_megatron.train.step import train_step
from genlip_megatron.train.verdict import Outcome

MODEL = ModelConfig(2, 32, 2, 48, 24, 61, (4, 2, 2), drop_path_rate=0.2)


def take_steps(
    config: RunConfig, steps: int, skip: int = 0, see: Callable[[Run], Any] = lambda run: None
) -> tuple[Run, list[Outcome], list[Any]]:
    """(the run, the outcomes of its steps, what ``see`` gave before the first step and after each).

    Args:
        skip: steps whose data is skipped before the first step.
    """
    run = set_up(config)
    assert run.train_loader is not None
    if skip:
        run.train_loader.skip(skip)
    batches, outcomes, seen = iter(run.train_loader), [], [see(run)]
    for _ in range(steps):
        outcomes.append(train_step(run, batches))
        seen.append(see(run))
    run.train_loader.close()
    return run, outcomes, seen


def drawn_batch(seed: int, slots: int, lengths: tuple[int, ...] = (9, 7, 10)) -> PackedBatch:
    """Samples in one pack, the first and the third with an image; DropPath drops some branches."""
    rng = np.random.default_rng(seed)

    def samples() -> Iterator[Sample]:
        for i, length in enumerate(lengths):
            rows = int(rng.integers(3, 5)) if i in (0, 2) else 0
            patches = torch.from_numpy(rng.integers(0, 256, (rows * 4, 768), dtype=np.uint8))
            tokens = rng.integers(0, 61, length).tolist()
            loss = [False] * 2 + [True] * (length - 2)
            yield Sample(patches, rows, 4 * (rows > 0), tokens, loss, key=f"{seed}")

    made = pack_samples([list(samples())], slots)
    factors = torch.from_numpy(rng.choice([0.0, 1.25], (MODEL.num_layers, 2, len(made.sample_starts)))).float()
    return replace(made, drop_path=factors)
