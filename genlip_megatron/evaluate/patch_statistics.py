"""Statistics of one image's patch vectors: how alike they are, and how many have an outlying norm.

Legend: P patches, D channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

OUTLIER = 3.0  # a patch is an outlier if its norm is more than this times the median norm of its image
# Edges of the histogram of norms / median norm of the image. The first and last bin also count what lies beyond.
NORM_EDGES = tuple(round(10 ** (step / 20), 4) for step in range(-20, 41))  # 0.1 to 100, 20 bins for a factor of 10


def mean_cosine(patches: Tensor) -> float:
    """Mean cosine over all pairs of different patches; 1 if all are alike, NaN for a single patch.

    Computed from the norm of the sum of the unit vectors u: ``(|sum u|^2 - P) / (P (P - 1))``, without pairs.

    Args:
        patches: [P, D].

    >>> mean_cosine(torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0]]))  # cosines 1, 0, 0
    0.3333333333333333
    """
    unit = torch.nn.functional.normalize(patches.float(), dim=1)
    count = len(unit)
    square = float(unit.sum(dim=0).double().square().sum())
    return (square - count) / (count * (count - 1)) if count > 1 else float("nan")


def relative_norms(patches: Tensor) -> Tensor:
    """float32 [P]: each patch's norm over the median norm of the image; all 1 if the median is 0.

    >>> relative_norms(torch.tensor([[2.0, 0.0], [0.0, 2.0], [6.0, 8.0]]))
    tensor([1., 1., 5.])
    """
    norms = patches.float().norm(dim=1)
    median = norms.median()
    return norms / median if median > 0 else torch.ones_like(norms)


def outlier_share(patches: Tensor) -> float:
    """Share of patches whose norm is more than ``OUTLIER`` times the median norm of the image.

    Darcet et al., "Vision Transformers Need Registers", cut at a fixed norm that fits one model. A multiple of the
    median fits all of them.

    >>> outlier_share(torch.tensor([[2.0, 0.0], [0.0, 2.0], [6.0, 8.0], [2.0, 0.0]]))
    0.25
    """
    return float((relative_norms(patches) > OUTLIER).float().mean())


def norm_histogram(patches: Tensor) -> Tensor:
    """float64 [bins]: number of patches for each bin of ``NORM_EDGES``."""
    edges = torch.tensor(NORM_EDGES)
    bins = torch.bucketize(relative_norms(patches).cpu(), edges, right=True) - 1
    return torch.bincount(bins.clamp(0, len(edges) - 2), minlength=len(edges) - 1).double()
