"""Attribute accuracy: does a caption of a rendered scene name its colour, shape, count, position and word?"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from genlip_megatron.evaluate import scenes

_CHOICES = {
    "colour": tuple(scenes.COLOURS),
    "shape": scenes.SHAPES,
    "count": scenes.COUNTS,
    "position": scenes.POSITIONS,
    "word": scenes.WORDS,
}


def parse_attributes(caption: str) -> dict[str, str | None]:
    """The value of each attribute that the caption names; None if it names none or several.

    >>> parse_attributes("Two red crosses at the top left. The word says moon.")["shape"]
    'cross'
    """
    text = caption.lower()
    parsed: dict[str, str | None] = {}
    for attribute, choices in _CHOICES.items():
        ending = "(?:es|s)?" if attribute == "shape" else ""
        found = [choice for choice in choices if re.search(rf"\b{choice}{ending}\b", text)]
        parsed[attribute] = found[0] if len(found) == 1 else None
    return parsed


def attribute_accuracy(captions: Sequence[str], truths: Sequence[dict[str, str | None]]) -> dict[str, float]:
    """Fraction of captions that name each attribute correctly, and the ``mean`` over attributes."""
    parsed = [parse_attributes(caption) for caption in captions]
    accuracy = {
        name: sum(one[name] is not None and one[name] == truth[name] for one, truth in zip(parsed, truths, strict=True))
        / max(len(truths), 1)
        for name in scenes.ATTRIBUTES
    }
    return {**accuracy, "mean": sum(accuracy.values()) / len(accuracy)}


def shuffled_control(captions: Sequence[str], truths: Sequence[dict[str, str | None]], seed: int) -> dict[str, float]:
    """``attribute_accuracy`` of every caption against another image's attributes: what guessing would score."""
    order = list(range(len(truths)))
    random.Random(seed).shuffle(order)
    other = {image: order[(i + 1) % len(order)] for i, image in enumerate(order)}
    return attribute_accuracy(captions, [truths[other[i]] for i in range(len(truths))])
