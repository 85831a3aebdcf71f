"""Loss of true captions, and attribute accuracy of generated captions of rendered scenes.

The loss is that of training: -sum log p(token) / sum tokens, over the answers and the tokens that end a sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genlip_megatron.data.text import check_turns, strip_image_marker, tokenize_many
from genlip_megatron.evaluate.attributes import attribute_accuracy, parse_attributes
from genlip_megatron.evaluate.dialogues import Dialogue, ShardPicture
from genlip_megatron.evaluate.image_scores import score_images
from genlip_megatron.evaluate.scenes import ATTRIBUTES
from genlip_megatron.evaluate.scoring_model import ScoringModel
from genlip_megatron.hf.modeling_genlip import IGNORED_LABEL
from genlip_megatron.infer.caption import Captioner, Decoding
from genlip_megatron.infer.prepare import Prepared, packed


@dataclass(frozen=True)
class Captioned:
    """An image, and its text as tokens of one model.

    Attributes:
        dialogue: the image and its text.
        ids: token ids of prompt, answers and end.
        loss: whether each token carries loss.
    """

    dialogue: Dialogue
    ids: tuple[int, ...]
    loss: tuple[bool, ...]

    @property
    def name(self) -> dict[str, str]:
        """For messages."""
        return {"path": self.dialogue.image.name}

    @property
    def stamp(self) -> str:
        """Changes when the scores of the image may have changed."""
        return f"{self.dialogue.image.stamp} {self.ids} {self.loss}"

    def read(self) -> np.ndarray:
        """uint8 [height, width, 3]."""
        image = self.dialogue.image
        return image.sample.read() if isinstance(image, ShardPicture) else np.asarray(image.read())


def encode(dialogues: Sequence[Dialogue], model: ScoringModel) -> list[Captioned]:
    """Tokenise the texts as in training; captions follow the model's prompt.

    Raises:
        ValueError: a text has a control token, or characters that the tokenizer cannot encode.
    """
    tokenizer: Any = model.loaded.tokenizer
    prompt = (strip_image_marker(model.prompt), False)
    texts = [[prompt, *one.turns] if one.turns[0][1] else one.turns for one in dialogues]
    for one, turns in zip(dialogues, texts, strict=True):
        try:
            check_turns(turns, tokenizer)
        except ValueError as error:
            raise ValueError(f"INPUT {one.image.name}: {error}. Correct or remove the caption.") from None
    encoded = tokenize_many(texts, tokenizer)
    return [Captioned(one, tuple(ids), tuple(loss)) for one, (ids, loss) in zip(dialogues, encoded, strict=True)]


def check_scenes(dialogues: Sequence[Dialogue]) -> None:
    """Raise ValueError unless every caption names all attributes of a rendered scene."""
    for one in dialogues:
        if lacking := [name for name, value in _attributes(one).items() if value is None]:
            raise ValueError(
                f"--attributes: the caption of {one.image.name} does not name one {lacking[0]}. Leave the flag out; it "
                "is for scenes of tools/render_demo_data.py."
            )


def _attributes(dialogue: Dialogue) -> dict[str, str | None]:
    return parse_attributes(" ".join(_answers(dialogue)))


def _answers(dialogue: Dialogue) -> list[str]:
    return [text for text, carries_loss in dialogue.turns if carries_loss]


def measure(
    model: ScoringModel,
    images: Sequence[Captioned],
    *,
    attributes: bool,
    max_new_tokens: int,
    folder: Path,
    batch_size: int,
) -> dict[str, Any]:
    """Measure one model; returns its row of the results.

    Args:
        model: the model to measure.
        images: from ``encode`` with this model.
        attributes: also generate captions of scenes, and measure which attributes they name correctly.
        max_new_tokens: longest generated caption.
        folder: as for ``score_images``.
        batch_size: images in a batch of generated captions.

    Returns:
        "loss" in nats per token, "bits_per_byte" of the answers, "tokens" that carry loss, "settings"; with
        ``attributes`` also "attributes": the share of generated captions that name each correctly, and their mean.

    Raises:
        ValueError: an image cannot be used.
    """
    captioner = Captioner(model.loaded, model.prompt, Decoding(max_new_tokens)) if attributes else None

    def score(batch: Sequence[Prepared], originals: Sequence[Any]) -> Tensor:
        """float32 [B, 1 or 6]: negative log-likelihood; 1 for each attribute that is named correctly."""
        rows = [[_likelihood(model, *pair)] for pair in zip(batch, originals, strict=True)]
        if captioner is not None:
            for row, image, ids in zip(rows, originals, captioner.tokens(batch), strict=True):
                named = attribute_accuracy([captioner.text(ids)], [_attributes(image.dialogue)])
                row += [named[name] for name in ATTRIBUTES]
        return torch.tensor(rows)

    scores = score_images(
        images,
        score,
        1 + len(ATTRIBUTES) if attributes else 1,
        processor=model.processor,
        key=("captions", model.fingerprint, model.prompt_ids, max_new_tokens if attributes else 0),
        folder=folder,
        batch_size=batch_size,
        what=model.name,
    ).double()
    total, tokens = float(scores[:, 0].sum()), sum(sum(image.loss) for image in images)
    size = sum(len(text.encode()) for image in images for text in _answers(image.dialogue))
    row: dict[str, Any] = {"loss": total / tokens, "bits_per_byte": total / (math.log(2) * size), "tokens": tokens}
    if attributes:
        shares = dict(zip(ATTRIBUTES, scores[:, 1:].mean(dim=0).tolist(), strict=True))
        row["attributes"] = {**shares, "mean": sum(shares.values()) / len(shares)}
    return {**row, "settings": model.settings()}


@torch.inference_mode()
def _likelihood(model: ScoringModel, prepared: Prepared, image: Captioned) -> float:
    """Negative log-likelihood of the tokens that carry loss."""
    device = model.loaded.model.device
    patches, grid = packed([prepared], device)
    ids = torch.tensor([image.ids], device=device)
    labels = ids.masked_fill(~torch.tensor([image.loss], device=device), IGNORED_LABEL)
    mean = model.loaded.model(input_ids=ids, pixel_values=patches, image_grid_hw=grid, labels=labels).loss
    return float(mean) * sum(image.loss)
