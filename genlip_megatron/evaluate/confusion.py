"""Which classes are taken for which others."""

from __future__ import annotations

import io
from collections.abc import Sequence

import torch
from torch import Tensor

from genlip_megatron.evaluate import drawing

_MOST_NAMES = 60  # more do not fit beside the matrix


def confusion(labels: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """int64 [classes, classes]: images of each class (row) that were taken for each class (column).

    Args:
        labels, predicted: int64 [images].
        classes: number of classes.

    >>> confusion(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]), 2).tolist()
    [[1, 1], [0, 1]]
    """
    return torch.bincount(labels * classes + predicted, minlength=classes**2).view(classes, classes)


def confusion_picture(counts: Tensor, names: Sequence[str], title: str) -> bytes:
    """A PNG of a confusion matrix in percent of each row; with names of classes if they fit, else with numbers."""
    pyplot = drawing.pyplot()
    shares = (100 * counts / counts.sum(dim=1, keepdim=True).clamp(min=1)).numpy()
    classes = len(names)
    named = classes <= _MOST_NAMES
    side = 3.5 + 0.32 * classes if named else 8  # inches
    with pyplot.rc_context({"font.size": 9}):
        figure, axes = pyplot.subplots(figsize=(side + 1, side), layout="constrained")
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100, interpolation="nearest" if named else "auto")
        figure.colorbar(image, shrink=0.8, label="% of the images of the class")
        if named:
            shown = [name if len(name) <= 24 else f"{name[:21]}..." for name in names]
            axes.set_xticks(range(classes), shown, rotation=90)
            axes.set_yticks(range(classes), shown)
        axes.set_xlabel("predicted class")
        axes.set_ylabel("class of the image")
        axes.set_title(title if len(title) <= 48 else f"...{title[-45:]}", fontsize=9)
        if classes <= 15:
            for row in range(classes):
                for column in range(classes):
                    share = float(shares[row, column])
                    colour = "white" if share > 60 else "black"
                    axes.text(column, row, f"{share:.0f}", ha="center", va="center", color=colour, fontsize=8)
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=150)
        pyplot.close(figure)
    return content.getvalue()
