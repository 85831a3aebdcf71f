"""Scores with a shared prefix and shared beginnings equal a full pass for each image and text."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from genlip_megatron.evaluate.likelihood import LikelihoodScorer, TokenTree, trees
from genlip_megatron.hf.configuration_genlip import GenLIPConfig
from genlip_megatron.hf.modeling_genlip import GenLIPForCausalLM
from genlip_megatron.infer.prepare import Prepared

PROMPT = [3, 1, 4]


@pytest.fixture(scope="module")
def model() -> GenLIPForCausalLM:
    torch.manual_seed(0)
    config = GenLIPConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        text_embed_dim=24,
        vocab_size=50,
        initializer_range=0.3,
    )
    return GenLIPForCausalLM(config).eval()


def image(rows: int, columns: int) -> Prepared:
    return Prepared(0, {}, torch.randn(rows * columns, 768), rows, columns)


def texts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randint(0, 4, (1 + i % 5,), generator=generator).tolist() for i in range(count)]


def full_pass(model: GenLIPForCausalLM, picture: Prepared | None, text: list[int]) -> float:
    ids = torch.tensor([PROMPT + text])
    inputs = {}
    if picture is not None:
        inputs = {"pixel_values": picture.patches, "image_grid_hw": torch.tensor([[picture.rows, picture.columns]])}
    with torch.inference_mode():
        chosen = model(ids, **inputs).logits[0].log_softmax(dim=-1)
    return sum(float(chosen[len(PROMPT) - 1 + i, token]) for i, token in enumerate(text))


@pytest.mark.parametrize("most_nodes", [6, 20, 512])
def test_scores_equal_full_passes(model: GenLIPForCausalLM, most_nodes: int) -> None:
    torch.manual_seed(1)
    pictures, candidates = [image(2, 3), image(4, 2), image(2, 3)], texts(23)
    scorer = LikelihoodScorer(model, PROMPT, candidates, most_nodes)
    expected = [[full_pass(model, picture, text) for text in candidates] for picture in pictures]
    torch.testing.assert_close(scorer(pictures), torch.tensor(expected), rtol=0, atol=1e-4)
    blind = [full_pass(model, None, text) for text in candidates]
    torch.testing.assert_close(scorer.without_image(), torch.tensor(blind), rtol=0, atol=1e-4)


def test_groups_hold_every_text_once_and_keep_the_limit() -> None:
    candidates = texts(60)
    for most in (5, 9, 100):
        groups = trees(candidates, most)
        assert sorted(number for numbers, _ in groups for number in numbers) == list(range(60))
        for numbers, tree in groups:
            assert len(tree.tokens) <= most
            for number, end in zip(numbers, tree.ends.tolist(), strict=True):
                path = []
                while end >= 0:
                    path.append(int(tree.tokens[end]))
                    end = int(tree.parents[end])
                assert path[::-1] == candidates[number]


def test_a_shared_beginning_runs_once() -> None:
    tree = TokenTree([[1, 2, 3, token] for token in range(10)])
    assert len(tree.tokens) == 13 and tree.inner.tolist() == [0, 1, 2]
