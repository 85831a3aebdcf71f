"""Zero-shot classification and retrieval from likelihoods of texts given images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

NORMALISATIONS = ("tokens", "none", "bytes")
PRIORS = ("none", "no-image", "shuffled")


@dataclass(frozen=True)
class Texts:
    """The texts to score: each class name in each template, classes outside.

    Attributes:
        texts: [classes * templates].
        token_ids: of each text.
        templates: how many of them each class has.
    """

    texts: list[str]
    token_ids: list[list[int]]
    templates: int

    def lengths(self, normalise: str) -> Tensor:
        """float32 [texts], what a log-likelihood is divided by: tokens, UTF-8 bytes, or 1."""
        if normalise == "tokens":
            return torch.tensor([float(len(ids)) for ids in self.token_ids])
        if normalise == "bytes":
            return torch.tensor([float(len(text.encode())) for text in self.texts])
        return torch.ones(len(self.texts))


def fill_templates(names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Every name in every template, names outside.

    >>> fill_templates(["cat", "dog"], ["A {}.", "One {}."])
    ['A cat.', 'One cat.', 'A dog.', 'One dog.']
    """
    return [template.replace("{}", name) for name in names for template in templates]


def log_prior(likelihoods: Tensor, blind: Tensor | None, prior: str) -> Tensor:
    """Log-probability of each text without the image: what ``prior`` subtracts, as pointwise mutual information.

    Args:
        likelihoods: float32 [images, texts], log p(text | image).
        blind: float32 [texts], log p(text) after the prompt only; for "no-image".
        prior: "none": 0. "no-image": ``blind``. "shuffled": log of the mean probability over all images of the data,
            which uses every other image where a single shuffled one would be noisy.

    Returns:
        float32 [texts].
    """
    if prior == "no-image":
        assert blind is not None
        return blind
    if prior == "shuffled":
        return likelihoods.double().logsumexp(dim=0).float() - torch.tensor(float(len(likelihoods))).log()
    return torch.zeros(likelihoods.shape[1])


def class_scores(likelihoods: Tensor, blind: Tensor | None, texts: Texts, normalise: str, prior: str) -> Tensor:
    """s(c) = mean over templates t of (log p(y_ct | image) - log prior(y_ct)) / length(y_ct).

    Args:
        likelihoods, blind, prior: as for ``log_prior``.
        texts: what was scored.
        normalise: "tokens", "none" or "bytes".

    Returns:
        float32 [images, classes].
    """
    adjusted = (likelihoods - log_prior(likelihoods, blind, prior)) / texts.lengths(normalise)
    return adjusted.unflatten(1, (-1, texts.templates)).mean(dim=2)


def recall_at_1(scores: Tensor, image_of: Tensor) -> dict[str, float]:
    """R@1 of both directions.

    Args:
        scores: float32 [images, texts].
        image_of: int64 [texts], the image that each text belongs to; an image may have several texts.

    Returns:
        "image_to_text": share of images whose best text is their own; "text_to_image": share of texts whose best image
        is theirs.

    >>> recall_at_1(torch.tensor([[2.0, 1.0], [3.0, 0.0]]), torch.tensor([0, 1]))
    {'image_to_text': 0.5, 'text_to_image': 0.0}
    """
    best_text = image_of[scores.argmax(dim=1)]
    return {
        "image_to_text": (best_text == torch.arange(len(scores))).double().mean().item(),
        "text_to_image": (scores.argmax(dim=0) == image_of).double().mean().item(),
    }


def read_names(path: Path | None, classes: Sequence[str]) -> list[str]:
    """The text of each class: its own name with spaces, or what a JSON file says.

    Args:
        path: a JSON list in the order of ``classes``, or an object {class: text}.
        classes: names of the classes in the data.

    Raises:
        ValueError: the file cannot be read, lacks a class, or has another number of names.
    """
    if path is None:
        return [name.replace("_", " ") for name in classes]
    content = _read_json(path, "--class-names")
    if isinstance(content, dict):
        if missing := [name for name in classes if name not in content]:
            raise ValueError(f"--class-names {path}: no name for class {missing[0]} ({len(missing)} are missing)")
        content = [content[name] for name in classes]
    if not isinstance(content, list) or len(content) != len(classes) or not all(_is_text(name) for name in content):
        raise ValueError(
            f"--class-names {path}: expected {len(classes)} texts, as a list or as an object {{class: text}}"
        )
    return content


def read_templates(values: Sequence[str]) -> list[str]:
    """Templates from the command line; a value that ends in .json names a file with a list of them.

    Raises:
        ValueError: the file cannot be read, or a template has no place for the name.
    """
    templates: list[str] = []
    for value in values:
        found = _read_json(Path(value), "--template") if value.endswith(".json") else [value]
        if not isinstance(found, list) or not found:
            raise ValueError(f"--template {value}: expected a JSON list of texts")
        templates += found
    for template in templates:
        if not _is_text(template) or template.count("{}") != 1:
            raise ValueError(f"--template {template!r}: needs one {{}}, the place of the class name")
    return templates


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _read_json(path: Path, flag: str) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{flag} {path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{flag} {path}: not JSON ({error})") from None
