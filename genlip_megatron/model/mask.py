"""The attention rule.

A query sees a key of its own sample if the key is an image token, or if the query is a text token and the key is not
after it. Image queries never see text. Padding sees nothing, and nothing sees padding. Every attention backend is
tested against this function.
"""

from __future__ import annotations

import torch
from torch import Tensor


def prefix_lm_mask(sample_ids: Tensor, is_image: Tensor) -> Tensor:
    """bool [S, S], True where the query (row) sees the key (column), from int64 [S], -1 at padding, and bool [S].

    Example: one sample of two patches and two text tokens, then one slot of padding:

        >>> prefix_lm_mask(torch.tensor([0, 0, 0, 0, -1]), torch.tensor([1, 1, 0, 0, 0]).bool()).int()
        tensor([[1, 1, 0, 0, 0],
                [1, 1, 0, 0, 0],
                [1, 1, 1, 0, 0],
                [1, 1, 1, 1, 0],
                [0, 0, 0, 0, 0]], dtype=torch.int32)
    """
    slots = torch.arange(sample_ids.shape[0], device=sample_ids.device)
    same = (sample_ids[:, None] == sample_ids[None, :]) & (sample_ids >= 0)[:, None]
    causal = slots[None, :] <= slots[:, None]
    return same & (is_image[None, :] | (~is_image[:, None] & causal))
