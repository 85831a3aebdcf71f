"""Tokens, label masks and splicing against sequences written by hand; NLL against log-probabilities token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from genlip_megatron.evaluate.language_model import LanguageModel
from genlip_megatron.evaluate.projector import IGNORE, Text, answer_nll, splice
from tests.evaluate.tiny_llm import tiny_tokenizer

TURNS = [("Which colour?", False), ("red", True), ("Which shape?", False), ("a circle", True)]


def language(tokenizer: Any) -> LanguageModel:
    return LanguageModel("tiny", nn.Linear(1, 1), tokenizer)


def spelled(text: Text, tokenizer: Any) -> tuple[str, str, str]:
    """(text before the image, text after it, the answers with | between separate ones)."""
    decode = tokenizer.decode
    answers, previous = "", False
    for token, answer in zip(text.ids, text.answers, strict=True):
        answers += ("|" if answer and not previous else "") + (decode([token]) if answer else "")
        previous = answer
    return decode(text.ids[: text.image_at]), decode(text.ids[text.image_at :]), answers


def test_a_caption_is_image_then_caption_without_a_prompt() -> None:
    tokenizer = tiny_tokenizer()
    text = language(tokenizer).caption([("Describe it.", False), ("A red circle.", True)])
    assert spelled(text, tokenizer) == ("<|im_end|>", "A red circle.<|im_end|>", "|A red circle.<|im_end|>")
    assert text.answers == [False, *[True] * (len(text.ids) - 1)] and text.answer_bytes == 13


def test_the_label_mask_of_chatml_is_the_answers_and_their_ends() -> None:
    tokenizer = tiny_tokenizer()
    text = language(tokenizer).conversation(TURNS)
    before, after, answers = spelled(text, tokenizer)
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    assert before == f"{system}<|im_start|>user\n"
    assert after == (
        "\nWhich colour?<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n"
        "<|im_start|>user\nWhich shape?<|im_end|>\n<|im_start|>assistant\na circle<|im_end|>\n"
    )
    assert answers == "|red<|im_end|>|a circle<|im_end|>" and text.answer_bytes == len("reda circle")


def test_the_label_mask_without_chatml_tokens() -> None:
    tokenizer = tiny_tokenizer(("<s>", "</s>"))
    tokenizer.bos_token = "<s>"
    text = language(tokenizer).conversation(TURNS)
    before, after, answers = spelled(text, tokenizer)
    assert before == "<s>USER: "
    assert after == "\nWhich colour? ASSISTANT: red</s>USER: Which shape? ASSISTANT: a circle</s>"
    assert answers == "|red</s>|a circle</s>"


def test_an_answer_without_a_question_and_control_tokens_in_a_text() -> None:
    tokenizer = tiny_tokenizer()
    text = language(tokenizer).conversation([("é <|im_start|>", True)])
    assert spelled(text, tokenizer)[1].startswith("<|im_end|>\n<|im_start|>assistant\n")
    assert text.ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 3  # system, user, assistant
    assert text.answer_bytes == len("é <|im_start|>".encode())


TEXTS = [
    Text([1, 2, 3, 4], [False, False, True, True], 1, 2),
    Text([5, 6], [False, True], 2, 1),
    Text([7, 8, 9], [False, False, True], 0, 1),
]


@pytest.mark.parametrize("side", ["right", "left"])
def test_splicing_by_hand(side: str) -> None:
    embedding = nn.Embedding(12, 1)
    nn.init.constant_(embedding.weight, 0)
    with torch.no_grad():
        embedding.weight += torch.arange(12.0)[:, None]
    batch = splice(TEXTS, [torch.tensor([[-1.0], [-2.0]]), torch.tensor([[-3.0]]), None], embedding, side)
    x = IGNORE
    rows: list[tuple[list[float], list[int]]] = [
        ([1, -1, -2, 2, 3, 4], [x, x, x, x, 3, 4]),
        ([5, 6, -3], [x, 6, x]),
        ([7, 8, 9], [x, x, 9]),
    ]
    for row, (values, labels) in enumerate(rows):
        pad = 6 - len(values)
        places = slice(0, len(values)) if side == "right" else slice(pad, 6)
        assert batch.inputs_embeds[row, places, 0].tolist() == values
        assert batch.labels[row, places].tolist() == labels
        assert batch.position_ids[row, places].tolist() == list(range(len(values)))
        assert batch.attention_mask[row].sum() == len(values) and batch.attention_mask[row, places].all()
        assert (batch.labels[row] != x).sum() == sum(label != x for label in labels)


def models() -> list[Any]:
    """One with rotary positions that takes ``logits_to_keep``, one with learned positions."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    llama = LlamaConfig(
        vocab_size=12,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        initializer_range=0.5,
    )
    gpt = GPT2Config(vocab_size=12, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.5)
    return [LlamaForCausalLM(llama).eval(), GPT2LMHeadModel(gpt).eval()]


@pytest.mark.parametrize("number", [0, 1])
@torch.no_grad()
def test_nll_is_the_sum_over_answer_tokens_whatever_the_batch_and_the_padding(number: int) -> None:
    model = models()[number]
    embedding = model.get_input_embeddings()
    visual: list[Tensor | None] = [torch.randn(3, 16), None, torch.randn(1, 16)]
    expected = []
    for text, tokens in zip(TEXTS, visual, strict=True):
        ids, at = torch.tensor(text.ids), text.image_at
        parts = [embedding(ids[:at]), *([] if tokens is None else [tokens]), embedding(ids[at:])]
        chosen = model(inputs_embeds=torch.cat(parts)[None]).logits[0].log_softmax(dim=-1)
        shift = [i + (0 if tokens is None or i < at else len(tokens)) for i in range(len(ids))]
        pairs = zip(shift, text.ids, text.answers, strict=True)
        expected.append(-sum(float(chosen[place - 1, token]) for place, token, answer in pairs if answer))
    for side in ("right", "left"):
        together = answer_nll(model, splice(TEXTS, visual, embedding, side))
        assert float(together) == pytest.approx(sum(expected), abs=1e-4)
    for text, tokens, nll in zip(TEXTS, visual, expected, strict=True):
        assert float(answer_nll(model, splice([text], [tokens], embedding))) == pytest.approx(nll, abs=1e-4)
