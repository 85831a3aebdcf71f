"""Samples of a probe: their order, and their preparation in worker processes."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from genlip_megatron.evaluate import ranks

Result = TypeVar("Result")


class _Jobs(Dataset[Any]):
    def __init__(self, function: Callable[[Any], Any], jobs: Sequence[Any]) -> None:
        self._function, self._jobs = function, jobs

    def __len__(self) -> int:
        return len(self._jobs)

    def __getitem__(self, number: int) -> Any:
        try:
            return self._function(self._jobs[number])
        except ValueError as error:  # an exception would come back with the worker's traceback in its text
            return str(error)


def in_workers(function: Callable[[Any], Result], jobs: Sequence[Any], workers: int) -> Iterator[Result]:
    """``function(job)`` of every job, in order.

    Args:
        function: returns tensors, or lists and tuples of them.
        jobs: its arguments.
        workers: processes that run ahead, at most one for each core; 0: none.

    Raises:
        ValueError: the function raised it.
    """
    workers = min(workers, len(os.sched_getaffinity(0)))  # more would only take the cores from each other
    context = "fork" if workers else None  # the function and the data are not copied
    loader = DataLoader(
        _Jobs(function, jobs), batch_size=None, num_workers=workers, multiprocessing_context=context, shuffle=False
    )
    for result in loader:
        if isinstance(result, str):
            raise ValueError(result)
        yield result


def each_in_workers(function: Callable[[int], Result], numbers: Sequence[int], workers: int) -> Iterator[Result]:
    """``function(number)`` of every number, in order, as ``in_workers``; a worker gets 16 numbers at a time."""
    jobs = [numbers[start : start + 16] for start in range(0, len(numbers), 16)]
    return itertools.chain.from_iterable(in_workers(lambda job: [function(number) for number in job], jobs, workers))


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def training_order(numbers: np.ndarray, seed: int, start: int, end: int) -> list[tuple[int, int]]:
    """(sample, position) of the positions ``start`` to ``end`` of an endless order, each epoch another permutation.

    Args:
        numbers: those of the samples.
        seed: of the order.
        start, end: positions, from 0.
    """
    found = []
    for position in range(start, end):
        epoch, place = divmod(position, len(numbers))
        found.append((int(numbers[_permutation(len(numbers), seed, epoch)[place]]), position))
    return found


class TrainingBatches(Sequence[list[tuple[int, int]]]):
    """This rank's part of the batch of each step, as (sample, position) pairs; it does not depend on earlier steps.

    Args:
        numbers: those of the samples.
        seed: of the order.
        start, steps: the first step, and the one after the last.
        batch_size: of all ranks together.
    """

    def __init__(self, numbers: np.ndarray, seed: int, start: int, steps: int, batch_size: int) -> None:
        self._numbers, self._seed, self._start, self._steps = numbers, seed, start, steps
        self._batch_size, self._share = batch_size, batch_size // ranks.world_size()

    def __len__(self) -> int:
        return self._steps - self._start

    def __getitem__(self, step: Any) -> Any:
        if not 0 <= step < len(self):
            raise IndexError(step)
        first = (self._start + step) * self._batch_size + ranks.rank() * self._share
        return training_order(self._numbers, self._seed, first, first + self._share)


def this_ranks(numbers: np.ndarray, batch_size: int) -> list[list[int]]:
    """This rank's samples of an evaluation, in batches."""
    mine = numbers[ranks.rank() :: ranks.world_size()].tolist()
    return [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]


def padded(patches: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """(float32 [B, P, D], valid bool [B, P]) of features [p, D] with p <= P; valid is None if all have P patches."""
    if len({len(features) for features in patches}) == 1:
        return torch.stack(list(patches)).float(), None
    x = torch.nn.utils.rnn.pad_sequence(list(patches), batch_first=True).float()
    lengths = torch.tensor([len(features) for features in patches], device=x.device)
    return x, torch.arange(x.shape[1], device=x.device) < lengths[:, None]


def check_batch_size(batch_size: int) -> None:
    """Raise ValueError if the ranks cannot share a batch equally."""
    if batch_size < 1 or batch_size % ranks.world_size():
        raise ValueError(
            f"--batch-size {batch_size}: {ranks.world_size()} ranks cannot share it equally. Choose a multiple of them."
        )
