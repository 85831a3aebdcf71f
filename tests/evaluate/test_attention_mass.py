"""evaluate/attention_mass.py and patch_statistics.py against full matrices, and their memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from genlip_megatron.evaluate.attention_capture import Tokens
from genlip_megatron.evaluate.attention_mass import (
    attention_map,
    chance_mass,
    group_mass,
    probabilities,
    visible_keys,
)
from genlip_megatron.evaluate.patch_statistics import mean_cosine, norm_histogram, outlier_share

TOKENS = Tokens(prefix=1, image=9, prompt=4, generated=6)
SCALE = 8**-0.5


def draw(tokens: int, heads: int = 4, key_heads: int = 2) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return 2 * torch.randn(heads, tokens, 8), 2 * torch.randn(key_heads, tokens, 8)


def full(query: Tensor, key: Tensor, prefix: int) -> Tensor:
    """[H, S, S] in float64, from a mask of pairs."""
    tokens = query.shape[1]
    query_index, key_index = torch.arange(tokens)[:, None], torch.arange(tokens)[None]
    seen = (key_index <= query_index) | ((query_index < prefix) & (key_index < prefix))
    keys = torch.stack([key[head * len(key) // len(query)] for head in range(len(query))]).double()
    scores = torch.einsum("hqc,hkc->hqk", query.double(), keys) * SCALE
    return scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)


@pytest.mark.parametrize("block", [1, 7, 256])
def test_blocks_of_any_size_give_the_full_matrix(block: int) -> None:
    query, key = draw(len(TOKENS))
    expected = full(query, key, 10)
    for rows, found in probabilities(query, key, visible_keys(10, 20), SCALE, block):
        torch.testing.assert_close(found.sum(dim=-1), torch.ones(found.shape[:2]), atol=1e-5, rtol=0)
        torch.testing.assert_close(found.double(), expected[:, rows, : found.shape[2]], atol=1e-6, rtol=0)
    mean = attention_map(query, key, visible_keys(10, 20), SCALE, block).double()
    torch.testing.assert_close(mean, expected.mean(dim=0), atol=1e-6, rtol=0)


@pytest.mark.parametrize("block", [1, 7, 256])
def test_mass_is_the_sum_over_keys_and_the_mean_over_heads_and_queries(block: int) -> None:
    query, key = draw(len(TOKENS))
    mean = full(query, key, 10).mean(dim=0)
    queries = {"image": slice(1, 10), "prompt": slice(10, 14), "generated": slice(14, 20)}
    keys = {"first": slice(0, 1), "prefix": slice(0, 1), "image": queries["image"], "sink": slice(10, 12)}
    keys |= {"prompt": queries["prompt"], "generated": queries["generated"]}
    expected = torch.stack(
        [torch.stack([mean[q, k].sum(dim=1).mean() for k in keys.values()]) for q in queries.values()]
    )
    visible = visible_keys(10, 20)
    found = group_mass(query, key, visible, SCALE, TOKENS.queries(), TOKENS.keys(), block)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    equal = torch.zeros_like(query)
    chance = group_mass(equal, equal, visible, SCALE, TOKENS.queries(), TOKENS.keys(), block)
    torch.testing.assert_close(chance_mass(visible, TOKENS.queries(), TOKENS.keys()), chance, atol=1e-6, rtol=0)


def test_the_first_token_can_be_left_out_of_the_queries() -> None:
    query, key = draw(9)
    query[:, 0] = 20 * key.repeat_interleave(2, dim=0)[:, 0]  # the first token sees only itself
    tokens = Tokens(prefix=0, image=9)
    mean = full(query, key, 9).mean(dim=0)
    for exclude_self, rows in ((False, slice(0, 9)), (True, slice(1, 9))):
        found = group_mass(query, key, visible_keys(9, 9), SCALE, tokens.queries(exclude_self), tokens.keys())
        assert float(found[0, 0]) == pytest.approx(float(mean[rows, 0].mean()), abs=1e-6)


def test_a_group_without_queries_has_no_mass() -> None:
    query, key = draw(5)
    tokens = Tokens(prefix=0, image=5)
    found = group_mass(query, key, visible_keys(5, 5), SCALE, tokens.queries(), tokens.keys())
    assert found[0].isfinite().all() and found[1:].isnan().all()


class LargestTensor(TorchDispatchMode):
    """Counts the elements of the largest tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_memory_grows_with_the_sequence_and_not_with_its_square() -> None:
    largest = []
    for tokens in (256, 512, 1024):
        query, key = draw(tokens, heads=2)
        groups = Tokens(prefix=0, image=tokens - 40, prompt=10, generated=30)
        with LargestTensor() as counter:
            group_mass(query, key, visible_keys(tokens - 40, tokens), SCALE, groups.queries(), groups.keys(), 32)
        largest.append(counter.elements)
    assert largest == [2 * 32 * tokens for tokens in (256, 512, 1024)]


def test_patch_statistics_equal_those_of_all_pairs() -> None:
    torch.manual_seed(0)
    patches = torch.randn(30, 5) + 0.5
    patches[3] *= 20
    cosine = torch.nn.functional.cosine_similarity(patches[:, None], patches[None], dim=2)
    expected = (cosine.sum() - 30) / (30 * 29)
    assert mean_cosine(patches) == pytest.approx(float(expected), abs=1e-6)
    norms = patches.norm(dim=1)
    assert outlier_share(patches) == pytest.approx(float((norms > 3 * norms.median()).float().mean()))
    histogram = norm_histogram(patches)
    assert histogram.sum() == 30 and histogram[-20:].sum() >= 1  # the outlier is above 10 medians
    assert norm_histogram(torch.zeros(4, 5)).sum() == 4 and outlier_share(torch.zeros(4, 5)) == 0
