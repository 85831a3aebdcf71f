"""Suggestions for unknown flags, keys and values: a near name, or this project's name for another trainer's setting."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from genlip_megatron.config.foreign_names import EQUAL, INSTEAD
from genlip_megatron.config.schema import SECTIONS, SETTINGS


def plain(name: str) -> str:
    """A flag, key or argument as in the tables: no leading dashes, no value, lower case.

    >>> plain("--Learning_Rate=3e-4"), plain("-lr"), plain("train_data")
    ('learning-rate', 'lr', 'train-data')
    """
    return name.lstrip("-").partition("=")[0].lower().replace("_", "-")


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown ``word``: a full stop, and up to three similar names.

    Names are similar if they differ only in dashes, underscores or case; if they begin with ``word``; if each part has
    at most one typing error; or if only their endings differ.

    >>> nearest("--train_itres", ["--train-iters", "--lr"]), nearest("--learning-rate", ["--change-data"])
    (". Did you mean '--train-iters'?", '.')
    """
    wanted = plain(word)
    names = {name: plain(name) for name in known}
    most = wanted[: len(wanted) * 4 // 5 + 1]
    for similar in (
        lambda name: name.replace("-", "") == wanted.replace("-", ""),
        lambda name: len(wanted) > 3 and name.startswith(wanted),
        lambda name: _one_error_per_part(wanted, name),
        lambda name: len(wanted) > 8 and name.startswith(most) and _digits(wanted) == _digits(name),
    ):
        found = [repr(known) for known, name in names.items() if similar(name)]
        if 0 < len(found) <= 3:
            return f". Did you mean {' or '.join(found)}?"
    return "."


def _digits(name: str) -> list[str]:
    return re.findall(r"\d", name)


def _one_error_per_part(word: str, name: str) -> bool:
    parts = list(zip(word.split("-"), name.split("-"), strict=False))
    same_form = word.count("-") == name.count("-") and _digits(word) == _digits(name)
    return same_form and min(len(word), len(name)) > 2 and all(_one_error(*part) for part in parts)


def _one_error(a: str, b: str) -> bool:
    """Whether two words are equal except for one letter missing, added or wrong, or two swapped."""
    first = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    a, b = a[first:], b[first:]
    return a[1:] == b[1:] or a[1:] == b or a == b[1:] or (a[:2] == b[1::-1] and a[2:] == b[2:])


def for_section(name: str) -> str:
    """The end of a sentence about an unknown section."""
    near = nearest(name, SECTIONS)
    return near if near != "." else for_key("", name)


def for_key(section: str, key: str) -> str:
    """The end of a sentence about an unknown key of a section: the setting that it means, or similar ones."""
    places = {name.partition(".")[2]: name for name in SETTINGS}
    name = plain(key)
    for dotted in (f"{section}.{name}".replace("_", "-").lstrip("."), name):
        target = EQUAL.get(dotted, name.replace("-", "_"))
        if not section and target in SECTIONS:
            return f". Use section {target!r}."
        if target in places:
            return f". Use {places[target]}."
        if dotted in INSTEAD:
            return f": {INSTEAD[dotted]}."
    return nearest(key, [name.partition(".")[2] for name in SETTINGS if name.startswith(f"{section}.")])


def for_flag(word: str, flags: Collection[str]) -> str:
    """The end of a sentence about an unknown flag or argument, given the known flags."""
    name = plain(word)
    target = "--" + EQUAL.get(name, name.rpartition(".")[2]).replace("_", "-")  # "train.lr" is the key of --lr
    if target in flags and name not in INSTEAD:
        return f". Use {target}." if name in EQUAL else f". Did you mean {target!r}?"
    if name in INSTEAD and "--train-iters" in flags:
        return f": {INSTEAD[name]}."
    if name.startswith("no-") and (on := f"--{name.removeprefix('no-')}") in flags:
        return f": {on} takes a value and cannot be turned off."
    return nearest(word, flags)
