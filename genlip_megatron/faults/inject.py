"""Fault injection, for drills: ``--allow-fault-injection --inject-fault kill@7:0,nan-loss@9:1``.

A fault is ``kind@step:rank``: it happens on global rank ``rank`` in step ``step`` (the first is 1). ``kill``, ``stop``,
``term`` and ``usr1`` happen at the beginning of the step unless they name a place: ``kill.save@4:1`` happens in the
save of step 4, ``kill.validation@4:0`` in the validation after it.

A fault does not happen again after a restart by torchrun or a rollback.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from genlip_megatron.log import to_stderr

PLACES = ("step", "validation", "save")
SENT = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM, "usr1": signal.SIGUSR1}
_HERE = ("exit", "raise", "hang")  # at the beginning of the step
_DONE_BY_CALLER = (
    "nan-loss",  # the rank's part of the model returns NaN, in every pass
    "transient-nan",  # the same in the first pass only
    "nan-grad",
    "inf-grad",
    "spike",  # the rank's gradients are 10,000 times too large
    "flip",  # one bit of a weight flips after the step
    "full-disk",  # the save of the step finds no space
)
KINDS = (*SENT, *_HERE, *_DONE_BY_CALLER)
_FORM = re.compile(r"([^@.]*)(?:\.([^@]+))?@(\d*[1-9]\d*):(\d+)")


class InjectedError(RuntimeError):
    """The exception of ``raise``."""


@dataclass(frozen=True)
class Fault:
    """A fault to inject."""

    kind: str
    place: str
    step: int
    rank: int


def parse_faults(texts: Sequence[str]) -> list[Fault]:
    """The faults of ``faults.inject_fault``; ``config.checks`` checks kinds, places, steps and ranks.

    Raises:
        ValueError: a wrong form.

    >>> parse_faults(["kill.save@4:1"])
    [Fault(kind='kill', place='save', step=4, rank=1)]
    """
    faults = []
    for text in texts:
        if not (found := _FORM.fullmatch(text)):
            raise ValueError(
                f"faults.inject_fault = {text}: not kind@step:rank with a step from 1 on. Use for example kill@7:0."
            )
        kind, place, step, rank = found.groups()
        faults.append(Fault(kind, place or "step", int(step), int(rank)))
    return faults


def flip_bit(parameters: Iterable[Any]) -> None:
    """Flip the lowest bit of the first value of the first parameter."""
    import torch  # not at the top: settings are checked without torch

    first = next(iter(parameters)).data.view(-1)[:1]
    first.copy_((first.view({2: torch.int16, 4: torch.int32}[first.element_size()]) ^ 1).view(first.dtype))


class Injector:
    """The faults of one rank.

    Args:
        texts: ``faults.inject_fault``; ignored after a restart by torchrun.
        rank: global rank.
    """

    def __init__(self, texts: Sequence[str], rank: int) -> None:
        first_start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        self._faults = [fault for fault in parse_faults(texts) if first_start and fault.rank == rank]
        self._reached = 0

    def at(self, place: str, step: int) -> None:
        """Inject the faults of ``place`` in ``step``; call at the beginning of each step."""
        assert place in PLACES
        if place == "step":
            if step <= self._reached:  # the run has rolled back
                self._faults = [fault for fault in self._faults if fault.step > self._reached]
            self._reached = max(self._reached, step)
        for kind, number in SENT.items():
            if self._due(kind, place, step):
                os.kill(os.getpid(), number)
        if place != "step":
            return
        if self.fires("exit", step):
            sys.exit(1)
        if self.fires("raise", step):
            raise InjectedError(
                f"faults.inject_fault = raise: raised in step {step}. Remove the setting from real runs."
            )
        while self.fires("hang", step):
            time.sleep(1)

    def fires(self, kind: str, step: int) -> bool:
        """Whether the caller must inject ``kind`` in ``step``."""
        return self._due(kind, "step", step)

    def _due(self, kind: str, place: str, step: int) -> bool:
        found = [f for f in self._faults if (f.kind, f.place, f.step) == (kind, place, step)]
        if found:
            to_stderr(f"fault injected: {kind} in step {step}")
        return bool(found)
