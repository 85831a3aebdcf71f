"""What joins an encoder to a language model: the projector, and visual tokens among the embeddings of a text.

B samples, T tokens of the longest one, V size of the vocabulary, D width of the encoder, E width of the language model.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE = -100  # label of a token without loss, as in transformers


class Projector(nn.Sequential):
    """Linear(D, E), GELU, Linear(E, E): ``mlp2x_gelu`` of LLaVA-1.5.

    Args:
        encoder_dim: D.
        llm_dim: E.
    """

    def __init__(self, encoder_dim: int, llm_dim: int) -> None:
        super().__init__(nn.Linear(encoder_dim, llm_dim), nn.GELU(), nn.Linear(llm_dim, llm_dim))


@dataclass(frozen=True)
class Text:
    """The tokens of a sample.

    Attributes:
        ids: token ids.
        answers: for each token, whether it carries loss: those of answers and the end token after each.
        image_at: number of tokens before the image.
        answer_bytes: length of the answers in UTF-8, without end tokens.
    """

    ids: list[int]
    answers: list[bool]
    image_at: int
    answer_bytes: int


@dataclass(frozen=True)
class Spliced:
    """A batch for a causal language model.

    Attributes:
        inputs_embeds: [B, T, E].
        labels: int64 [B, T], the id of each answer token at its own place, IGNORE elsewhere.
        attention_mask: int64 [B, T], 0 for padding.
        position_ids: int64 [B, T], from 0 at the first token of each sample.
    """

    inputs_embeds: Tensor
    labels: Tensor
    attention_mask: Tensor
    position_ids: Tensor


def splice(
    texts: Sequence[Text], visual: Sequence[Tensor | None], embedding: nn.Module, padding_side: str = "right"
) -> Spliced:
    """Put each sample's visual tokens among the embeddings of its text, and pad to one length.

    Args:
        texts: B samples.
        visual: [n, E] of each, the output of the projector; None: no image.
        embedding: ids -> embeddings [.., E] of the language model.
        padding_side: "right", or "left" for generation.
    """
    weight = next(embedding.parameters())
    rows, labels = [], []
    for text, tokens in zip(texts, visual, strict=True):
        embeds = embedding(torch.tensor(text.ids, device=weight.device))
        loss = torch.tensor([i if answer else IGNORE for i, answer in zip(text.ids, text.answers, strict=True)])
        if tokens is not None:
            at = text.image_at
            embeds = torch.cat([embeds[:at], tokens.to(embeds.dtype), embeds[at:]])
            loss = torch.cat([loss[:at], torch.full((len(tokens),), IGNORE), loss[at:]])
        rows.append(embeds)
        labels.append(loss.to(weight.device))
    pad = torch.nn.utils.rnn.pad_sequence
    mask = pad([torch.ones_like(row) for row in labels], True, 0, padding_side)
    return Spliced(
        pad(rows, True, 0.0, padding_side),
        pad(labels, True, IGNORE, padding_side),
        mask,
        (mask.cumsum(1) - 1).clamp(min=0),
    )


def answer_nll(model: Any, batch: Spliced) -> Tensor:
    """float32, the sum of ``-log p`` over the answer tokens of a batch, in nats; gradients flow.

    Logits are computed from the first answer of the batch on, if the model allows it: those of visual tokens would take
    most of the memory.

    Args:
        model: a causal language model of transformers that takes ``inputs_embeds``.
        batch: its first token of a sample is not an answer.
    """
    answers = batch.labels != IGNORE
    first = int(answers.any(dim=0).nonzero()[0])
    keep = batch.labels.shape[1] - first + 1
    known = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {"position_ids": batch.position_ids, "logits_to_keep": keep, "use_cache": False}
    logits = model(
        inputs_embeds=batch.inputs_embeds,
        attention_mask=batch.attention_mask,
        **{name: value for name, value in options.items() if name in known},
    ).logits[:, -keep:-1]  # [B, keep - 1, V]
    chosen = answers[:, first:]
    return F.cross_entropy(logits[chosen].float(), batch.labels[:, first:][chosen], reduction="sum")
