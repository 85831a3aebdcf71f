"""Mean intersection over union from counts of pixels."""

from __future__ import annotations

import torch
from torch import Tensor


class IoU:
    """Intersections and unions per class, summed over a whole data set and not per image.

    Args:
        classes: C, number of classes.
        ignore: label of pixels that do not count.

    >>> iou = IoU(2)
    >>> iou.add(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 255]))
    >>> iou.per_class().tolist(), iou.mean()
    ([0.5, 0.5], 0.5)
    """

    def __init__(self, classes: int, ignore: int = 255) -> None:
        self._ignore = ignore
        self.counts = torch.zeros(3, classes, dtype=torch.int64)  # intersections, predicted and true pixels [3, C]

    def add(self, predicted: Tensor, truth: Tensor) -> None:
        """Count one or more images: integer classes of any shape; ``truth`` may hold ``ignore``."""
        counted = truth != self._ignore
        predicted, truth = predicted[counted], truth[counted]
        for row, labels in enumerate((predicted[predicted == truth], predicted, truth)):
            self.counts[row] += torch.bincount(labels.flatten(), minlength=self.counts.shape[1]).cpu()

    def per_class(self) -> Tensor:
        """float64 [C]; NaN for a class that is neither predicted nor true."""
        intersection, predicted, true = self.counts.double()
        return intersection / (predicted + true - intersection)

    def mean(self) -> float:
        """Mean over the classes that occur, from 0 to 1."""
        return float(self.per_class().nanmean())
