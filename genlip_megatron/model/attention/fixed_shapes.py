"""Shapes of kernel calls that do not depend on the samples, so that a CUDA graph serves many micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from genlip_megatron.batch import power_of_two


@dataclass(frozen=True)
class FixedShapes:
    """Room for every micro-batch of a run.

    Attributes:
        slots: rows of every gathered tensor (S); rows behind the last sequence are padding.
        samples: sequences of every call; more, which is rare, are rounded up to a power of two.
    """

    slots: int
    samples: int

    def padded(self, lengths: np.ndarray) -> np.ndarray:
        """Sequence lengths followed by empty sequences.

        >>> FixedShapes(64, 4).padded(np.array([7, 2])).tolist()
        [7, 2, 0, 0]
        """
        return np.pad(lengths, (0, max(self.samples, power_of_two(len(lengths))) - len(lengths)))

    def rounded(self, longest: int, least: int) -> int:
        """The longest sequence, rounded up to a power of two of at least ``least``.

        >>> FixedShapes(64, 4).rounded(196, 128)
        256
        """
        return power_of_two(max(longest, least))
