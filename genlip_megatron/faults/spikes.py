"""Spikes: steps whose loss or gradient norm stands far above those of the last steps.

A plain function of the numbers it is given, so that every rank, given the same ones, says the same.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import Any

# Standard deviation of normal numbers over the median of their distances to the median.
_MAD_TO_SD = 1.4826
# The least spread that is believed. A history that hardly moves (one batch again and again, a loss near 0) has a
# spread near 0, by which the next rounding error would be a spike. From step to step language-model losses move by a
# percent or more and gradient norms by a tenth or more, so that these floors change nothing in an ordinary run; with
# the default threshold of 10 they ask for a loss 10% higher, or a norm 65% higher, before anything is called a spike.
_LEAST_SD_OF_LOSS = 0.01  # of the median
_LEAST_LOSS = 0.1  # below it losses count as this much
_LEAST_SD_OF_LOG_NORM = 0.05
_LEAST_NORM = 1e-12


def robust_limit(history: list[float], threshold: float, least_sd: float) -> float:
    """``threshold`` robust standard deviations above the median of ``history``.

    A robust standard deviation is 1.4826 times the median distance to the median (Rousseeuw and Croux 1993): up to
    half of the numbers may be wild without moving it far.

    >>> round(robust_limit([2.0, 2.1, 1.9, 2.0, 50.0], 10, 0.01), 3)  # median 2.0, median distance 0.1
    3.483
    >>> robust_limit([2.0, 2.0, 2.0], 10, 0.02)
    2.2
    """
    middle = median(history)
    spread = median(abs(value - middle) for value in history)
    return middle + threshold * max(_MAD_TO_SD * spread, least_sd)


class SpikeJudge:
    """Judges each step by those before it whose update was made.

    Args:
        window: steps that are remembered; half of them must be there before anything is a spike.
        threshold: robust standard deviations above the median that make a spike.

    >>> judge = SpikeJudge(window=4, threshold=10)
    >>> judge.spike(9.0, 9.0)  # too early to say
    ''
    >>> for loss in (2.0, 2.1):
    ...     judge.add(loss, 0.5)
    >>> judge.spike(2.3, 0.6)
    ''
    >>> judge.spike(2.1, 40.0)
    'gradient norm 40 above 0.8244'
    >>> judge.spike(9.0, 0.5)
    'loss 9 above 2.791'
    """

    def __init__(self, window: int, threshold: float) -> None:
        self.threshold, self._needed = threshold, max(window // 2, 1)
        self._losses: deque[float] = deque(maxlen=window)
        self._log_norms: deque[float] = deque(maxlen=window)

    def spike(self, loss: float, grad_norm: float) -> str:
        """What stands out, in words; empty for an ordinary step. Both numbers are finite. O(window log window)."""
        if len(self._losses) < self._needed:
            return ""
        losses, log_norms = list(self._losses), list(self._log_norms)
        least = _LEAST_SD_OF_LOSS * max(abs(median(losses)), _LEAST_LOSS)
        limits = (
            ("loss", loss, robust_limit(losses, self.threshold, least)),
            # Norms are compared by their logarithm, since it is their ratio that means something.
            ("gradient norm", grad_norm, _exp(robust_limit(log_norms, self.threshold, _LEAST_SD_OF_LOG_NORM))),
        )
        return ", ".join(f"{name} {value:.4g} above {limit:.4g}" for name, value, limit in limits if value > limit)

    def add(self, loss: float, grad_norm: float) -> None:
        """Remember a step whose update was made."""
        self._losses.append(loss)
        self._log_norms.append(math.log(max(grad_norm, _LEAST_NORM)))

    def state_dict(self) -> dict[str, Any]:
        """Plain lists."""
        return {"losses": list(self._losses), "log_norms": list(self._log_norms)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state``; of a longer window the newest steps are kept."""
        self._losses = deque(state["losses"], self._losses.maxlen)
        self._log_norms = deque(state["log_norms"], self._log_norms.maxlen)


def _exp(value: float) -> float:
    """e to the power of ``value``, which a wild history can make too large for a float."""
    return math.exp(value) if value < 700 else math.inf
