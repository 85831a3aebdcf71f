"""Spikes: steps whose loss or gradient norm is far above those of the last steps.

The judgement depends only on its inputs, so all ranks agree.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import Any

# Standard deviation of normal numbers divided by the median of their distances to the median.
_MAD_TO_SD = 1.4826
# Floors of the spread. A history that hardly moves (one batch repeated, a loss near 0) has a spread near 0, and the
# next rounding error would be a spike. In an ordinary run the floors change nothing: losses move by a percent or more
# per step, gradient norms by a tenth or more. With the default threshold of 10, a spike is at least a 10% higher loss
# or a 65% higher norm.
_LEAST_SD_OF_LOSS = 0.01  # of the median
_LEAST_LOSS = 0.1  # smaller losses count as this much
_LEAST_SD_OF_LOG_NORM = 0.05
_LEAST_NORM = 1e-12


def robust_limit(history: list[float], threshold: float, least_sd: float) -> float:
    """``threshold`` robust standard deviations above the median of ``history``.

    A robust standard deviation is 1.4826 times the median distance to the median (Rousseeuw and Croux 1993): outliers
    among up to half of the numbers hardly change it.

    >>> round(robust_limit([2.0, 2.1, 1.9, 2.0, 50.0], 10, 0.01), 3)  # median 2.0, median distance 0.1
    3.483
    >>> robust_limit([2.0, 2.0, 2.0], 10, 0.02)
    2.2
    """
    middle = median(history)
    spread = median(abs(value - middle) for value in history)
    return middle + threshold * max(_MAD_TO_SD * spread, least_sd)


class SpikeJudge:
    """Compares each step with the steps before it that were updated.

    Args:
        window: number of steps to remember. Until half of them are known, no step is a spike.
        threshold: robust standard deviations above the median from which a step is a spike.

    >>> judge = SpikeJudge(window=4, threshold=10)
    >>> judge.spike(9.0, 9.0)  # too few steps known
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
        """Which number is too high, in words; empty for an ordinary step. Both must be finite. O(window log window)."""
        if len(self._losses) < self._needed:
            return ""
        losses, log_norms = list(self._losses), list(self._log_norms)
        least = _LEAST_SD_OF_LOSS * max(abs(median(losses)), _LEAST_LOSS)
        limits = (
            ("loss", loss, robust_limit(losses, self.threshold, least)),
            # Logarithms, because ratios of norms are meaningful.
            ("gradient norm", grad_norm, _exp(robust_limit(log_norms, self.threshold, _LEAST_SD_OF_LOG_NORM))),
        )
        return ", ".join(f"{name} {value:.4g} above {limit:.4g}" for name, value, limit in limits if value > limit)

    def add(self, loss: float, grad_norm: float) -> None:
        """Remember a step that was updated."""
        self._losses.append(loss)
        self._log_norms.append(math.log(max(grad_norm, _LEAST_NORM)))

    def state_dict(self) -> dict[str, Any]:
        """Plain lists."""
        return {"losses": list(self._losses), "log_norms": list(self._log_norms)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state``, with the newest steps that fit the window."""
        self._losses = deque(state["losses"], self._losses.maxlen)
        self._log_norms = deque(state["log_norms"], self._log_norms.maxlen)


def _exp(value: float) -> float:
    """e to the power of ``value``; infinity if that is too large for a float."""
    return math.exp(value) if value < 700 else math.inf
