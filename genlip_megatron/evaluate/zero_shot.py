"""Zero-shot classification and retrieval from likelihoods of texts given images."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from genlip_megatron.data.text import encode_prompt

Measured = TypeVar("Measured")

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


def every_choice(measure: Callable[[str, str], Measured]) -> dict[str, dict[str, Measured]]:
    """``measure(normalise, prior)`` of every combination, as {normalise: {prior: result}}."""
    return {normalise: {prior: measure(normalise, prior) for prior in PRIORS} for normalise in NORMALISATIONS}


def recall_at_1(scores: Tensor, text_of: Tensor) -> dict[str, float]:
    """R@1 of both directions.

    Args:
        scores: float32 [images, texts] of distinct texts, each of which belongs to at least one image.
        text_of: int64 [images], the text that belongs to each image.

    Returns:
        "image_to_text": share of images whose best text is their own; "text_to_image": share of texts whose best image
        is one of theirs.

    >>> recall_at_1(torch.tensor([[2.0, 1.0], [3.0, 0.0]]), torch.tensor([0, 1]))
    {'image_to_text': 0.5, 'text_to_image': 0.0}
    """
    best_image = scores.argmax(dim=0)
    return {
        "image_to_text": (scores.argmax(dim=1) == text_of).double().mean().item(),
        "text_to_image": (text_of[best_image] == torch.arange(scores.shape[1])).double().mean().item(),
    }


def encode_texts(texts: Sequence[str], tokenizer: Any, flag: str, end_token: bool) -> list[list[int]]:
    """Token ids of each text, as answers of the training are tokenised.

    Args:
        texts: those to score.
        tokenizer: the model's.
        flag: where the texts come from, for messages.
        end_token: append the token that ends a caption.

    Raises:
        ValueError: a text is empty, has a control token, or letters that the tokenizer cannot write.
    """
    found = []
    for text in texts:
        ids = encode_prompt(text, tokenizer, flag)
        if not ids:
            raise ValueError(f"{flag} = {text!r}: no text to score. Write at least one word.")
        found.append(ids + tokenizer.closing_ids[:1] if end_token else ids)
    return found


def read_names(path: Path | None, classes: Sequence[str]) -> list[str]:
    """The text of each class: its own name with spaces, or what a JSON file says.

    Args:
        path: a JSON list in the order of ``classes``, or an object {class: text}. If the classes are the numbers from
            0, a list may name more of them than the data have.
        classes: names of the classes in the data.

    Raises:
        ValueError: the file cannot be read, lacks a class, or has another number of names; there is no file and the
            classes are numbers or WordNet ids; or two classes have the same text.
    """
    if path is not None:
        names = _names_of_file(path, classes)
    elif all(re.fullmatch(r"n?\d+", name) for name in classes):
        raise ValueError(
            f"--class-names: missing, and the classes of DATA are called {classes[0]}, {classes[1]} ..., which are not "
            "words. Name a JSON file with the text of each class."
        )
    else:
        names = [name.replace("_", " ") for name in classes]
    for number, name in enumerate(names):
        if (first := names.index(name)) < number:
            raise ValueError(
                f"--class-names: classes {first} and {number} have the same text, {name!r}, which no score can tell "
                "apart. Give each class its own."
            )
    return names


def _names_of_file(path: Path, classes: Sequence[str]) -> list[str]:
    content = _read_json(path, "--class-names")
    if isinstance(content, dict):
        if missing := [name for name in classes if name not in content]:
            raise ValueError(
                f"--class-names {path}: no name for class {missing[0]} ({len(missing)} are missing). Add all."
            )
        content = [content[name] for name in classes]
    numbered = list(classes) == [str(number) for number in range(len(classes))]
    if (
        not isinstance(content, list)
        or not all(_is_text(name) for name in content)
        or (len(content) < len(classes) if numbered else len(content) != len(classes))
    ):
        raise ValueError(
            f"--class-names {path}: expected {len(classes)} texts, as a list or as an object {{class: text}}. Correct "
            "the file."
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
            raise ValueError(f"--template {value}: expected a JSON list of texts. Correct the file.")
        templates += found
    for template in templates:
        if not _is_text(template) or template.count("{}") != 1:
            raise ValueError(f"--template {template!r}: needs one {{}}, the place of the class name. Add it.")
    return templates


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _read_json(path: Path, flag: str) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{flag} {path}: cannot be read: {error.strerror}. Check the path.") from None
    except ValueError as error:
        raise ValueError(f"{flag} {path}: not JSON ({error}). Correct the file.") from None


def read_candidates(path: Path) -> list[tuple[str, list[str]]]:
    """(image file, its candidate texts) of each line of a JSON Lines file.

    Raises:
        ValueError: the file cannot be read, or a line is wrong.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ValueError(f"FILE {path}: cannot be read: {reason}. Check the path and save it as UTF-8.") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"FILE {path}: line {number} is not JSON ({error}). Correct it.") from None
        fields = row if isinstance(row, dict) else {}
        image, candidates = str(fields.get("path", "")), fields.get("candidates")
        if not image or not isinstance(candidates, list) or not all(map(_is_text, candidates)):
            raise ValueError(
                f'FILE {path}: line {number}: expected {{"path": an image file, "candidates": a list of texts}}. '
                "Correct the line."
            )
        if len(candidates) < 2:
            raise ValueError(f"FILE {path}: line {number}: {len(candidates)} candidates. A choice needs two or more.")
        if not Path(image).is_file():
            raise ValueError(f"FILE {path}: line {number}: {image}: no such file. Correct the path.")
        found.append((image, candidates))
    if not found:
        raise ValueError(f"FILE {path}: no lines. Write one for each image.")
    return found
