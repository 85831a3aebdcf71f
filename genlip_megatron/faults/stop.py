"""Signals: a run that is told to stop saves first.

SIGTERM and SIGUSR1 on any rank set a flag; all ranks agree on it after each step, save, and exit with status 17. A
second signal stops at once.
"""

from __future__ import annotations

import signal
from types import FrameType

import torch


class StopRequest:
    """Whether this run has been told to stop."""

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise SystemExit(128 + number)
        self.requested = True

    def agreed(self, device: torch.device) -> bool:
        """True on every rank once any rank was told to stop. A collective over all ranks."""
        flag = torch.tensor([float(self.requested)], device=device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return bool(flag.item())
