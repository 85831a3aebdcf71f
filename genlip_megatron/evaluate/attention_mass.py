"""Attention mass: which share of the attention of one group of tokens goes to the keys of another.

Probabilities are computed for one block of queries at a time and summed over groups of keys at once, so memory grows
with block x S and no matrix [S, S] exists. Every function takes queries and keys as attention multiplies them: after
rotary embedding and before the softmax.

Legend: S tokens, H heads, K heads of keys (K divides H), C channels of a head, R queries of a block, N keys that the
block sees, G groups of keys, Q groups of queries.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 256  # queries


def visible_keys(prefix: int, tokens: int) -> Tensor:
    """int64 [S]: the number of keys that each query sees. They are always the first ones.

    Args:
        prefix: tokens at the start that all see each other, GenLIP's image; 0: causal attention; ``tokens``: full.
        tokens: S.

    >>> visible_keys(2, 4).tolist(), visible_keys(0, 3).tolist()
    ([2, 2, 3, 4], [1, 2, 3])
    """
    return torch.arange(1, tokens + 1).clamp(min=prefix)


def probabilities(
    query: Tensor, key: Tensor, visible: Tensor, scale: float, block: int = BLOCK
) -> Iterator[tuple[slice, Tensor]]:
    """The attention of one block of queries after another.

    Args:
        query: [H, S, C].
        key: [K, S, C]; each head of keys serves H / K heads of queries that follow each other.
        visible: int64 [S], as ``visible_keys``.
        scale: factor of the products before the softmax, usually C ** -0.5.
        block: queries of a block.

    Yields:
        (the block's queries, float32 probabilities [H, R, N]); keys from N on have probability 0.
    """
    query = query.float() * scale
    key = key.float().repeat_interleave(len(query) // len(key), dim=0)
    for start in range(0, len(visible), block):
        rows = slice(start, start + block)
        count = int(visible[rows].max())
        scores = query[:, rows] @ key[:, :count].transpose(1, 2)
        hidden = torch.arange(count) >= visible[rows, None]
        yield rows, scores.masked_fill_(hidden.to(scores.device), -torch.inf).softmax(dim=-1)


def group_mass(
    query: Tensor, key: Tensor, visible: Tensor, scale: float, queries: Tensor, keys: Tensor, block: int = BLOCK
) -> Tensor:
    """float64 [Q, G]: attention summed over the keys of a group, averaged over heads and the queries of a group.

    Rows of groups without queries are NaN. ``query`` to ``block``: see ``probabilities``.

    Args:
        queries: [S, Q], 1 where a token belongs to a group of queries, else 0.
        keys: [S, G], 1 where a token belongs to a group of keys, else 0. Groups may overlap.

    >>> zero = torch.zeros(1, 4, 2)  # equal scores: each query attends equally to the keys that it sees
    >>> image = torch.tensor([[1.0], [1.0], [0.0], [0.0]])
    >>> group_mass(zero, zero, visible_keys(2, 4), 1.0, 1 - image, image)  # (2/3 + 2/4) / 2
    tensor([[0.5833]], dtype=torch.float64)
    """
    total = torch.zeros(queries.shape[1], keys.shape[1], dtype=torch.float64)
    members = keys.to(query.device, torch.float32)
    for rows, attention in probabilities(query, key, visible, scale, block):
        sums = (attention @ members[: attention.shape[2]]).mean(dim=0)  # [R, G]
        total += queries[rows].double().T @ sums.double().cpu()
    return total / queries.double().sum(dim=0)[:, None]


def chance_mass(visible: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """float64 [Q, G]: ``group_mass`` of queries that attend equally to every key that they see.

    >>> image = torch.tensor([[1.0], [1.0], [0.0], [0.0]])
    >>> chance_mass(visible_keys(2, 4), 1 - image, image)
    tensor([[0.5833]], dtype=torch.float64)
    """
    seen = keys.double().cumsum(dim=0)[visible - 1] / visible[:, None]
    return queries.double().T @ seen / queries.double().sum(dim=0)[:, None]


def attention_map(query: Tensor, key: Tensor, visible: Tensor, scale: float, block: int = BLOCK) -> Tensor:
    """float32 [S, S]: the mean over heads of all attention. Arguments: see ``probabilities``.

    >>> attention_map(torch.zeros(2, 2, 4), torch.zeros(2, 2, 4), visible_keys(0, 2), 1.0)
    tensor([[1.0000, 0.0000],
            [0.5000, 0.5000]])
    """
    found = torch.zeros(len(visible), len(visible))
    for rows, attention in probabilities(query, key, visible, scale, block):
        found[rows, : attention.shape[2]] = attention.mean(dim=0).cpu()
    return found
